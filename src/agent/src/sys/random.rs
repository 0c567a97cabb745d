// SPDX-License-Identifier: Apache-2.0
//! Feeds the guest's random number generator.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;

/// `_IO('R', 0x07)`: derive a new key from the pool now.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Mixes `data` into the pool and makes the generator use it at once.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn reseed(data: &[u8]) -> io::Result<()> {
    let mut device = File::options().write(true).open("/dev/random")?;
    device.write_all(data)?;
    // SAFETY: the request takes no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    super::check(result.into())?;
    Ok(())
}
