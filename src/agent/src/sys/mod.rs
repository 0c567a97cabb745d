// SPDX-License-Identifier: Apache-2.0
//! System calls that `rustix` does not have. All `unsafe` code of the agent is in this module.

pub(crate) mod bpf;
pub(crate) mod clone;
pub(crate) mod grow;
pub(crate) mod mount;
pub(crate) mod net;
pub(crate) mod port;
pub(crate) mod process;
pub(crate) mod random;
pub(crate) mod vsock;
pub(crate) mod watch;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// The result of a raw system call: -1 means `errno`.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes the descriptor that a system call has just returned.
///
/// # Safety
///
/// `result` must be a new descriptor that nothing else owns.
unsafe fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the caller says that the descriptor is new and not owned.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
