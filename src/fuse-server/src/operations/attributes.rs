// SPDX-License-Identifier: Apache-2.0
//! Attributes of inodes and of the file system.

use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxFlags, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, chmodat, chownat, fstatvfs, ftruncate, statx, utimensat,
};
use rustix::io::Errno;

use crate::call::{Answer, Call};
use crate::inode::Inode;
use crate::proc::ProcSelfFd;
use crate::protocol::flags::{init, setattr as valid};
use crate::protocol::{
    Attr, AttrOut, GetattrIn, NAME_MAX, SetattrIn, StatfsOut, StatxIn, StatxOut, SxTime,
};
use crate::server::Server;
use crate::session::Session;

/// The attributes of an open or `O_PATH` file.
pub(crate) fn stat(file: impl AsFd) -> Result<Statx, Errno> {
    statx(
        file,
        c"",
        AtFlags::EMPTY_PATH,
        StatxFlags::BASIC_STATS | StatxFlags::MNT_ID,
    )
}

/// The protocol's form of attributes.
pub(super) fn attr(stat: &Statx, ino: u64, flags: u32) -> Attr {
    Attr {
        ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encoded_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags,
    }
}

/// A device number in the kernel's 32-bit form (12 bits major, 20 bits minor).
fn encoded_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
}

/// Major and minor of such a number.
pub(super) fn decoded_device(device: u32) -> (u32, u32) {
    (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00)
}

/// Bits that an inode's number may have for a mount's number to fit above them.
const NUMBER_BITS: u32 = 48;

/// A number for the inode `number` on `mount` that differs from mount to mount, if it is of usual
/// size: what a guest takes for one file system must not have two files of one number, or
/// programs take them for links of each other.
fn distinct(number: u64, mount: u64) -> u64 {
    if number >> NUMBER_BITS == 0 {
        number | (mount & 0x7fff) << NUMBER_BITS
    } else {
        number
    }
}

/// Seconds and nanoseconds for which an inode's name and attributes are valid.
pub(super) fn validity(inode: &Inode) -> (u64, u32) {
    let timeout = inode.cache.timeout();
    (timeout.as_secs(), timeout.subsec_nanos())
}

impl Server {
    /// The number that the guest sees of an inode.
    pub(super) fn number(&self, session: Session, number: u64, mount: u64) -> u64 {
        if mount == self.inodes.root_mount() || session.has(init::SUBMOUNTS) {
            number
        } else {
            distinct(number, mount)
        }
    }

    fn answer_attributes(&self, call: &mut Call<'_>, inode: &Inode) -> Answer {
        let stat = stat(inode)?;
        let number = self.number(call.session, stat.stx_ino, inode.mount());
        let (attr_valid, attr_valid_nsec) = validity(inode);
        call.answer(&AttrOut {
            attr_valid,
            attr_valid_nsec,
            dummy: 0,
            attr: attr(&stat, number, 0),
        })
    }

    pub(crate) fn getattr(&self, call: &mut Call<'_>) -> Answer {
        let _: GetattrIn = call.arguments.take()?;
        let inode = self.inodes.get(call.header.nodeid)?;
        self.answer_attributes(call, &inode)
    }

    pub(crate) fn statx(&self, call: &mut Call<'_>) -> Answer {
        let request: StatxIn = call.arguments.take()?;
        let inode = self.inodes.get(call.header.nodeid)?;
        let mask = StatxFlags::from_bits_retain(request.sx_mask)
            & (StatxFlags::BASIC_STATS | StatxFlags::BTIME);
        let stat = statx(&inode, c"", AtFlags::EMPTY_PATH, mask)?;
        let time = |time: rustix::fs::StatxTimestamp| SxTime {
            tv_sec: time.tv_sec,
            tv_nsec: time.tv_nsec,
            reserved: 0,
        };
        let (attr_valid, attr_valid_nsec) = validity(&inode);
        call.answer(&StatxOut {
            attr_valid,
            attr_valid_nsec,
            stat: crate::protocol::Statx {
                mask: stat.stx_mask & mask.bits(),
                blksize: stat.stx_blksize,
                nlink: stat.stx_nlink,
                uid: stat.stx_uid,
                gid: stat.stx_gid,
                mode: stat.stx_mode,
                ino: self.number(call.session, stat.stx_ino, inode.mount()),
                size: stat.stx_size,
                blocks: stat.stx_blocks,
                atime: time(stat.stx_atime),
                btime: time(stat.stx_btime),
                ctime: time(stat.stx_ctime),
                mtime: time(stat.stx_mtime),
                rdev_major: stat.stx_rdev_major,
                rdev_minor: stat.stx_rdev_minor,
                dev_major: stat.stx_dev_major,
                dev_minor: stat.stx_dev_minor,
                ..Default::default()
            },
            ..StatxOut::default()
        })
    }

