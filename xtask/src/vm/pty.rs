// SPDX-License-Identifier: Apache-2.0
//! Pseudoterminals of commands in the dev VM.

use super::wire::Size;
use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;

/// Opens a new pair: master, slave.
pub(crate) fn open(size: Size) -> Result<(File, File)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .context("opening a pty")?;
    grantpt(&master).context("granting the pty")?;
    unlockpt(&master).context("unlocking the pty")?;
    let name = ptsname(&master, Vec::new()).context("naming the pty")?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave =
        rustix::fs::open(&name, flags, Mode::empty()).context("opening the pty's other end")?;
    let master = File::from(master);
    resize(&master, size);
    Ok((master, File::from(slave)))
}

/// Sets the size; the foreground process group gets SIGWINCH.
pub(crate) fn resize(master: &File, size: Size) {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let _ = tcsetwinsize(master, size);
}
