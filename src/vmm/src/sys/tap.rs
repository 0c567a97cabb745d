// SPDX-License-Identifier: Apache-2.0
//! What a tap is told by ioctl (Linux's `if_tun.h`).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

/// The type of the driver's ioctls.
const TUN: libc::c_uint = b'T' as libc::c_uint;

ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_ior_nr!(TUNGETIFF, TUN, 210, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);
ioctl_iow_nr!(TUNSETQUEUE, TUN, 217, libc::c_int);

/// The flags that the descriptor's interface was made with (`IFF_TAP` and so on).
pub(crate) fn flags(tap: &impl AsRawFd) -> io::Result<i32> {
    let mut request = request(0);
    // SAFETY: the kernel fills in a `struct ifreq`, which `request` is.
    let result = unsafe { ioctl_with_mut_ref(tap, TUNGETIFF(), &mut request) };
    check(result)?;
    // SAFETY: the union was zeroed and is plain data; TUNGETIFF fills in the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(u16::from_ne_bytes(flags.to_ne_bytes()).into())
}

/// Says which packets the reader takes as they are (`TUN_F_CSUM` and so on).
pub(crate) fn set_offloads(tap: &impl AsRawFd, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument is a number, not an address.
    check(unsafe { ioctl_with_val(tap, TUNSETOFFLOAD(), offloads.into()) })
}

/// Sets the size of the header before each packet.
pub(crate) fn set_header_size(tap: &impl AsRawFd, size: i32) -> io::Result<()> {
    // SAFETY: the kernel reads an `int`.
    check(unsafe { ioctl_with_ref(tap, TUNSETVNETHDRSZ(), &size) })
}

/// Attaches the descriptor to its interface's queues or detaches it; packets only come to
/// attached ones.
pub(crate) fn set_attached(tap: &impl AsRawFd, attached: bool) -> io::Result<()> {
    let request = request(if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    });
    // SAFETY: the kernel reads a `struct ifreq`, which `request` is.
    check(unsafe { ioctl_with_ref(tap, TUNSETQUEUE(), &request) })
}

fn request(flags: libc::c_int) -> libc::ifreq {
    // SAFETY: a `struct ifreq` is a name and a union of plain data: zeroes are one.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    request
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
