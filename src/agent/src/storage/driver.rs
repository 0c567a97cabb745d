// SPDX-License-Identifier: Apache-2.0
//! What each storage driver does.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocols::agent::agent::Storage;
use rustix::fs::{CWD, Mode, OFlags, fchmod, fchown, openat, openat2};
use rustix::fs::{Gid, ResolveFlags};
use tracing::warn;

use super::huge::HugePages;
use super::layers::{self, Layers};
use super::watched::{self, Refusal, Watched};
use super::{disk, group};
use crate::disk::Transport;
use crate::error::{AgentError, Context as _, Kind, Result};
use crate::mount::{self, MountOptions, Target};

const VIRTIO_FS: &str = "virtio-fs";
/// Drivers that need no device.
const ALWAYS: [&str; 5] = ["ephemeral", "local", "bind", "overlayfs", "watchable-bind"];

/// Drivers of this guest, as AgentDetails lists them.
pub(crate) fn drivers() -> impl Iterator<Item = &'static str> {
    let disks = Transport::ALL.into_iter();
    [VIRTIO_FS, layers::DRIVER]
        .into_iter()
        .chain(ALWAYS)
        .chain(disks.filter(|disk| disk.is_there()).map(Transport::name))
}

/// Driver option of `overlayfs`: a folder to make before mounting.
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory=";
/// Driver option of `watchable-bind`: the runtime tells when the folder changes.
const TOLD: &str = "io.katacontainers.volume.watchable.told";
/// Option of `overlayfs` that concerns the runtime only.
const OVERLAY_READ_WRITE: &str = "io.katacontainers.fs-opt.overlay-rw";

/// A storage in place.
#[derive(Debug)]
pub(crate) enum Mounted {
    /// Something is mounted there.
    Mount(PathBuf),
    /// A file system on a disk is mounted there.
    Disk { point: PathBuf, device: PathBuf },
    /// An overlay of file systems on disks.
    Layers(Layers),
    /// A folder, whose content belongs to its file system.
    Folder,
    /// A copy of a folder is mounted there.
    Copy(PathBuf, Arc<Watched>),
    /// Huge pages are set aside for what is mounted there.
    Huge(PathBuf, HugePages),
}

impl Mounted {
    /// # Errors
    ///
    /// The kernel's, with the path.
    pub(crate) fn unmount(self) -> Result<()> {
        match self {
            Self::Mount(path) => mount::detach(&path),
            Self::Disk { point, device } => disk::unmount(&point, &device),
            Self::Layers(layers) => layers.unmount(),
            Self::Folder => Ok(()),
            Self::Copy(path, copy) => mount::detach(&path).and_then(|()| copy.remove()),
            Self::Huge(path, pages) => mount::detach(&path).and_then(|()| pages.give_back()),
        }
    }
}

/// Mounts one storage.
///
/// # Errors
///
/// An unknown driver, or the kernel's reason, with driver and mount point.
pub(crate) fn mount(storage: &Storage) -> Result<Mounted> {
    let point = Path::new(&storage.mount_point);
    if !point.is_absolute() || point == Path::new("/") {
        return Err(AgentError::invalid(format!(
            "storage {:?}: mount point {:?} is not below /",
            storage.driver, storage.mount_point
        )));
    }
    let done = match storage.driver.as_str() {
        VIRTIO_FS => filesystem(storage, "virtiofs", &storage.options),
        disk if Transport::named(disk).is_some() => disk::mount(storage),
        "ephemeral" => ephemeral(storage),
        "local" => local(storage),
        "bind" => bind(storage),
        "overlayfs" => overlay(storage),
        "watchable-bind" => watchable(storage),
        other => Err(AgentError::unsupported(format!(
            "storage driver {other:?} is not supported"
        ))),
    };
    done.map_err(|error| named(storage, &error))
}

/// An error with the storage that it is about.
pub(super) fn named(storage: &Storage, error: &AgentError) -> AgentError {
    let line = format!(
        "storage {:?} on {:?}: {}",
        storage.driver,
        storage.mount_point,
        error.line()
    );
    AgentError::new(error.kind(), line)
}

/// Whether `option` is among the storage's, as it is.
pub(super) fn has(storage: &Storage, option: &str) -> bool {
    storage.options.iter().any(|word| word == option)
}

