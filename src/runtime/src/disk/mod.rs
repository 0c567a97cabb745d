// SPDX-License-Identifier: Apache-2.0
//! Disks of the host that a container gets: block devices, and file systems on block devices or in
//! files. The host opens them and mounts nothing; the machine gets them as disks of its own.

mod direct;
mod layers;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use protocols::agent::agent::FSGroup;
use protocols::containerd::mount::Mount;
use rustix::fs::{FlockOperation, flock, major, makedev, minor};

pub(crate) use self::direct::{add as add_volume, remove as remove_volume, volume};
use crate::error::{Context, Kind, Result, ShimError};

/// A disk that a container wants, and as what.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wanted {
    source: Source,
    pub(crate) read_only: bool,
    pub(crate) role: Role,
}

/// Where it is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// A block device of this number.
    Number(u64),
    /// A block device, or a file that holds a disk's content.
    Path(PathBuf),
}

/// What it is in the container.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Role {
    /// A device node at this path.
    Device(String),
    /// A file system that is mounted in the guest.
    Filesystem(Filesystem),
    /// One that is a part of an overlay there. Parts of one are wanted in a row: the writable one, and
    /// the others from the uppermost down.
    Layer(Filesystem),
    /// What the layer that follows holds its files' content in.
    Blob,
}

/// A file system on a disk.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Filesystem {
    pub(crate) kind: String,
    pub(crate) options: Vec<String>,
    /// Where it is mounted in the guest.
    pub(crate) point: String,
    /// Whom it is given to.
    pub(crate) group: Option<FSGroup>,
}

/// What tells disks of a machine apart. The same device is two disks where one container may write
/// to it and another may not: that is the device's to see to, not the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    content: Content,
    read_only: bool,
    /// Nobody else may have it: one who didn't ask for that has not got it.
    alone: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Device(u64),
    File { device: u64, inode: u64 },
}

impl Wanted {
    /// A block device, as a specification names it, at a path in the container.
    pub(crate) fn device(path: &str, major: u32, minor: u32, read_only: bool) -> Self {
        Self {
            source: Source::Number(makedev(major, minor)),
            read_only,
            role: Role::Device(path.to_owned()),
        }
    }

    /// A file system on a block device, or in a file.
    fn filesystem(source: &Path, filesystem: Filesystem) -> Self {
        let mut options = filesystem.options.iter();
        Self {
            source: Source::Path(source.to_owned()),
            read_only: options.any(|option| option == "ro"),
            role: Role::Filesystem(filesystem),
        }
    }

    /// What it is, without opening it: who has it open may have it alone.
    pub(crate) fn identity(&self) -> Result<Identity> {
        let content = match &self.source {
            Source::Number(number) => Content::Device(*number),
            Source::Path(path) => {
                content(&fs::metadata(path).context(Kind::InvalidArgument, || self.name())?)
                    .ok_or_else(|| self.wrong("it is neither a block device nor a file"))?
            }
        };
        Ok(Identity {
            content,
            read_only: self.read_only,
            alone: self.alone(),
        })
    }

    /// Whether nobody else may have it open.
    fn alone(&self) -> bool {
        !matches!(self.role, Role::Device(_)) && !self.read_only
    }

    /// Opens it; `direct` goes past the host's page cache. A file system that is to be written is
    /// held alone for as long as the file is open: it would not survive a second kernel.
    pub(crate) fn open(&self, direct: bool) -> Result<File> {
        let Identity {
            content: wanted,
            alone,
            ..
        } = self.identity()?;
        let is_device = matches!(wanted, Content::Device(_));
        let mut flags = 0;
        if direct {
            flags |= libc::O_DIRECT;
        }
        if alone && is_device {
            // Of a block device the kernel itself keeps track, its own mounts included.
            flags |= libc::O_EXCL;
        }
        let path = match &self.source {
            Source::Number(number) => {
                node(*number).context(Kind::InvalidArgument, || self.name())?
            }
            Source::Path(path) => path.clone(),
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(flags)
            .open(&path)
            .context(Kind::FailedPrecondition, || self.name())?;
        let metadata = file.metadata().internal(|| self.name())?;
        if content(&metadata) != Some(wanted) {
            return Err(self.wrong("another device is in its place"));
        }
        if !is_device {
            let lock = match alone {
                true => FlockOperation::NonBlockingLockExclusive,
                false => FlockOperation::NonBlockingLockShared,
            };
            flock(&file, lock)
                .map_err(io::Error::from)
                .context(Kind::FailedPrecondition, || {
                    format!("{}: somebody else has it open as a disk", self.name())
                })?;
        }
        Ok(file)
    }

    /// An error of the machine's, about this disk.
    pub(crate) fn failed(&self, error: &ShimError) -> ShimError {
        ShimError::new(error.kind(), format!("{}: {}", self.name(), error.chain()))
    }

    fn name(&self) -> String {
        let source = match &self.source {
            Source::Number(number) => {
                format!("block device {}:{}", major(*number), minor(*number))
            }
            Source::Path(path) => path.display().to_string(),
        };
        match &self.role {
            Role::Device(path) => format!("config.json: linux.devices: {path}: {source}"),
            Role::Filesystem(filesystem) | Role::Layer(filesystem) => {
                format!("{} on {source}", filesystem.kind)
            }
            Role::Blob => format!("blob of a layer on {source}"),
        }
    }

    fn wrong(&self, what: &str) -> ShimError {
        ShimError::new(Kind::InvalidArgument, format!("{}: {what}", self.name()))
    }
}

fn content(metadata: &Metadata) -> Option<Content> {
    let kind = metadata.file_type();
    if kind.is_block_device() {
        Some(Content::Device(metadata.rdev()))
    } else if kind.is_file() {
        Some(Content::File {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    } else {
        None
    }
}

/// The kernel's own node of a block device. A specification names only its number, and its path in
/// the container.
fn node(number: u64) -> io::Result<PathBuf> {
    let event = format!("/sys/dev/block/{}:{}/uevent", major(number), minor(number));
    let text = match fs::read_to_string(event) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(io::Error::other("the host has no such device"));
        }
        text => text?,
    };
    let mut lines = text.lines();
    let name = lines.find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("the kernel has no name for it"))?;
    Ok(Path::new("/dev").join(name))
}

