// SPDX-License-Identifier: Apache-2.0
//! A root file system of several disks: EROFS layers below a writable one, joined by an overlay.
//! A request names each as a storage of its own; words of their options say which is which.

use std::os::fd::AsFd as _;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use protocols::agent::agent::Storage;
use tracing::warn;

use super::Wanted;
use super::disk;
use super::driver::{Mounted, has, named};
use crate::disk::{Disk, Transport};
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};

/// The driver of each of them.
pub(super) const DRIVER: &str = "erofs.multi-layer";
/// Options that say that a storage is one of several, and which.
const ONE_OF_SEVERAL: &str = "X-kata.multi-layer=true";
const UPPER: &str = "X-kata.overlay-upper";
const LOWER: &str = "X-kata.overlay-lower";
/// A folder to make on the writable one, whose root is [`ROOT`].
const MAKE: &str = "X-kata.mkdir.path=";
const ROOT: &str = "{{ mount 0 }}";
/// EROFS's option for a disk that holds content of its files. A disk is named as the layer's own is.
const BLOB: &str = "device=";
/// All options of the runtime's own begin so.
const MARK: &str = "X-kata.";

/// Where layers are mounted, a number each overlay.
const FOLDER: &str = "/run/kata-containers/layers";
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// An overlay, and what it is made of in the order of mounting.
#[derive(Debug)]
pub(crate) struct Layers {
    point: PathBuf,
    disks: Vec<Mounted>,
    folder: PathBuf,
}

fn is_layer(storage: &Storage) -> bool {
    storage.driver == DRIVER || has(storage, ONE_OF_SEVERAL)
}

fn is_upper(storage: &Storage) -> bool {
    has(storage, UPPER) || (!has(storage, LOWER) && storage.fstype != "erofs")
}

/// Puts the nodes of the disks that a layer's files have their content on, once they are there, in place
/// of what says where they are.
///
/// # Errors
///
/// Where no disk can be, or none is in time.
pub(super) async fn find_blobs(layer: &mut Storage, patience: Duration) -> Result<()> {
    for option in &mut layer.options {
        if let Some(place) = option.strip_prefix(BLOB) {
            let disk = Disk::await_at(Transport::Pci, place, patience).await?;
            *option = format!("{BLOB}{}", disk.path.display());
        }
    }
    Ok(())
}

/// Joins the layers among `storages` to one, in the place of the first of them.
///
/// # Errors
///
/// Layers without, or with more than, one that may be written; none that may not.
pub(super) fn group(storages: Vec<Storage>) -> Result<Vec<Wanted>> {
    let place = storages.iter().position(is_layer);
    let (layers, others): (Vec<_>, Vec<_>) = storages.into_iter().partition(is_layer);
    let mut wanted: Vec<_> = others.into_iter().map(Wanted::One).collect();
    let Some(place) = place else {
        return Ok(wanted);
    };
    let (mut ordered, lower): (Vec<_>, Vec<_>) = layers.into_iter().partition(is_upper);
    if ordered.len() != 1 || lower.is_empty() {
        return Err(AgentError::invalid(format!(
            "storage {DRIVER:?}: {} writable and {} read-only layers, where there must be one and \
             at least one",
            ordered.len(),
            lower.len()
        )));
    }
    ordered.extend(lower);
    // What comes before the first layer is mounted before it.
    wanted.insert(place.min(wanted.len()), Wanted::Layers(ordered));
    Ok(wanted)
}

