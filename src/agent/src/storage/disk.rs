// SPDX-License-Identifier: Apache-2.0
//! File systems on disks.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use protocols::agent::agent::Storage;
use rustix::fs::{Mode, OFlags, major, minor, open, syncfs};
use rustix::io::Errno;

use super::driver::{Mounted, give_group, has, target};
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};
use crate::reaper::Reaper;
use crate::task::blocking;
use crate::tool;

/// Driver option: a disk on which nothing is yet gets a file system.
const FORMAT: &str = "create_filesystem";
/// Every file system that this guest knows has something in here.
const BLANK: usize = 128 << 10;
const MOUNTS: &str = "/proc/self/mountinfo";
/// How long the kernel may take to be done with an unmounted disk.
const LET_GO: Duration = Duration::from_secs(5);
/// No event tells that it is.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

fn is_format(option: &str) -> bool {
    matches!(option.strip_prefix(FORMAT), Some("" | "=true"))
}

/// Puts a file system on the disk whose node is `source`, where that is asked for and the disk is
/// blank. A disk that has something on it keeps that.
///
/// # Errors
///
/// UNIMPLEMENTED where the guest image has no program for it; the program's own.
pub(super) async fn format(storage: &Storage, reaper: &Reaper) -> Result<()> {
    if !storage
        .driver_options
        .iter()
        .any(|option| is_format(option))
    {
        return Ok(());
    }
    let source = PathBuf::from(&storage.source);
    if !blocking(move || is_blank(&source)).await? {
        return Ok(());
    }
    let options: &[&str] = match storage.fstype.as_str() {
        "ext2" | "ext3" | "ext4" => &["-q", "-F"],
        "xfs" | "btrfs" => &["-q", "-f"],
        other => {
            return Err(AgentError::unsupported(format!(
                "{FORMAT}: file systems of type {other:?} are not made here"
            )));
        }
    };
    let name = format!("mkfs.{}", storage.fstype);
    let program = tool::find(&name).ok_or_else(|| {
        AgentError::unsupported(format!("{FORMAT}: the guest image has no {name}"))
    })?;
    let mut arguments = options.to_vec();
    arguments.push(&storage.source);
    tool::run(reaper, &program, &arguments, b"").await.map(drop)
}

fn is_blank(disk: &Path) -> Result<bool> {
    let context = || format!("read {disk:?}");
    let mut start = Vec::with_capacity(BLANK);
    let limit = u64::try_from(BLANK).unwrap_or(u64::MAX);
    let file = File::open(disk).context(context)?;
    file.take(limit).read_to_end(&mut start).context(context)?;
    Ok(start.iter().all(|byte| *byte == 0))
}

/// A file system on the disk whose node is `source`.
pub(super) fn mount(storage: &Storage) -> Result<Mounted> {
    let unknown = |option: &&String| !is_format(option);
    if let Some(option) = storage.driver_options.iter().find(unknown) {
        return Err(AgentError::unsupported(format!("driver option {option:?}")));
    }
    if storage.fstype.is_empty() {
        return Err(AgentError::invalid("the type of file system is missing"));
    }
    let mut options = MountOptions::parse(&storage.options)?;
    if has(storage, "ro") {
        // Of the file system as well as of the mount: else it would write to its disk.
        options.parameters.push(("ro".to_owned(), None));
    }
    let mounted = mount::filesystem(&storage.fstype, &storage.source, &options)?;
    give_group(storage, &mounted)?;
    let target = target(storage, Target::Directory)?;
    mount::attach(&mounted, target.as_fd(), &options)?;
    Ok(Mounted::Disk {
        point: PathBuf::from(&storage.mount_point),
        device: PathBuf::from(&storage.source),
    })
}

/// Takes a file system away, and waits until its disk may go: unless it is mounted elsewhere as well, as a
/// layer of two containers is.
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
            Err(Errno::BUSY) if is_mounted(device)? => return Ok(()),
            Err(Errno::BUSY) if begin.elapsed() < LET_GO => sleep(LOOK_AGAIN),
            opened => {
                return opened
                    .map(drop)
                    .context(|| format!("await the end of {device:?}"));
            }
        }
    }
}

/// Whether a file system of the disk's is mounted somewhere.
fn is_mounted(device: &Path) -> Result<bool> {
    let number = fs::metadata(device)
        .context(|| format!("look at {device:?}"))?
        .rdev();
    let mounts = fs::read_to_string(MOUNTS).context(|| MOUNTS.to_owned())?;
    Ok(has_mounts(&mounts, number))
}

/// Whether one of `mounts` is of the disk of this number (proc_pid_mountinfo(5)).
fn has_mounts(mounts: &str, number: u64) -> bool {
    let number = format!("{}:{}", major(number), minor(number));
    let mut numbers = mounts.lines().filter_map(|line| line.split(' ').nth(2));
    numbers.any(|other| other == number)
}

#[cfg(test)]
mod tests {
    use rustix::fs::makedev;

    use super::*;

    #[test]
    fn a_disk_is_mounted_where_a_mount_has_its_number() {
        let mounts =
            "24 1 254:16 / / ro - erofs /dev/vdb ro\n25 24 0:5 / /dev rw - devtmpfs d rw\n";
        assert!(has_mounts(mounts, makedev(254, 16)));
        assert!(has_mounts(mounts, makedev(0, 5)));
        assert!(!has_mounts(mounts, makedev(254, 1)));
        assert!(!has_mounts("", makedev(254, 16)));
    }

    #[test]
    fn only_what_is_blank_is_formatted() {
        let place = tempfile::tempdir().unwrap();
        let disk = place.path().join("disk");
        fs::write(&disk, vec![0; BLANK + 1]).unwrap();
        assert!(is_blank(&disk).unwrap());
        let mut content = vec![0; BLANK + 1];
        content[0x438] = 0x53;
        fs::write(&disk, &content).unwrap();
        assert!(!is_blank(&disk).unwrap());
        for (option, asks) in [
            ("create_filesystem", true),
            ("create_filesystem=true", true),
            ("create_filesystems", false),
            ("encryption_key=ephemeral", false),
        ] {
            assert_eq!(is_format(option), asks, "{option}");
        }
    }
}