/// The disks of a container's root file system, if its snapshotter has it on any; else the host mounts
/// it. The kind of mount decides, never what happens to be at a path (CVE-2026-24054): a bind mount or
/// an overlay shares files, whatever they lie on.
pub(crate) fn rootfs(container: &str, mounts: &[Mount]) -> Result<Vec<Wanted>> {
    if layers::are_disks(mounts) {
        return layers::disks(container, mounts);
    }
    Ok(whole(container, mounts).into_iter().collect())
}

/// The one disk that holds all of it.
fn whole(container: &str, mounts: &[Mount]) -> Option<Wanted> {
    let [mount] = mounts else {
        return None;
    };
    let has = |word: &str| mount.options.iter().any(|option| option == word);
    let shares = ["", "bind", "overlay"].contains(&mount.type_.as_str());
    if shares || has("bind") || has("rbind") || !mount.target.is_empty() {
        return None;
    }
    let source = Path::new(&mount.source);
    // What isn't there, the mount will say.
    let kind = fs::metadata(source).ok()?.file_type();
    if !(kind.is_block_device() || kind.is_file() && has("loop")) {
        return None;
    }
    let options = mount.options.iter().filter(|option| *option != "loop");
    let filesystem = Filesystem {
        kind: mount.type_.clone(),
        options: options_for(&mount.type_, options),
        point: rootfs_in_guest(container),
        group: None,
    };
    Some(Wanted::filesystem(source, filesystem))
}

/// Where the guest finds it then.
pub(crate) fn rootfs_in_guest(container: &str) -> String {
    format!("/run/kata-containers/{container}/rootfs")
}

/// XFS refuses the same file system twice, and copies of a snapshot are the same to it.
fn options_for<'a>(kind: &str, options: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut options: Vec<_> = options.cloned().collect();
    let nouuid = "nouuid".to_owned();
    if kind == "xfs" && !options.contains(&nouuid) {
        options.push(nouuid);
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::mount;

    #[test]
    fn the_kind_of_a_mount_says_whether_it_is_a_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = mount("xfs", file.path(), &["loop", "ro"]);
        let wanted = whole("c1", std::slice::from_ref(&disk)).unwrap();
        assert!(wanted.read_only);
        let Role::Filesystem(filesystem) = wanted.role else {
            panic!("not a file system");
        };
        assert_eq!(filesystem.options, ["ro", "nouuid"]);
        assert_eq!(filesystem.point, "/run/kata-containers/c1/rootfs");

        let folder = tempfile::tempdir().unwrap();
        for shared in [
            vec![mount("bind", file.path(), &["rbind", "loop"])],
            vec![mount("ext4", file.path(), &["bind", "loop"])],
            vec![mount("overlay", file.path(), &["loop"])],
            vec![mount("ext4", file.path(), &[])],
            vec![mount("ext4", folder.path(), &["loop"])],
            vec![disk.clone(), mount("overlay", Path::new("overlay"), &[])],
            vec![disk.clone(), disk],
            vec![],
        ] {
            assert!(rootfs("c1", &shared).unwrap().is_empty());
        }
    }

    #[test]
    fn a_file_system_is_written_by_one_kernel_at_a_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let wanted = |options| {
            let mount = mount("ext4", file.path(), options);
            whole("c1", &[mount]).unwrap()
        };
        let (writable, read_only) = (wanted(&["loop"]), wanted(&["loop", "ro"]));
        assert_ne!(writable.identity().unwrap(), read_only.identity().unwrap());
        let first = writable.open(false).unwrap();
        for second in [&writable, &read_only] {
            let error = second.open(false).unwrap_err();
            assert_eq!(error.kind(), Kind::FailedPrecondition);
        }
        drop(first);
        let _first = read_only.open(false).unwrap();
        read_only.open(false).unwrap();
        writable.open(false).unwrap_err();
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let wanted = Wanted::device("/dev/xvda", 4000, 7, false);
        let error = wanted.open(false).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert_eq!(
            error.chain(),
            "config.json: linux.devices: /dev/xvda: block device 4000:7: the host has no such device"
        );
    }
}