/// Mounts `storages`, of which the first may be written, and the overlay of them. Where that fails,
/// nothing stays.
///
/// # Errors
///
/// The first that can't be mounted, by name.
pub(super) fn mount(storages: &[Storage]) -> Result<Mounted> {
    let (upper, lower) = storages
        .split_first()
        .ok_or_else(|| AgentError::invalid("no layers"))?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut layers = Layers {
        point: PathBuf::from(&upper.mount_point),
        disks: Vec::new(),
        folder: PathBuf::from(format!("{FOLDER}/{number}")),
    };
    match layers.mount(upper, lower) {
        Ok(()) => Ok(Mounted::Layers(layers)),
        Err(error) => {
            if let Err(error) = layers.unmount_disks() {
                warn!(error = error.line(), "layer stays");
            }
            Err(named(upper, &error))
        }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

impl Layers {
    fn mount(&mut self, upper: &Storage, lower: &[Storage]) -> Result<()> {
        if !self.point.is_absolute() || self.point == Path::new("/") {
            return Err(AgentError::invalid("the mount point is not below /"));
        }
        let writable = self.mount_disk(upper, "upper", false)?;
        for option in &upper.options {
            if let Some(words) = option.strip_prefix(MAKE) {
                make(&beneath(&writable, words)?)?;
            }
        }
        let mut folders = Vec::new();
        for (index, storage) in lower.iter().enumerate() {
            folders.push(self.mount_disk(storage, &format!("lower-{index}"), true)?);
        }
        let (upper, work) = (writable.join("upper"), writable.join("work"));
        make(&upper)?;
        make(&work)?;
        // Each by itself: together they may be longer than a parameter.
        let each = folders.iter().map(|folder| ("lowerdir+", text(folder)));
        let overlay = |lower: Vec<(&str, String)>| {
            let mut options = MountOptions::default();
            let rest = [("upperdir", text(&upper)), ("workdir", text(&work))];
            for (key, value) in lower.into_iter().chain(rest) {
                options.parameters.push((key.to_owned(), Some(value)));
            }
            mount::filesystem("overlay", "overlay", &options)
        };
        let mounted = overlay(each.collect()).or_else(|error| {
            // Kernels before 6.7 take them as one. No path of ours has a colon.
            let all: Vec<_> = folders.iter().map(|folder| text(folder)).collect();
            overlay(vec![("lowerdir", all.join(":"))]).map_err(|_| error)
        })?;
        let target =
            mount::create_beneath(&self.point, Target::Directory).context(|| "mount point")?;
        mount::attach(&mounted, target.as_fd(), &MountOptions::default())
    }

    /// Mounts one layer, below the overlay's own folder; the result is where.
    fn mount_disk(&mut self, storage: &Storage, name: &str, read_only: bool) -> Result<PathBuf> {
        let point = self.folder.join(name);
        let mut own = storage.clone();
        own.mount_point = point.display().to_string();
        for option in &storage.options {
            let known = option == ONE_OF_SEVERAL
                || option == UPPER
                || option == LOWER
                || (!read_only && option.starts_with(MAKE));
            if option.starts_with(MARK) && !known {
                return Err(AgentError::unsupported(format!("option {option:?}")));
            }
        }
        own.options.retain(|option| !option.starts_with(MARK));
        if read_only && !has(&own, "ro") {
            own.options.push("ro".to_owned());
        }
        let mounted = disk::mount(&own).map_err(|error| {
            let line = format!("layer {:?}: {}", storage.source, error.line());
            AgentError::new(error.kind(), line)
        })?;
        self.disks.push(mounted);
        Ok(point)
    }

    fn unmount_disks(&mut self) -> Result<()> {
        let mut done = Ok(());
        while let Some(disk) = self.disks.pop() {
            done = disk.unmount().and(done);
        }
        // Empty mount points; what is not empty is not removed.
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        for entry in entries.flatten() {
            let _ = std::fs::remove_dir(entry.path());
        }
        let _ = std::fs::remove_dir(&self.folder);
        done
    }

    /// Takes the overlay away, then its layers, the last mounted first.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn unmount(mut self) -> Result<()> {
        let overlay = mount::detach(&self.point);
        let disks = self.unmount_disks();
        overlay.and(disks)
    }
}

/// The folder that `{{ mount 0 }}/PATH[:...]` means, where the writable layer is at `root`.
fn beneath(root: &Path, words: &str) -> Result<PathBuf> {
    let path = words.split(':').next().unwrap_or_default();
    let inside = path
        .strip_prefix(ROOT)
        .map(|path| Path::new(path.trim_start_matches('/')));
    let plain = |path: &&Path| {
        let mut parts = path.components();
        parts.all(|part| matches!(part, Component::Normal(_)))
    };
    inside
        .filter(plain)
        .map(|path| root.join(path))
        .ok_or_else(|| {
            AgentError::invalid(format!("{MAKE}{words}: not a folder of the writable layer"))
        })
}

fn make(path: &Path) -> Result<()> {
    mount::create_beneath(path, Target::Directory)
        .map(drop)
        .context(|| format!("mkdir {path:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(source: &str, fstype: &str, options: &[&str]) -> Storage {
        Storage {
            driver: DRIVER.to_owned(),
            source: source.to_owned(),
            fstype: fstype.to_owned(),
            options: options.iter().map(|word| (*word).to_owned()).collect(),
            mount_point: "/root".to_owned(),
            ..Storage::default()
        }
    }

    #[test]
    fn layers_become_one_with_the_writable_first() {
        let mut other = storage("x", "tmpfs", &[]);
        other.driver = "ephemeral".to_owned();
        let wanted = group(vec![
            other,
            storage("b", "erofs", &[LOWER]),
            storage("a", "ext4", &[UPPER]),
            storage("c", "erofs", &[ONE_OF_SEVERAL]),
        ])
        .unwrap();
        let [Wanted::One(_), Wanted::Layers(layers)] = wanted.as_slice() else {
            panic!("{wanted:?}");
        };
        let sources: Vec<_> = layers.iter().map(|it| it.source.as_str()).collect();
        assert_eq!(sources, ["a", "b", "c"]);
        assert_eq!(wanted[1].mount_point(), "/root");
    }

    #[test]
    fn an_overlay_needs_both_kinds() {
        for wrong in [
            vec![storage("a", "ext4", &[UPPER])],
            vec![storage("b", "erofs", &[LOWER])],
            vec![
                storage("a", "ext4", &[UPPER]),
                storage("b", "ext4", &[UPPER]),
                storage("c", "erofs", &[LOWER]),
            ],
        ] {
            let line = group(wrong).unwrap_err().line();
            assert!(line.contains("layers"), "{line}");
        }
    }

    #[test]
    fn folders_are_made_on_the_writable_layer_only() {
        let root = Path::new("/r");
        let made = |words| beneath(root, words).ok();
        assert_eq!(made("{{ mount 0 }}/a/b:0755"), Some(root.join("a/b")));
        for wrong in ["/a", "{{ mount 1 }}/a", "{{ mount 0 }}/../a", ""] {
            assert_eq!(made(wrong), None, "{wrong}");
        }
    }
}
