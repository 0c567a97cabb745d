// SPDX-License-Identifier: Apache-2.0
//! A process's terminal: a pair of the container's own devpts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    FileType, Mode, OFlags, ResolveFlags, Uid, fchown, fstat, fstatfs, major, minor, openat2,
};
use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::plan::WindowSize;
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};

/// `DEVPTS_SUPER_MAGIC`.
const DEVPTS: u64 = 0x1cd1;

/// Both sides of a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// The side that the agent reads and writes.
    pub(crate) master: OwnedFd,
    /// The side that the process has.
    slave: OwnedFd,
}

impl Terminal {
    /// Opens a new terminal of the devpts at `/dev/pts` below `root`.
    ///
    /// The container may have put anything there: the master must be the multiplexer of a devpts,
    /// and the slave comes from the master itself rather than from a path (CVE-2025-52565).
    ///
    /// # Errors
    ///
    /// When there is no devpts, or the kernel's reason.
    pub(crate) fn open(root: BorrowedFd<'_>, size: WindowSize, owner: u32) -> Result<Self> {
        let context = || "open a terminal of /dev/pts";
        let master = openat2(
            root,
            "/dev/pts/ptmx",
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
        .context(context)?;
        let status = fstat(&master).context(context)?;
        let multiplexer = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice
            && (major(status.st_rdev), minor(status.st_rdev)) == (5, 2);
        let kind = fstatfs(&master).context(context)?.f_type;
        if !multiplexer || u64::try_from(kind).ok() != Some(DEVPTS) {
            return Err(AgentError::precondition(
                "open a terminal: /dev/pts/ptmx is not that of a devpts",
            ));
        }
        unlockpt(&master).context(context)?;
        let slave = ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )
        .context(context)?;
        resize(&master, size.rows.into(), size.columns.into())?;
        fchown(&slave, Some(Uid::from_raw(owner)), None).context(|| "own the terminal")?;
        Ok(Self { master, slave })
    }

    /// Makes the terminal the container's `/dev/console`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn bind_console(&self, root: BorrowedFd<'_>) -> Result<()> {
        let console = mount::create_in_root(root, Path::new("/dev/console"), Target::File)
            .context(|| "make /dev/console")?;
        let mount = mount::clone_mount(self.slave.as_fd(), false)
            .context(|| "bind the terminal to /dev/console")?;
        mount::attach(&mount, console.as_fd(), &MountOptions::default())
    }

    /// Makes the terminal the controlling one of this session, and its slave the three streams.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn control(&self) -> Result<()> {
        ioctl_tiocsctty(&self.slave).context(|| "make the terminal the controlling one")?;
        super::process::connect(&self.slave, &self.slave, &self.slave)
    }
}

/// Sets a terminal's size in characters. A size of 0 by 0 is "not known" and changes nothing.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn resize(master: &OwnedFd, rows: u32, columns: u32) -> Result<()> {
    if (rows, columns) == (0, 0) {
        return Ok(());
    }
    let cells = |count| u16::try_from(count).unwrap_or(u16::MAX);
    let size = Winsize {
        ws_row: cells(rows),
        ws_col: cells(columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size).context(|| "set the terminal's size")
}
