// SPDX-License-Identifier: Apache-2.0
//! What a process does to itself at start.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::signal;

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called before the process has opened anything of its own: no owner loses its
    // descriptor.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes the descriptor that the process was started with, if it is open.
pub(crate) fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: asks about a number, touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the process, at its start, has no other owner for it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }).into())
}

/// The signal that brings a vCPU thread out of KVM_RUN.
pub(crate) fn kick_signal() -> libc::c_int {
    signal::SIGRTMIN()
}

/// Gives the kick signal a handler that does nothing: it only interrupts a system call.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    signal::register_signal_handler(kick_signal(), nothing).map_err(io::Error::from)
}
