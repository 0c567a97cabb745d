// SPDX-License-Identifier: Apache-2.0
//! The requests by which a mounted file system grows: the kernel's own, without a program.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

/// With a number of blocks.
const EXT4_IOC_RESIZE_FS: Opcode = opcode::write::<u64>(b'f', 16);
const XFS_IOC_FSGEOMETRY_V1: Opcode = opcode::read::<Geometry>(b'X', 100);
const XFS_IOC_FSGROWFSDATA: Opcode = opcode::write::<Growth>(b'X', 110);

/// `struct xfs_fsop_geom_v1`, of which two fields matter here.
#[repr(C, align(8))]
#[derive(Default)]
struct Geometry {
    block_size: u32,
    others: [u32; 6],
    /// Part of the space that inodes may take, in percent.
    inode_percent: u32,
    /// Blocks of data.
    blocks: u64,
    rest: [u64; 9],
}

const _: () = assert!(size_of::<Geometry>() == 112, "as the request's number says");

/// `struct xfs_growfs_data`.
#[repr(C)]
struct Growth {
    blocks: u64,
    inode_percent: u32,
    padding: u32,
}

/// Has the ext4 that `root` is a folder of take `blocks` of its disk.
///
/// # Errors
///
/// The kernel's; EINVAL where it has more already.
pub(crate) fn ext4(root: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    // SAFETY: the request reads a number of eight bytes.
    let resize = unsafe { Setter::<EXT4_IOC_RESIZE_FS, _>::new(blocks) };
    // SAFETY: as above; it touches no other memory of ours.
    unsafe { ioctl(root, resize) }?;
    Ok(())
}

/// Has the XFS that `root` is a folder of take `bytes` of its disk.
///
/// # Errors
///
/// The kernel's; EINVAL where it has more already.
pub(crate) fn xfs(root: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    // SAFETY: the request fills a `Geometry`, of which every pattern of bits is one.
    let geometry = unsafe { Getter::<XFS_IOC_FSGEOMETRY_V1, Geometry>::new() };
    // SAFETY: as above; it touches no other memory of ours.
    let now = unsafe { ioctl(root, geometry) }?;
    let wanted = Growth {
        blocks: bytes.checked_div(now.block_size.into()).unwrap_or_default(),
        inode_percent: now.inode_percent,
        padding: 0,
    };
    if wanted.blocks == now.blocks {
        return Ok(());
    }
    // SAFETY: the request reads a `Growth`, which has no padding of the compiler's.
    let grow = unsafe { Setter::<XFS_IOC_FSGROWFSDATA, _>::new(wanted) };
    // SAFETY: as above; it touches no other memory of ours.
    unsafe { ioctl(root, grow) }?;
    Ok(())
}
