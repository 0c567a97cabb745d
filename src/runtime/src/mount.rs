// SPDX-License-Identifier: Apache-2.0
//! Mounts on the host, as snapshotters and the OCI specification describe them.
//!
//! All of them are made in the shim's own mount namespace, so that they end with the process,
//! however it ends.

mod layers;

use std::path::{Path, PathBuf};
use std::{env, io, thread};

use protocols::containerd::mount::Mount;
use rustix::fs::{CWD, StatFs};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

pub(crate) use self::layers::mount_layers;
use crate::error::{Context, Kind, Result, ShimError};
use crate::raw;

/// `mount(2)` takes one page of options, the terminator included.
const OPTIONS_LIMIT: usize = 4096;

/// `statfs(2)`: a tmpfs.
pub(crate) const TMPFS_MAGIC: i64 = 0x0102_1994;

/// The size of a file system, in bytes.
pub(crate) fn size(held: &StatFs) -> u64 {
    held.f_blocks
        .saturating_mul(u64::try_from(held.f_bsize).unwrap_or(0))
}

/// fstab-style options, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// A bind mount, and whether with the mounts below it.
    bind: Option<Tree>,
    flags: MountFlags,
    /// What only the file system itself understands.
    data: Vec<String>,
}

/// How much of a tree a bind mount takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Tree {
    Single,
    Recursive,
}

impl Options {
    fn without_devices(mut self) -> Self {
        self.flags |= MountFlags::NODEV;
        self
    }

    /// The flags that containerd knows, with the same names; the rest is the file system's.
    pub(crate) fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self {
            bind: None,
            flags: MountFlags::empty(),
            data: Vec::new(),
        };
        for option in options {
            let (flag, set) = match option.as_str() {
                "bind" => {
                    parsed.bind.get_or_insert(Tree::Single);
                    continue;
                }
                "rbind" => {
                    parsed.bind = Some(Tree::Recursive);
                    continue;
                }
                "defaults" => continue,
                "loop" => {
                    return Err(ShimError::new(
                        Kind::Unimplemented,
                        "mount option loop: loop devices are not supported",
                    ));
                }
                "async" => (MountFlags::SYNCHRONOUS, false),
                "atime" => (MountFlags::NOATIME, false),
                "dev" => (MountFlags::NODEV, false),
                "diratime" => (MountFlags::NODIRATIME, false),
                "dirsync" => (MountFlags::DIRSYNC, true),
                "exec" => (MountFlags::NOEXEC, false),
                "mand" => (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, true),
                "noatime" => (MountFlags::NOATIME, true),
                "nodev" => (MountFlags::NODEV, true),
                "nodiratime" => (MountFlags::NODIRATIME, true),
                "noexec" => (MountFlags::NOEXEC, true),
                "nomand" => (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, false),
                "norelatime" => (MountFlags::RELATIME, false),
                "nostrictatime" => (MountFlags::STRICTATIME, false),
                "nosuid" => (MountFlags::NOSUID, true),
                "relatime" => (MountFlags::RELATIME, true),
                "remount" => continue,
                "ro" => (MountFlags::RDONLY, true),
                "rw" => (MountFlags::RDONLY, false),
                "strictatime" => (MountFlags::STRICTATIME, true),
                "suid" => (MountFlags::NOSUID, false),
                "sync" => (MountFlags::SYNCHRONOUS, true),
                data => {
                    parsed.data.push(data.to_owned());
                    continue;
                }
            };
            parsed.flags.set(flag, set);
        }
        Ok(parsed)
    }
}

/// Makes a snapshotter's mounts, in order, at `target`.
pub(crate) fn mount_all(mounts: &[Mount], target: &Path) -> Result<()> {
    mounts.iter().try_for_each(|mount| mount_one(mount, target))
}

fn mount_one(description: &Mount, target: &Path) -> Result<()> {
    let target = beneath(target, &description.target)?;
    let options = Options::parse(&description.options)?;
    match options.bind {
        Some(tree) => {
            let read_only = options.flags.contains(MountFlags::RDONLY);
            bind(
                Path::new(&description.source),
                &target,
                tree,
                read_only.then_some(Tree::Single),
                false,
            )
        }
        // The guest may make device nodes where the host opens none (the file server looks for
        // that): in a snapshot, which is nobody's but the container's.
        None => mount_filesystem(description, options.without_devices(), &target),
    }
}

/// Binds `source` to `target`. The mount is made read-only, alone or with all below it, and private, so
/// that it doesn't follow what is mounted in `source` later, before it can be seen at the target.
pub(crate) fn bind(
    source: &Path,
    target: &Path,
    tree: Tree,
    read_only: Option<Tree>,
    private: bool,
) -> Result<()> {
    let context = || format!("bind {} to {}", source.display(), target.display());
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if tree == Tree::Recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let mount = rustix::mount::open_tree(CWD, source, flags).internal(context)?;
    if let Some(depth) = read_only {
        raw::set_mount_attributes(&mount, raw::READ_ONLY, depth == Tree::Recursive)
            .internal(context)?;
    }
    if private {
        raw::make_mount_private(&mount).internal(context)?;
    }
    rustix::mount::move_mount(
        &mount,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .internal(context)
}

/// Takes a mount away; what still uses it keeps it until it is done.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    Ok(())
}

