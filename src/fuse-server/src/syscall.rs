// SPDX-License-Identifier: Apache-2.0
//! System calls that no safe library offers: per-thread identity, and close(2) with its result. The
//! only unsafe code of the
//! crate.

use std::io::Error;
use std::os::fd::{IntoRawFd, OwnedFd};

use libc::{gid_t, uid_t};
use rustix::io::{Errno, Result};
use rustix::thread::UnshareFlags;

/// Gives the calling thread a working directory and umask of its own.
pub(crate) fn unshare_fs() -> Result<()> {
    // SAFETY: the flag concerns root, working directory and umask only; descriptors, which the
    // call's contract is about, stay shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

/// Sets the thread's user for file access and ownership.
///
/// # Errors
/// `PERM` if the thread may not become this user, or its user namespace doesn't know it.
pub(crate) fn set_fsuid(uid: uid_t) -> Result<()> {
    // SAFETY: takes a number and touches no memory.
    unsafe { libc::setfsuid(uid) };
    // The call reports no failure: it returns the user that was in effect before, so a second
    // call with a user that can't be tells whether the first one worked.
    // SAFETY: as above.
    let now = unsafe { libc::setfsuid(uid_t::MAX) };
    if now.cast_unsigned() == uid {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

/// Sets the thread's group for file access and ownership.
///
/// # Errors
/// As for `set_fsuid`.
pub(crate) fn set_fsgid(gid: gid_t) -> Result<()> {
    // SAFETY: takes a number and touches no memory.
    unsafe { libc::setfsgid(gid) };
    // SAFETY: as above.
    let now = unsafe { libc::setfsgid(gid_t::MAX) };
    if now.cast_unsigned() == gid {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

/// Closes a descriptor and says what the file system had to say about it.
pub(crate) fn close(file: OwnedFd) -> Result<()> {
    let file = file.into_raw_fd();
    // SAFETY: the descriptor was owned and is nobody's now.
    if unsafe { libc::close(file) } == 0 {
        return Ok(());
    }
    let errno = Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    Err(Errno::from_raw_os_error(errno))
}
