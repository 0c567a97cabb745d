// SPDX-License-Identifier: Apache-2.0
//! Descriptors watched by the event loop.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches a non-blocking descriptor.
///
/// # Errors
///
/// The kernel's, when the descriptor can't be polled.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps the same open descriptor for as long as it lives, and the
    // registration ends before it is dropped.
    let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(watched?)
}
