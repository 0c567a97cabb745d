// SPDX-License-Identifier: Apache-2.0
//! File systems on disks.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use protocols::agent::agent::Storage;
use rustix::fs::{Mode, OFlags, open, openat, syncfs};
use rustix::io::Errno;

use super::driver::{Mounted, target};
use super::group;
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};

/// The driver whose source is a disk.
pub(super) const DRIVER: &str = "blk";
/// How long the kernel may take to be done with an unmounted disk.
const LET_GO: Duration = Duration::from_secs(5);
/// No event tells that it is.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A file system on the disk whose node is `source`.
pub(super) fn mount(storage: &Storage) -> Result<Mounted> {
    if let Some(option) = storage.driver_options.first() {
        return Err(AgentError::unsupported(format!("driver option {option:?}")));
    }
    if storage.fstype.is_empty() {
        return Err(AgentError::invalid("the type of file system is missing"));
    }
    let mut options = MountOptions::parse(&storage.options)?;
    let read_only = storage.options.iter().any(|option| option == "ro");
    if read_only {
        // Of the file system as well as of the mount: else it would write to its disk.
        options.parameters.push(("ro".to_owned(), None));
    }
    let mounted = mount::filesystem(&storage.fstype, &storage.source, &options)?;
    if let Some(group) = storage.fs_group.as_ref()
        && !read_only
    {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(&mounted, ".", flags, Mode::empty()).context(|| "open")?;
        group::give(&root, group)?;
    }
    let target = target(storage, Target::Directory)?;
    mount::attach(&mounted, target.as_fd(), &options)?;
    Ok(Mounted::Disk {
        point: PathBuf::from(&storage.mount_point),
        device: PathBuf::from(&storage.source),
    })
}

/// Takes a file system away, and waits until its disk may go.
///
/// # Errors
///
/// The kernel's, or a disk that is still in use.
pub(super) fn unmount(point: &Path, device: &Path) -> Result<()> {
    let root = open(point, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    // What is detached is written when its last user lets go, who may not.
    let written = root
        .and_then(syncfs)
        .context(|| format!("write out {point:?}"));
    mount::detach(point)?;
    written?;
    // To a disk that is in use the kernel gives nobody exclusive access.
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    let begin = Instant::now();
    loop {
        match open(device, flags, Mode::empty()) {
            Err(Errno::BUSY) if begin.elapsed() < LET_GO => sleep(LOOK_AGAIN),
            opened => {
                return opened
                    .map(drop)
                    .context(|| format!("await the end of {device:?}"));
            }
        }
    }
}
