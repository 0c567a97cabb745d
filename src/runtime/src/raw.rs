// SPDX-License-Identifier: Apache-2.0
//! The system calls that have no safe wrapper.
#![expect(unsafe_code, reason = "the one module of the crate that may")]

pub(crate) mod bpf;
pub(crate) mod loops;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Sets attributes (`MOUNT_ATTR_*`) of an open mount and, if asked, of every mount below it.
pub(crate) fn set_mount_attributes(mount: impl AsFd, set: u64, recursive: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        set,
        ..MountAttributes::default()
    };
    change_mount(mount, &attributes, recursive)
}

/// Cuts an open mount, with all below it, off from what happens to other mounts.
pub(crate) fn make_mount_private(mount: impl AsFd) -> io::Result<()> {
    let attributes = MountAttributes {
        propagation: libc::MS_PRIVATE,
        ..MountAttributes::default()
    };
    change_mount(mount, &attributes, true)
}

/// `mount_setattr(2)`.
fn change_mount(mount: impl AsFd, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a terminated string, and the kernel only reads as many bytes of the
    // structure as the last argument says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of_val(attributes),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the calling thread, and every thread it starts from here on, a network namespace of its
/// own, with nothing but a loopback interface that is down.
pub(crate) fn own_network_namespace() -> io::Result<()> {
    // SAFETY: the call is unsafe for CLONE_FILES only, which would split the table of open files.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// The part of the kernel's `struct ifreq` that `TUNSETIFF` uses, and its size.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    unused: [u8; 22],
}

/// `TUNSETIFF`: makes a tap of this name in the namespace in which `tun` was opened, or attaches
/// `tun` to it, as `flags` (`IFF_*`) say.
pub(crate) fn attach_tap(tun: impl AsFd, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: u16::try_from(flags).map_err(io::Error::other)?,
        unused: [0; 22],
    };
    // The last byte stays zero.
    let room = request.name.len().saturating_sub(1);
    let bytes = name.as_bytes();
    match request.name.get_mut(..bytes.len().min(room)) {
        Some(field) if field.len() == bytes.len() => field.copy_from_slice(bytes),
        _ => return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG)),
    }
    // SAFETY: the argument points to as many bytes as the kernel's `struct ifreq` has, which it
    // reads and writes during the call.
    let result = unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `TUNSETIFINDEX`: the number that the interface will have which this file makes.
pub(crate) fn set_tap_index(tun: impl AsFd, index: u32) -> io::Result<()> {
    // SAFETY: the argument points to an integer that the kernel only reads.
    let result = unsafe {
        libc::ioctl(
            tun.as_fd().as_raw_fd(),
            libc::TUNSETIFINDEX,
            &raw const index,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the runtime wait until a file is readable.
pub(crate) fn await_readable(file: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the file is owned by what is returned, and nobody closes or replaces it before.
    let registered = unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) };
    Ok(registered?)
}
