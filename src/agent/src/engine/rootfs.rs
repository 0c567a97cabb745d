// SPDX-License-Identifier: Apache-2.0
//! The container's file system: its root, its mounts and devices, and the way in.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{chdir, fchdir, pivot_root};

use super::devices;
use super::plan::{MountPlan, RootfsPlan};
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};
use crate::sys::mount::{Attributes, set_attributes};

/// Builds the root in this mount namespace, which is the container's own. The descriptor is the
/// root folder; everything else is resolved from it.
///
/// # Errors
///
/// The first step that failed, with its path.
pub(crate) fn build(plan: &RootfsPlan) -> Result<OwnedFd> {
    // Nothing that is mounted from here on may appear in the agent's namespace.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(|| "leave the propagation of mounts")?;
    let root = attach_root(&plan.path)?;
    for entry in &plan.mounts {
        mount_one(root.as_fd(), entry).map_err(|error| {
            let line = format!(
                "mount {:?} on {:?}: {}",
                if entry.source.is_empty() {
                    &entry.kind
                } else {
                    &entry.source
                },
                entry.destination,
                error.line()
            );
            AgentError::new(error.kind(), line)
        })?;
    }
    // A /dev of the guest or of the runtime is left as it is.
    let dev = Path::new("/dev");
    let foreign = |entry: &MountPlan| entry.options.bind && entry.destination == dev;
    if !plan.mounts.iter().any(foreign) {
        devices::create(root.as_fd(), &plan.devices)?;
    }
    Ok(root)
}

/// Makes `root` the root of this process and of the mount namespace.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn enter(root: &OwnedFd, plan: &RootfsPlan) -> Result<()> {
    let context = || format!("change root to {:?}", plan.path);
    // The old root ends up on top of the new one, from where it can be unmounted without a folder
    // to put it in.
    let old = openat(
        CWD,
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(context)?;
    fchdir(root).context(context)?;
    pivot_root(".", ".").context(context)?;
    fchdir(&old).context(context)?;
    // Unmounting must not reach the agent's namespace, which it came from.
    mount_change(
        ".",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(context)?;
    unmount(".", UnmountFlags::DETACH).context(context)?;
    chdir("/").context(context)?;

    if let Some(propagation) = plan.propagation {
        let (attributes, recursive) = propagation.attributes();
        set_attributes(root.as_fd(), attributes, recursive)
            .context(|| "set the root's propagation")?;
    }
    if plan.readonly {
        let attributes = Attributes {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Attributes::default()
        };
        set_attributes(root.as_fd(), attributes, false).context(|| "make the root read-only")?;
    }
    Ok(())
}

/// The root folder as a mount of its own, as `pivot_root(2)` and a read-only root need it.
fn attach_root(path: &Path) -> Result<OwnedFd> {
    let failed =
        |error: AgentError| AgentError::new(error.kind(), format!("rootfs: {}", error.line()));
    let options = MountOptions::parse(&["rbind"])?;
    let root = mount::bind(path, &options).map_err(failed)?;
    let status = fstat(&root).context(|| format!("rootfs {path:?}"))?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Directory {
        return Err(AgentError::invalid(format!(
            "rootfs {path:?}: not a directory"
        )));
    }
    let target = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("rootfs {path:?}"))?;
    mount::attach(&root, target.as_fd(), &options).map_err(failed)?;
    Ok(root)
}

fn mount_one(root: BorrowedFd<'_>, entry: &MountPlan) -> Result<()> {
    let (mount, target) = if entry.options.bind {
        let mount = mount::bind(&PathBuf::from(&entry.source), &entry.options)?;
        let status = fstat(&mount).context(|| "look at the source")?;
        match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => (mount, Target::Directory),
            _ => (mount, Target::File),
        }
    } else {
        // cgroup v2 is all there is; specs ask for it by either name.
        let kind = match entry.kind.as_str() {
            "cgroup" => "cgroup2",
            kind => kind,
        };
        let source = if entry.source.is_empty() {
            kind
        } else {
            &entry.source
        };
        (
            mount::filesystem(kind, source, &entry.options)?,
            Target::Directory,
        )
    };
    let destination = mount::create_in_root(root, &entry.destination, target)
        .context(|| "make the mount point")?;
    if matches!(entry.kind.as_str(), "proc" | "sysfs") && !entry.options.bind {
        stays_in_place(root, entry)?;
    }
    mount::attach(&mount, destination.as_fd(), &entry.options)
}

/// A link in place of /proc or /sys would carry the kernel's files past the masks that are laid
/// over them by name (CVE-2019-19921).
fn stays_in_place(root: BorrowedFd<'_>, entry: &MountPlan) -> Result<()> {
    match mount::is_linked(root, &entry.destination) {
        Ok(false) => Ok(()),
        Ok(true) => Err(AgentError::precondition("the mount point is behind a link")),
        Err(error) => Err(AgentError::io("look at the mount point", error)),
    }
}
