// SPDX-License-Identifier: Apache-2.0
//! The guest's own file systems.

use std::ffi::CString;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};

use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::error::{AgentError, Context as _, Result};

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const NO_DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NO_PROGRAMS: MountFlags = NO_DEVICES.union(MountFlags::NOEXEC);

/// In order. The image has the folders of the first level, the file systems the others.
const MOUNTS: [Mount; 7] = [
    Mount {
        kind: "sysfs",
        target: "/sys",
        flags: NO_PROGRAMS,
        data: "",
    },
    // `nsdelegate`: a container can't raise its own limits through its cgroup namespace.
    Mount {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: NO_PROGRAMS,
        data: "nsdelegate,memory_recursiveprot",
    },
    Mount {
        kind: "devtmpfs",
        target: "/dev",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: "mode=755",
    },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: "gid=5,mode=620,ptmxmode=666",
    },
    Mount {
        kind: "tmpfs",
        target: "/dev/shm",
        flags: NO_PROGRAMS,
        data: "mode=1777",
    },
    Mount {
        kind: "tmpfs",
        target: "/run",
        flags: NO_DEVICES,
        data: "mode=755",
    },
    Mount {
        kind: "tmpfs",
        target: "/tmp",
        flags: NO_DEVICES,
        data: "mode=1777",
    },
];

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts `/proc`, which everything else needs.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn proc() -> Result<()> {
    mount(&Mount {
        kind: "proc",
        target: "/proc",
        flags: NO_PROGRAMS,
        data: "",
    })
}

/// Mounts `/dev`, for the last words of a boot that failed early.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn devices() -> Result<()> {
    MOUNTS
        .iter()
        .filter(|entry| entry.kind == "devtmpfs")
        .try_for_each(mount)
}

/// Mounts all others and makes the usual links of `/dev`.
///
/// # Errors
///
/// The kernel's, with the mount's name.
pub(crate) fn all() -> Result<()> {
    for entry in &MOUNTS {
        if let Err(error) = DirBuilder::new().mode(0o755).create(entry.target)
            && !matches!(
                error.kind(),
                io::ErrorKind::AlreadyExists | io::ErrorKind::ReadOnlyFilesystem
            )
        {
            return Err(AgentError::io(format!("mkdir {}", entry.target), error));
        }
        mount(entry)?;
    }
    for (target, link) in LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(AgentError::io(format!("symlink {link}"), error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn mount(entry: &Mount) -> Result<()> {
    let Mount {
        kind,
        target,
        flags,
        data,
    } = entry;
    let data = CString::new(*data).unwrap_or_default();
    match rustix::mount::mount(*kind, *target, *kind, *flags, data.as_c_str()) {
        // The kernel may have mounted devtmpfs already (CONFIG_DEVTMPFS_MOUNT).
        Err(Errno::BUSY) => Ok(()),
        other => other.context(|| format!("mount {kind} on {target}")),
    }
}
