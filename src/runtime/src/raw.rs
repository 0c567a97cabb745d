// SPDX-License-Identifier: Apache-2.0
//! The system calls that have no safe wrapper.
#![expect(unsafe_code, reason = "the one module of the crate that may")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread, and every thread it starts from here on, a mount namespace of its
/// own.
pub(crate) fn own_mount_namespace() -> io::Result<()> {
    // SAFETY: the call is unsafe for CLONE_FILES only, which would split the table of open files.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    Ok(())
}

/// Gives the calling thread a working directory of its own.
pub(crate) fn own_working_directory() -> io::Result<()> {
    // SAFETY: the call is unsafe for CLONE_FILES only, which would split the table of open files.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    Ok(())
}

/// `MOUNT_ATTR_RDONLY`.
pub(crate) const READ_ONLY: u64 = 1;

/// The kernel's `struct mount_attr` in its first version.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// `mount_setattr(2)` on an open mount: sets attributes (`MOUNT_ATTR_*`) there and, if asked, on
/// every mount below it.
pub(crate) fn set_mount_attributes(mount: impl AsFd, set: u64, recursive: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        set,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a terminated string, and the kernel only reads as many bytes of the
    // structure as the last argument says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
