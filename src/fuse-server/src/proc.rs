// SPDX-License-Identifier: Apache-2.0
//! The process's descriptors as a directory.
//!
//! An inode is held by an `O_PATH` descriptor, which names a file without opening it. To open it
//! later (or to reach calls that know only paths) there has to be a path to it, and `/proc/self/fd`
//! is the only directory that has one whatever became of the file's name. It is opened once,
//! before the process gives up its root; look-ups relative to the descriptor go on working after.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, fstatfs, openat, readlinkat};
use rustix::io::{Errno, Result};
use rustix::path::DecInt;

/// `/proc/self/fd` of this process.
#[derive(Debug)]
pub struct ProcSelfFd {
    directory: OwnedFd,
}

impl ProcSelfFd {
    /// Opens it. Call in the process that serves (not its parent: `self` is whoever opens), before
    /// its root goes away.
    ///
    /// # Errors
    /// There is no procfs at `/proc`.
    pub fn open() -> Result<Self> {
        let directory = openat(
            CWD,
            c"/proc/self/fd",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        if fstatfs(&directory)?.f_type != PROC_SUPER_MAGIC {
            return Err(Errno::NOENT);
        }
        Ok(Self { directory })
    }

    /// The name of `file` in this directory.
    pub(crate) fn name(file: BorrowedFd<'_>) -> DecInt {
        DecInt::from_fd(file)
    }

    /// Where the file behind `file` is, as far as the kernel knows.
    pub(crate) fn path(&self, file: BorrowedFd<'_>) -> Result<PathBuf> {
        let path = readlinkat(&self.directory, Self::name(file), Vec::new())?;
        Ok(PathBuf::from(OsString::from_vec(path.into_bytes())))
    }

    /// Opens the file behind `file` anew. The caller knows that it is a regular file or directory:
    /// opening a device or FIFO has effects of its own (CVE-2020-35517).
    pub(crate) fn reopen(&self, file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
        openat(
            &self.directory,
            Self::name(file),
            // The entry is itself a symbolic link, so NOFOLLOW would refuse it.
            flags.union(OFlags::CLOEXEC).difference(OFlags::NOFOLLOW),
            Mode::empty(),
        )
    }
}

impl AsFd for ProcSelfFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}