fn filesystem(storage: &Storage, default_type: &str, options: &[String]) -> Result<Mounted> {
    let kind = match storage.fstype.as_str() {
        "" => default_type,
        kind => kind,
    };
    attach(storage, kind, &MountOptions::parse(options)?)
}

fn attach(storage: &Storage, kind: &str, options: &MountOptions) -> Result<Mounted> {
    let mounted = mount::filesystem(kind, &storage.source, options)?;
    give_group(storage, &mounted)?;
    let target = target(storage, Target::Directory)?;
    mount::attach(&mounted, target.as_fd(), options)?;
    Ok(Mounted::Mount(PathBuf::from(&storage.mount_point)))
}

/// A tmpfs or hugetlbfs of the pod. `fsgid=N` gives it to a group.
fn ephemeral(storage: &Storage) -> Result<Mounted> {
    let (group, options) = take_group(storage)?;
    let kind = match storage.fstype.as_str() {
        "" => "tmpfs",
        kind => kind,
    };
    let pages = match kind {
        "hugetlbfs" => Some(HugePages::reserve(&options)?),
        _ => None,
    };
    let mounted = memory_filesystem(storage, kind, group, &options);
    match (mounted, pages) {
        (Ok(()), None) => Ok(Mounted::Mount(PathBuf::from(&storage.mount_point))),
        (Ok(()), Some(pages)) => Ok(Mounted::Huge(PathBuf::from(&storage.mount_point), pages)),
        (Err(error), pages) => {
            if let Some(pages) = pages {
                pages.give_back()?;
            }
            Err(error)
        }
    }
}

fn memory_filesystem(
    storage: &Storage,
    kind: &str,
    group: Option<Gid>,
    options: &[String],
) -> Result<()> {
    let options = MountOptions::parse(options)?;
    let mounted = mount::filesystem(kind, "", &options)?;
    if let Some(group) = group {
        give_to(&mounted, group, 0o2775)?;
    }
    let target = target(storage, Target::Directory)?;
    mount::attach(&mounted, target.as_fd(), &options)
}

/// A copy of a folder, kept equal to it; of what is no small folder, the thing itself.
fn watchable(storage: &Storage) -> Result<Mounted> {
    refuse_group(storage)?;
    let source = Path::new(&storage.source);
    if !source.is_dir() {
        return bind(storage);
    }
    let copy = match Watched::new(source) {
        Ok(copy) => Arc::new(copy),
        Err(Refusal::TooLarge) => {
            warn!(source = %source.display(), "too large for a copy: changes are seen, not told");
            return bind(storage);
        }
        Err(Refusal::Failed(error)) => return Err(error),
    };
    let options = MountOptions::parse(&storage.options)?;
    let attached = mount::bind(&copy.content(), &options).and_then(|mounted| {
        let target = target(storage, Target::Directory)?;
        mount::attach(&mounted, target.as_fd(), &options)
    });
    if let Err(error) = attached {
        copy.remove()?;
        return Err(error);
    }
    if !storage.driver_options.iter().any(|option| option == TOLD) {
        watched::look_again(&copy);
    }
    Ok(Mounted::Copy(PathBuf::from(&storage.mount_point), copy))
}

/// Gives an ephemeral storage that is mounted other options, such as a size.
///
/// # Errors
///
/// Another driver, a place that is no mount point, or the kernel's reason.
pub(super) fn remount(storage: &Storage) -> Result<()> {
    let named = |error: AgentError| {
        let line = format!("remount {:?}: {}", storage.mount_point, error.line());
        AgentError::new(error.kind(), line)
    };
    if storage.driver != "ephemeral" {
        return Err(named(AgentError::invalid(format!(
            "storage driver {:?} is not \"ephemeral\"",
            storage.driver
        ))));
    }
    let (_, options) = take_group(storage).map_err(named)?;
    let options = MountOptions::parse(&options).map_err(named)?;
    mount::reconfigure(Path::new(&storage.mount_point), &options).map_err(named)
}

/// A folder of the guest.
fn local(storage: &Storage) -> Result<Mounted> {
    let (group, options) = take_group(storage)?;
    let mut mode = None;
    for option in &options {
        match option.split_once('=') {
            Some(("mode", value)) => {
                mode = Some(
                    u32::from_str_radix(value, 8)
                        .map_err(|_| AgentError::invalid(format!("option {option:?}")))?,
                );
            }
            _ => return Err(AgentError::unsupported(format!("option {option:?}"))),
        }
    }
    // The folder was resolved without links; reopen it for fchmod, which O_PATH refuses.
    drop(target(storage, Target::Directory)?);
    let folder = openat2(
        CWD,
        storage.mount_point.as_str(),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )
    .context(|| "open")?;
    if let Some(mode) = mode {
        fchmod(&folder, Mode::from_raw_mode(mode)).context(|| "set mode")?;
    }
    if let Some(group) = group {
        give_to(&folder, group, mode.unwrap_or(0o775) | 0o2000)?;
    }
    Ok(Mounted::Folder)
}

