// SPDX-License-Identifier: Apache-2.0
//! Locks of files: of an open file (`flock(2)`), and of a process (`fcntl(2)`).

use std::fs::{File, OpenOptions};
use std::io::{Write, stdout};
use std::path::Path;
use std::thread::park;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;

/// Takes both locks and keeps them.
pub(super) fn keep(path: &Path) -> Result<()> {
    let file = open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).context("flock")?;
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).context("fcntl")?;
    writeln!(stdout(), "up")?;
    loop {
        park();
    }
}

/// Tries both locks.
pub(super) fn ask(path: &Path) -> Result<()> {
    let file = open(path)?;
    let operation = FlockOperation::NonBlockingLockExclusive;
    for (name, answer) in [
        ("flock", flock(&file, operation)),
        ("fcntl", fcntl_lock(&file, operation)),
    ] {
        let word = match answer {
            Ok(()) => "free",
            Err(Errno::AGAIN | Errno::ACCESS) => "locked",
            Err(error) => bail!("{name}: {error}"),
        };
        writeln!(stdout(), "{name}: {word}")?;
    }
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| path.display().to_string())
}
