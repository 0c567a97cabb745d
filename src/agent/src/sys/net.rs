// SPDX-License-Identifier: Apache-2.0
//! Brings the loopback interface of the current network namespace up.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Sets `lo` up; the kernel then gives it 127.0.0.1 and ::1 by itself.
///
/// # Errors
///
/// The kernel's, when there is no IPv4 or no right to change the interface.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_up(&socket)
}

fn set_up(socket: &OwnedFd) -> io::Result<()> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: UP },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = (*from).cast_signed();
    }
    // SAFETY: SIOCSIFFLAGS reads one `ifreq`, which lives through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    super::check(result.into())?;
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "0x41 fits")]
const UP: libc::c_short = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
