// SPDX-License-Identifier: Apache-2.0
//! A terminal with `ctr` at its other end.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::process::Capture;
use crate::wait::until;

/// After this, a size that doesn't show is told again.
const AGAIN: Duration = Duration::from_millis(300);

/// A command on a terminal of its own.
#[derive(Debug)]
pub struct Pty {
    terminal: File,
    child: Child,
    output: Capture,
    read: usize,
}

impl Pty {
    /// Starts a command on a new terminal.
    pub fn start(command: &mut Command, rows: u16, columns: u16) -> Result<Self> {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        resize(&terminal, rows, columns)?;
        let name = ptsname(&terminal, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let side = open(&name, flags, Mode::empty()).context("opening the terminal's side")?;
        let child = command
            .stdin(Stdio::from(side.try_clone()?))
            .stdout(Stdio::from(side.try_clone()?))
            .stderr(Stdio::from(side))
            .spawn()
            .context("starting on a terminal")?;
        // The command holds its own copies of the terminal's side: as long as it has them, the
        // terminal is open.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let terminal = File::from(terminal);
        let output = Capture::start_without(b'\r', terminal.try_clone()?);
        Ok(Self {
            terminal,
            child,
            output,
            read: 0,
        })
    }

    /// Changes the terminal's size, tells the command, and waits for output that shows it.
    ///
    /// The command is told more than once: `ctr` sets the first size a moment before it listens.
    pub fn resize(&mut self, rows: u16, columns: u16, shows: &str, limit: Duration) -> Result<()> {
        resize(&self.terminal, rows, columns)?;
        until(&format!("size {rows} {columns}"), limit, || {
            kill_process(Pid::from_child(&self.child), Signal::WINCH)?;
            Ok(self.wait_for(shows, AGAIN).ok())
        })
        .with_context(|| format!("on the terminal: {}", self.text()))
    }

    /// Types.
    pub fn write(&mut self, text: &str) -> Result<()> {
        Ok(self.terminal.write_all(text.as_bytes())?)
    }

    /// Waits for output behind that of the last wait. Carriage returns don't count: who adds them,
    /// the container's terminal or this one, is not part of the contract.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        self.read = self.output.wait_for(text, self.read, limit)?;
        Ok(())
    }

    /// All output so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output.bytes()).into_owned()
    }

    /// Waits for the command's end.
    pub fn finish(mut self, limit: Duration) -> Result<ExitStatus> {
        until("the end of the command on the terminal", limit, || {
            Ok(self.child.try_wait()?)
        })
        .with_context(|| format!("on the terminal: {}", self.text()))
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

fn resize(terminal: impl AsFd, rows: u16, columns: u16) -> Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).context("setting the terminal's size")
}
