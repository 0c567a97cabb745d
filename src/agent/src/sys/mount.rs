// SPDX-License-Identifier: Apache-2.0
//! `mount_setattr(2)`: attributes and propagation of mounts, by descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What to change on a mount.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub(crate) set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub(crate) clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0 to leave it.
    pub(crate) propagation: u64,
}

/// Changes the mount that `mount` is the root of; with `recursive`, the mounts below it too.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: Attributes,
    recursive: bool,
) -> io::Result<()> {
    let argument = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    change(mount, &argument, recursive)
}

/// Shows the owners of files as `user_namespace` maps them, on the detached mount that `mount` is
/// the root of; with `recursive`, on the mounts below it too.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn map_ids(
    mount: BorrowedFd<'_>,
    user_namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let argument = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(user_namespace.as_raw_fd().cast_unsigned()),
    };
    change(mount, &argument, recursive)
}

fn change(mount: BorrowedFd<'_>, argument: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a constant string; the kernel reads the argument of the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            core::ptr::from_ref(argument),
            size_of::<libc::mount_attr>(),
        )
    };
    super::check(result)?;
    Ok(())
}