fn bind(storage: &Storage) -> Result<Mounted> {
    let source = Path::new(&storage.source);
    let options = MountOptions::parse(&storage.options)?;
    let mounted = mount::bind(source, &options)?;
    give_group(storage, &mounted)?;
    let kind = if source.is_dir() {
        Target::Directory
    } else {
        Target::File
    };
    let target = target(storage, kind)?;
    mount::attach(&mounted, target.as_fd(), &options)?;
    Ok(Mounted::Mount(PathBuf::from(&storage.mount_point)))
}

fn overlay(storage: &Storage) -> Result<Mounted> {
    for option in &storage.driver_options {
        let Some(folder) = option.strip_prefix(CREATE_DIRECTORY) else {
            return Err(AgentError::unsupported(format!("driver option {option:?}")));
        };
        mount::create_beneath(Path::new(folder), Target::Directory)
            .context(|| format!("mkdir {folder:?}"))?;
    }
    let options: Vec<&String> = storage
        .options
        .iter()
        .filter(|option| *option != OVERLAY_READ_WRITE)
        .collect();
    attach(storage, "overlay", &MountOptions::parse(&options)?)
}

pub(super) fn target(storage: &Storage, kind: Target) -> Result<rustix::fd::OwnedFd> {
    mount::create_beneath(Path::new(&storage.mount_point), kind).context(|| "mount point")
}

/// Splits `fsgid=N` and the message's group from the other options.
fn take_group(storage: &Storage) -> Result<(Option<Gid>, Vec<String>)> {
    let mut group = storage
        .fs_group
        .as_ref()
        .map(|group| Gid::from_raw(group.group_id));
    let mut options = Vec::new();
    for option in &storage.options {
        match option.strip_prefix("fsgid=") {
            Some(value) => {
                let value = value
                    .parse()
                    .map_err(|_| AgentError::invalid(format!("option {option:?}")))?;
                group = Some(Gid::from_raw(value));
            }
            None => options.push(option.clone()),
        }
    }
    Ok((group, options))
}

/// A copy follows its folder, in whose owner too.
fn refuse_group(storage: &Storage) -> Result<()> {
    if storage.fs_group.is_some() {
        return Err(AgentError::new(
            Kind::Unsupported,
            "fs_group: a copy of a folder has the folder's groups",
        ));
    }
    Ok(())
}

/// Gives what is mounted to the group that the storage names, unless it may not be written.
pub(super) fn give_group(storage: &Storage, mounted: &rustix::fd::OwnedFd) -> Result<()> {
    let Some(group) = storage.fs_group.as_ref() else {
        return Ok(());
    };
    if has(storage, "ro") {
        return Ok(());
    }
    let root = openat(
        mounted,
        ".",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "open for fs_group")?;
    group::give(&root, group)
}

fn give_to(folder: &rustix::fd::OwnedFd, group: Gid, mode: u32) -> Result<()> {
    fchown(folder, None, Some(group)).context(|| "set group")?;
    fchmod(folder, Mode::from_raw_mode(mode)).context(|| "set mode")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(driver: &str, point: &str) -> Storage {
        Storage {
            driver: driver.to_owned(),
            mount_point: point.to_owned(),
            ..Storage::default()
        }
    }

    #[test]
    fn unknown_drivers_are_refused_by_name() {
        let error = mount(&storage("floppy", "/mnt")).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.line().contains("floppy"), "{}", error.line());
    }

    #[test]
    fn mount_points_are_absolute() {
        for point in ["", "x", "/"] {
            let error = mount(&storage("local", point)).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument);
        }
    }

    #[test]
    fn a_local_folder_gets_its_mode() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let point = folder.path().join("a/b");
        let mut wanted = storage("local", point.to_str().unwrap());
        wanted.options = vec!["mode=0777".to_owned()];
        mount(&wanted).unwrap();
        let mode = point.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o777);
    }
}