    pub(crate) fn setattr(&self, call: &mut Call<'_>) -> Answer {
        let request: SetattrIn = call.arguments.take()?;
        let inode = self.inodes.get(call.header.nodeid)?;
        // Owner and size before mode: changing those clears set-id bits that the same request may
        // be about to set.
        if request.valid & valid::SIZE != 0 {
            self.set_size(call, &inode, &request)?;
        }
        if request.valid & (valid::UID | valid::GID) != 0 {
            let uid = owner(request.valid & valid::UID != 0, request.uid)?;
            let gid = owner(request.valid & valid::GID != 0, request.gid)?;
            chownat(
                &inode,
                c"",
                uid.map(Uid::from_raw),
                gid.map(Gid::from_raw),
                AtFlags::EMPTY_PATH,
            )?;
        }
        if request.valid & valid::MODE != 0 {
            chmodat(
                &self.proc,
                ProcSelfFd::name(inode.as_fd()),
                Mode::from_raw_mode(request.mode & 0o7777),
                AtFlags::empty(),
            )?;
        }
        if request.valid & (valid::ATIME | valid::MTIME) != 0 {
            let times = Timestamps {
                last_access: timestamp(
                    request.valid & valid::ATIME != 0,
                    request.valid & valid::ATIME_NOW != 0,
                    request.atime,
                    request.atimensec,
                )?,
                last_modification: timestamp(
                    request.valid & valid::MTIME != 0,
                    request.valid & valid::MTIME_NOW != 0,
                    request.mtime,
                    request.mtimensec,
                )?,
            };
            utimensat(&inode, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        self.answer_attributes(call, &inode)
    }

    fn set_size(&self, call: &Call<'_>, inode: &Inode, request: &SetattrIn) -> Result<(), Errno> {
        let truncate = || {
            if request.valid & valid::FH != 0 {
                return ftruncate(&self.handles.get(request.fh)?, request.size);
            }
            if inode.kind != FileType::RegularFile {
                return Err(Errno::INVAL);
            }
            let _permit = self.quota.take()?;
            let file = self.proc.reopen(inode.as_fd(), OFlags::WRONLY)?;
            ftruncate(file, request.size)
        };
        if request.valid & valid::KILL_SUIDGID != 0 {
            call.credentials.without_fsetid(truncate)
        } else {
            truncate()
        }
    }

    pub(crate) fn statfs(&self, call: &mut Call<'_>) -> Answer {
        let inode = self.inodes.get(call.header.nodeid)?;
        let host = fstatvfs(&inode)?;
        call.answer(&StatfsOut {
            blocks: host.f_blocks,
            bfree: host.f_bfree,
            bavail: host.f_bavail,
            files: host.f_files,
            ffree: host.f_ffree,
            bsize: u32::try_from(host.f_bsize).unwrap_or(4096),
            namelen: u32::try_from(NAME_MAX).map_err(|_| Errno::OVERFLOW)?,
            frsize: u32::try_from(host.f_frsize).unwrap_or(4096),
            ..StatfsOut::default()
        })
    }
}

/// An owner to set, if any. The number that means "unchanged" to chown(2) is no owner.
fn owner(set: bool, id: u32) -> Result<Option<u32>, Errno> {
    match (set, id) {
        (false, _) => Ok(None),
        (true, u32::MAX) => Err(Errno::INVAL),
        (true, id) => Ok(Some(id)),
    }
}

/// A time to set, now, or none.
fn timestamp(set: bool, now: bool, seconds: u64, nanoseconds: u32) -> Result<Timespec, Errno> {
    let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    match (set, now) {
        (false, _) => Ok(special(UTIME_OMIT)),
        (true, true) => Ok(special(UTIME_NOW)),
        (true, false) if nanoseconds >= 1_000_000_000 => Err(Errno::INVAL),
        (true, false) => Ok(Timespec {
            tv_sec: seconds.cast_signed(),
            tv_nsec: nanoseconds.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_short_form() {
        for (major, minor) in [(0, 0), (1, 3), (8, 257), (4095, 0xf_ffff)] {
            assert_eq!(decoded_device(encoded_device(major, minor)), (major, minor));
        }
    }

    #[test]
    fn numbers_differ_from_mount_to_mount() {
        assert_ne!(distinct(12, 30), distinct(12, 31));
        assert_eq!(distinct(12, 0), 12);
        assert_eq!(distinct(u64::MAX, 31), u64::MAX);
    }

    #[test]
    fn times_are_checked() {
        assert!(timestamp(true, false, 1, 1_000_000_000).is_err());
        let omitted = timestamp(false, true, 0, 0).unwrap();
        assert_eq!(omitted.tv_nsec, UTIME_OMIT);
    }
}
