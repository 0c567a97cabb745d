// SPDX-License-Identifier: Apache-2.0
//! What no library does safely: a network namespace of one's own, taps in it, and ranges of a disk
//! discarded or zeroed.

use std::fs::OpenOptions;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// `TUNSETIFF` of Linux's `if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// `BLKDISCARD` and `BLKZEROOUT` of Linux's `fs.h`.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// Gives this thread, and those that it starts, a network namespace of their own.
///
/// # Errors
/// The kernel refuses; it takes root.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: the descriptors stay shared; only the network namespace changes.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Makes a tap interface in the thread's network namespace and opens it `queues` times, with
/// `flags` (`IFF_VNET_HDR` and so on) beside those of every tap. It goes with its descriptors.
///
/// # Errors
/// The kernel refuses.
pub fn open_tap(name: &str, queues: usize, flags: i32) -> io::Result<Vec<OwnedFd>> {
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | several | flags;
    let mut taps = Vec::new();
    for _ in 0..queues {
        let tap = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: a `struct ifreq` is plain data: zeroes are one.
        let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
        // The last byte stays zero.
        let room = request.ifr_name.len().saturating_sub(1);
        for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or_default().cast_signed();
        // SAFETY: the kernel reads and writes a `struct ifreq`, which `request` is.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        taps.push(tap.into());
    }
    Ok(taps)
}

/// Discards `len` bytes of a block device from `start` on.
///
/// # Errors
/// The kernel refuses.
pub fn discard(device: &impl AsRawFd, start: u64, len: u64) -> io::Result<()> {
    clear(device, BLKDISCARD, [start, len])
}

/// Fills `len` bytes of a block device from `start` on with zeroes; it keeps their place.
///
/// # Errors
/// The kernel refuses.
pub fn zero_out(device: &impl AsRawFd, start: u64, len: u64) -> io::Result<()> {
    clear(device, BLKZEROOUT, [start, len])
}

fn clear(device: &impl AsRawFd, request: libc::c_ulong, range: [u64; 2]) -> io::Result<()> {
    // SAFETY: the kernel reads two 64-bit numbers, which `range` is.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, &raw const range) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
