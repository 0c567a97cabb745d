// SPDX-License-Identifier: Apache-2.0
//! Detached mounts and where they go.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, fspick, move_mount, open_tree, unmount,
};

use super::{IdMap, MountOptions};
use crate::error::{AgentError, Context as _, Kind, Result};
use crate::sys;
use crate::sys::mount::{Attributes, set_attributes};

/// Where the pod's volumes and shared files are in the guest.
const OURS: &str = "/run/kata-containers";

/// Makes a detached mount of a new (or the kernel's only) file system of type `kind`.
///
/// # Errors
///
/// The kernel's reason, with what the file system itself had to say.
pub(crate) fn filesystem(kind: &str, source: &str, options: &MountOptions) -> Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
        .context(|| format!("file system type {kind:?}"))?;
    if !source.is_empty() {
        fsconfig_set_string(context.as_fd(), "source", source)
            .context(|| format!("source {source:?}"))?;
    }
    set_parameters(&context, options)?;
    fsconfig_create(context.as_fd())
        .map_err(|error| AgentError::io(format!("{kind}{}", complaint(&context)), error))?;
    // A new mount has none below it: "rro" is "ro" there.
    let attributes = options.attributes().set | options.recursive_attributes().set;
    let attributes = u32::try_from(attributes).unwrap_or_default();
    let mount = fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attributes),
    )
    .context(|| format!("mount attributes of {kind}"))?;
    Ok(mount)
}

fn set_parameters(context: &OwnedFd, options: &MountOptions) -> Result<()> {
    for (key, value) in &options.parameters {
        let set = match value {
            Some(value) => fsconfig_set_string(context.as_fd(), key.as_str(), value.as_str()),
            None => fsconfig_set_flag(context.as_fd(), key.as_str()),
        };
        set.map_err(|error| {
            AgentError::io(format!("option {key:?}{}", complaint(context)), error)
                .with_kind(Kind::InvalidArgument)
        })?;
    }
    Ok(())
}

/// Gives the file system that is mounted at `path` other parameters.
///
/// # Errors
///
/// A path through a link or that is no mount point; the kernel's reason.
pub(crate) fn reconfigure(path: &Path, options: &MountOptions) -> Result<()> {
    let root = openat2(
        CWD,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )
    .context(|| "open")?;
    set_new_parameters(root.as_fd(), options)
}

fn set_new_parameters(mount: BorrowedFd<'_>, options: &MountOptions) -> Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(mount, "", flags).context(|| "look at the mount")?;
    set_parameters(&context, options)?;
    fsconfig_reconfigure(context.as_fd())
        .map_err(|error| AgentError::io(format!("reconfigure{}", complaint(&context)), error))
}

/// Changes the mount that `mount` is the root of: attributes, propagation, and parameters of its
/// file system.
///
/// # Errors
///
/// The kernel's; EINVAL when it is no mount's root.
pub(crate) fn remount(mount: &OwnedFd, options: &MountOptions) -> Result<()> {
    if !options.parameters.is_empty() {
        set_new_parameters(mount.as_fd(), options)?;
    }
    change(mount, options.attributes(), false)?;
    change(mount, options.recursive_attributes(), true)?;
    propagate(mount, options)
}

/// Shows the owners of a detached mount's files as `user_namespace` maps them, if the options ask
/// for that: what is stored as 0 is seen as the id that 0 is mapped to.
///
/// # Errors
///
/// The kernel's; EINVAL for a file system that can't be shown so.
pub(crate) fn map_ids(
    mount: &OwnedFd,
    options: &MountOptions,
    user_namespace: BorrowedFd<'_>,
) -> Result<()> {
    let Some(id_map) = options.id_map else {
        return Ok(());
    };
    let recursive = id_map == IdMap::Recursive;
    sys::mount::map_ids(mount.as_fd(), user_namespace, recursive).context(|| "map ids")
}

/// Makes a detached copy of the mount at `source`, a path of this mount namespace.
///
/// # Errors
///
/// The kernel's reason.
pub(crate) fn bind(source: &Path, options: &MountOptions) -> Result<OwnedFd> {
    if let Some((key, _)) = options.parameters.first() {
        return Err(AgentError::invalid(format!(
            "option {key:?} has no meaning for a bind mount"
        )));
    }
    // What a container writes to may be part of a path there: a link must not lead it out.
    let resolve = if source.starts_with(OURS) {
        ResolveFlags::NO_SYMLINKS
    } else {
        ResolveFlags::NO_MAGICLINKS
    };
    let source_fd = openat2(
        CWD,
        source,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )
    .context(|| format!("source {source:?}"))?;
    let mount = clone_mount(source_fd.as_fd(), options.recursive_bind)
        .context(|| format!("source {source:?}"))?;
    change(&mount, options.attributes(), false)?;
    change(&mount, options.recursive_attributes(), true)?;
    Ok(mount)
}

/// A detached copy of the mount that `source` is in, with `source` as its root.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn clone_mount(
    source: BorrowedFd<'_>,
    recursive: bool,
) -> std::result::Result<OwnedFd, rustix::io::Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(source, "", flags)
}

/// Takes away what is mounted at `path`; who uses it keeps it until it is done.
///
/// # Errors
///
/// The kernel's, with the path.
pub(crate) fn detach(path: &Path) -> Result<()> {
    unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .context(|| format!("unmount {path:?}"))
}

/// Attaches `mount` on top of `target`, then gives it its propagation.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn attach(
    mount: &OwnedFd,
    target: BorrowedFd<'_>,
    options: &MountOptions,
) -> Result<()> {
    move_mount(
        mount.as_fd(),
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
    .context(|| "attach")?;
    propagate(mount, options)
}

fn propagate(mount: &OwnedFd, options: &MountOptions) -> Result<()> {
    for propagation in &options.propagation {
        let (attributes, recursive) = propagation.attributes();
        set_attributes(mount.as_fd(), attributes, recursive).context(|| "propagation")?;
    }
    Ok(())
}

fn change(mount: &OwnedFd, attributes: Attributes, recursive: bool) -> Result<()> {
    if attributes == Attributes::default() {
        return Ok(());
    }
    set_attributes(mount.as_fd(), attributes, recursive).context(|| "mount attributes")
}

/// What the file system wrote about a failure, such as "Unknown parameter".
fn complaint(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut buffer = [0; 512];
    while let Ok(length) = rustix::io::read(context, &mut buffer) {
        let line = buffer.get(..length).unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        // Each message starts with its level: "e ", "w " or "i ".
        let line = line.trim_end();
        text.push_str(": ");
        text.push_str(line.get(2..).unwrap_or(line));
        if text.len() > 1024 {
            break;
        }
    }
    text
}