fn mount_filesystem(description: &Mount, options: Options, target: &Path) -> Result<()> {
    let (folder, data) = shorten(options.data)?;
    let mount = || {
        rustix::mount::mount(
            description.source.as_str(),
            target,
            description.type_.as_str(),
            options.flags,
            Some(data.as_c_str()),
        )
        .map_err(io::Error::from)
    };
    let result = match folder {
        None => mount(),
        // Relative names need the working directory, which belongs to the process unless a
        // thread asks for its own.
        Some(folder) => thread::scope(|scope| {
            scope
                .spawn(|| {
                    raw::own_working_directory()?;
                    env::set_current_dir(folder)?;
                    mount()
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
        }),
    };
    result.internal(|| format!("mount {} at {}", description.type_, target.display()))
}

/// Joins options to the string that `mount(2)` takes. Many layers don't fit into its page with
/// their whole paths; then the lower directories become relative to a folder that all share,
/// which must be the working directory of the call.
fn shorten(mut data: Vec<String>) -> Result<(Option<PathBuf>, std::ffi::CString)> {
    let mut folder = None;
    if length(&data) >= OPTIONS_LIMIT
        && let Some(lower) = data.iter_mut().find(|option| option.starts_with("lowerdir="))
        // An escaped colon is part of a name.
        && !lower.contains('\\')
    {
        let layers: Vec<&Path> = lower
            .trim_start_matches("lowerdir=")
            .split(':')
            .map(Path::new)
            .collect();
        if let Some(common) = common_folder(&layers) {
            let relative: Vec<_> = layers
                .iter()
                .filter_map(|layer| layer.strip_prefix(&common).ok()?.to_str())
                .collect();
            *lower = format!("lowerdir={}", relative.join(":"));
            folder = Some(common);
        }
    }
    if length(&data) >= OPTIONS_LIMIT {
        return Err(ShimError::new(
            Kind::InvalidArgument,
            format!(
                "mount options of {} bytes: the kernel takes 4095",
                length(&data)
            ),
        ));
    }
    let data = std::ffi::CString::new(data.join(","))
        .context(Kind::InvalidArgument, || "mount options".to_owned())?;
    Ok((folder, data))
}

/// The length of options joined by commas.
fn length(data: &[String]) -> usize {
    data.iter()
        .map(String::len)
        .sum::<usize>()
        .saturating_add(data.len().saturating_sub(1))
}

/// The deepest folder that holds all of the paths, if they are absolute.
fn common_folder(paths: &[&Path]) -> Option<PathBuf> {
    let (first, rest) = paths.split_first()?;
    let mut common = first.parent()?.to_owned();
    for path in rest {
        while !path.parent()?.starts_with(&common) {
            if !common.pop() {
                return None;
            }
        }
    }
    common.is_absolute().then_some(common)
}

/// A mount's own target: a folder below the root file system, or that itself.
fn beneath(root: &Path, target: &str) -> Result<PathBuf> {
    let relative = Path::new(target.trim_start_matches('/'));
    let plain = relative
        .components()
        .all(|component| matches!(component, std::path::Component::Normal(_)));
    if !plain {
        return Err(ShimError::new(
            Kind::InvalidArgument,
            format!("mount target {target:?} leaves the root file system"),
        ));
    }
    Ok(root.join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn options_are_flags_or_the_file_system_s() {
        let parsed =
            Options::parse(&strings(&["ro", "nosuid", "index=off", "rw", "rbind"])).unwrap();
        assert_eq!(parsed.flags, MountFlags::NOSUID);
        assert_eq!(parsed.data, ["index=off"]);
        assert_eq!(parsed.bind, Some(Tree::Recursive));
        let error = Options::parse(&strings(&["loop"])).unwrap_err();
        assert_eq!(error.kind(), Kind::Unimplemented);
    }

    #[test]
    fn few_layers_keep_their_paths() {
        let data = strings(&["lowerdir=/s/1/fs:/s/2/fs", "upperdir=/s/3/fs"]);
        let (folder, text) = shorten(data).unwrap();
        assert_eq!(folder, None);
        assert_eq!(
            text.to_str().unwrap(),
            "lowerdir=/s/1/fs:/s/2/fs,upperdir=/s/3/fs"
        );
    }

    #[test]
    fn many_layers_become_relative() {
        let root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let layers: Vec<_> = (0..120).map(|layer| format!("{root}/{layer}/fs")).collect();
        let data = vec![
            format!("lowerdir={}", layers.join(":")),
            format!("upperdir={root}/200/fs"),
        ];
        let (folder, text) = shorten(data).unwrap();
        assert_eq!(folder.as_deref(), Some(Path::new(root)));
        let text = text.to_str().unwrap();
        assert!(text.starts_with("lowerdir=0/fs:1/fs:2/fs:"), "{text}");
        assert!(
            text.ends_with(&format!("119/fs,upperdir={root}/200/fs")),
            "{text}"
        );
        assert!(text.len() < OPTIONS_LIMIT);
    }

    #[test]
    fn too_many_options_are_an_error_not_a_cut() {
        let error = shorten(vec!["x".repeat(OPTIONS_LIMIT)]).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
    }

    #[test]
    fn a_target_stays_below_its_root() {
        let root = Path::new("/share/rootfs");
        assert_eq!(beneath(root, "").unwrap(), root);
        assert_eq!(beneath(root, "/data").unwrap(), root.join("data"));
        assert!(beneath(root, "../../etc").is_err());
    }
}
