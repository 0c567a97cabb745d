// SPDX-License-Identifier: Apache-2.0
//! Masked and read-only paths. Targets are opened once, inside the container's root and without
//! magic links, and everything is attached to those descriptors (CVE-2025-31133, CVE-2025-52881).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, major, minor, openat};
use rustix::io::Errno;

use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions};
use crate::sys::mount::{Attributes, set_attributes};

/// Hides `paths`: folders behind an empty one, everything else behind `/dev/null`. Paths that the
/// container does not have need no mask.
///
/// # Errors
///
/// The kernel's, with the path.
pub(crate) fn mask(root: BorrowedFd<'_>, paths: &[PathBuf]) -> Result<()> {
    if paths.is_empty() {
        return Ok(());
    }
    let null = guests_null()?;
    let options = MountOptions::parse(&["ro", "nr_inodes=1"])?;
    for path in paths {
        let Some((target, kind)) = open(root, path)? else {
            continue;
        };
        let cover = match kind {
            // One each: before Linux 6.15 only what is attached can be cloned.
            FileType::Directory => mount::filesystem("tmpfs", "tmpfs", &options)?,
            _ => mount::clone_mount(null.as_fd(), false).context(|| format!("mask {path:?}"))?,
        };
        mount::attach(&cover, target.as_fd(), &MountOptions::default())
            .map_err(|error| AgentError::internal(format!("mask {path:?}: {}", error.line())))?;
    }
    Ok(())
}

/// Makes `paths` read-only, with all mounts below them.
///
/// # Errors
///
/// The kernel's, with the path.
pub(crate) fn protect(root: BorrowedFd<'_>, paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let context = || format!("make {path:?} read-only");
        let Some((target, _)) = open(root, path)? else {
            continue;
        };
        let copy = mount::clone_mount(target.as_fd(), true).context(context)?;
        let attributes = Attributes {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Attributes::default()
        };
        set_attributes(copy.as_fd(), attributes, true).context(context)?;
        mount::attach(&copy, target.as_fd(), &MountOptions::default())
            .map_err(|error| AgentError::internal(format!("{}: {}", context(), error.line())))?;
    }
    Ok(())
}

fn open(root: BorrowedFd<'_>, path: &Path) -> Result<Option<(OwnedFd, FileType)>> {
    match mount::open_in_root(root, path) {
        Ok(target) => {
            let status = fstat(&target).context(|| format!("look at {path:?}"))?;
            Ok(Some((target, FileType::from_raw_mode(status.st_mode))))
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(AgentError::io(format!("open {path:?}"), error)),
    }
}

/// The guest's own `/dev/null`, never one of the container's root.
fn guests_null() -> Result<OwnedFd> {
    let null = openat(
        CWD,
        "/dev/null",
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "open /dev/null")?;
    let status = fstat(&null).context(|| "look at /dev/null")?;
    let device = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
    if device && major(status.st_rdev) == 1 && minor(status.st_rdev) == 3 {
        Ok(null)
    } else {
        Err(AgentError::internal(
            "/dev/null of the guest is not the null device",
        ))
    }
}
