// SPDX-License-Identifier: Apache-2.0
//! Files as block devices (`loop(4)`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const GET_FREE: libc::Ioctl = 0x4c82;
const CONFIGURE: libc::Ioctl = 0x4c0a;
const READ_ONLY: u32 = 1;
/// It is gone with its last user.
const AUTOCLEAR: u32 = 4;

/// The kernel's `struct loop_config`, with its `struct loop_info64` in the middle.
#[repr(C)]
struct Configuration {
    file: u32,
    block_size: u32,
    before_flags: [u64; 5],
    numbers: [u32; 3],
    flags: u32,
    names_and_key: [u64; 20],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// The number of a device that nobody had when it was asked for. `control` is `/dev/loop-control`.
pub(crate) fn free(control: &File) -> io::Result<u32> {
    // SAFETY: the call has no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Makes a device that nobody has show `file`, to be read only, for as long as somebody has it open.
pub(crate) fn configure(device: &File, file: &File) -> io::Result<()> {
    let configuration = Configuration {
        file: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
        block_size: 0,
        before_flags: [0; 5],
        numbers: [0; 3],
        flags: READ_ONLY | AUTOCLEAR,
        names_and_key: [0; 20],
        init: [0; 2],
        reserved: [0; 8],
    };
    // SAFETY: the argument points to as many bytes as the kernel's structure has, which it only reads.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            CONFIGURE,
            std::ptr::from_ref(&configuration),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
