// SPDX-License-Identifier: Apache-2.0
//! Open files: their data and space.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, StatVfsMountFlags, copy_file_range, fallocate,
    fcntl_getfl, fdatasync, fstatfs, fstatvfs, fsync, seek,
};
use rustix::io::{Errno, ReadWriteFlags, dup};

use super::attributes::stat;
use crate::call::{Answer, Call};
use crate::credentials::Credentials;
use crate::inode::{Inode, Stamp};
use crate::options::Cache;
use crate::protocol::flags::{
    FSYNC_DATA, OPEN_KILL_SUIDGID, WRITE_CACHE, WRITE_KILL_SUIDGID, init, open_out,
};
use crate::protocol::{
    CopyFileRangeIn, FallocateIn, FlushIn, FsyncIn, InHeader, LseekIn, LseekOut, OpenIn, OpenOut,
    OutHeader, ReadIn, ReleaseIn, Wire, WriteIn, WriteOut,
};
use crate::server::Server;
use crate::session::{MAX_WRITE, Session};

/// The most that one request copies within the host, in bytes.
const MAX_COPY: u64 = 256 * 1024 * 1024;

/// `rustix` gives both names the bits of O_SYNC.
const O_DSYNC: u32 = libc::O_DSYNC.cast_unsigned();

/// The flags with which the host's file is opened for a guest's open flags. Only what concerns the
/// file on the host is taken over; O_APPEND comes with each write, because a guest may switch it
/// on an open file.
pub(super) fn host_flags(guest: u32, session: Session) -> Result<OFlags, Errno> {
    let guest = OFlags::from_bits_retain(guest);
    let mut access = guest & OFlags::RWMODE;
    if access == OFlags::RWMODE || guest.contains(OFlags::PATH) {
        return Err(Errno::INVAL);
    }
    if access == OFlags::WRONLY && session.has(init::WRITEBACK_CACHE) {
        // To fill the rest of a page that a write covers partly, the guest reads.
        access = OFlags::RDWR;
    }
    Ok(access | guest & (OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC | OFlags::NOATIME))
}

/// Whether an open must clear set-id bits when it truncates.
pub(super) fn kills_set_id(open_flags: u32) -> bool {
    open_flags & OPEN_KILL_SUIDGID != 0
}

impl Server {
    /// Opens a known inode: a regular file, nothing else (CVE-2020-35517).
    pub(super) fn open_inode(
        &self,
        credentials: &Credentials,
        inode: &Inode,
        flags: OFlags,
        kill_set_id: bool,
    ) -> Result<OwnedFd, Errno> {
        match inode.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let reopen = || self.proc.reopen(inode.as_fd(), flags);
        if kill_set_id && flags.contains(OFlags::TRUNC) {
            credentials.without_fsetid(reopen)
        } else {
            reopen()
        }
    }

    /// What the guest may do with its cache for a file just opened.
    pub(super) fn open_reply_flags(
        &self,
        session: Session,
        inode: &Inode,
        file: &OwnedFd,
        flags: OFlags,
    ) -> u32 {
        let access = flags & OFlags::RWMODE;
        let mut reply = match inode.cache {
            Cache::Never => open_out::DIRECT_IO | open_out::PARALLEL_DIRECT_WRITES,
            // What is only written has no use for a cache, which writes through here and is dropped at the
            // next open. Past it Linux doesn't ask for file capabilities before it writes: a request a file
            // made. Before DIRECT_IO_ALLOW_MMAP it left what others have cached of the file as it was.
            Cache::Auto | Cache::Always
                if access == OFlags::WRONLY
                    && session.has(init::DIRECT_IO_ALLOW_MMAP)
                    && !session.has(init::WRITEBACK_CACHE) =>
            {
                open_out::DIRECT_IO
            }
            Cache::Always => open_out::KEEP_CACHE,
            // As NFS does: what is cached stays if the file is as it was at the last open.
            Cache::Auto => match stat(inode) {
                Ok(stat) if inode.unchanged_since_open(Stamp::new(&stat)) => open_out::KEEP_CACHE,
                _ => 0,
            },
        };
        if access == OFlags::RDONLY || closes_silently(file) {
            // Saves a request a close.
            reply |= open_out::NOFLUSH;
        }
        reply
    }

    pub(crate) fn open(&self, call: &mut Call<'_>) -> Answer {
        let request: OpenIn = call.arguments.take()?;
        let inode = self.inodes.get(call.header.nodeid)?;
        let flags = host_flags(request.flags, call.session)?;
        let writes = flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC);
        if self.options.read_only && writes {
            return Err(Errno::ROFS);
        }
        let permit = self.quota.take()?;
        let kill = kills_set_id(request.open_flags);
        let file = self.open_inode(call.credentials, &inode, flags, kill)?;
        let open_flags = self.open_reply_flags(call.session, &inode, &file, flags);
        call.answer(&OpenOut {
            fh: self.handles.add_file(file, permit),
            open_flags,
            backing_id: 0,
        })
    }

    pub(crate) fn read(&self, call: &mut Call<'_>) -> Answer {
        let request: ReadIn = call.arguments.take()?;
        let handle = self.handles.get(request.fh)?;
        let length = usize::try_from(request.size.min(MAX_WRITE))
            .map_err(|_| Errno::INVAL)?
            .min(call.room());
        checked_end(request.offset, length)?;
        call.reply
            .read_file(OutHeader::SIZE, length, handle.as_fd(), request.offset)
    }

    pub(crate) fn write(&self, call: &mut Call<'_>) -> Answer {
        let request: WriteIn = call.arguments.take()?;
        let handle = self.handles.get(request.fh)?;
        if request.size > MAX_WRITE {
            return Err(Errno::INVAL);
        }
        let length = usize::try_from(request.size).map_err(|_| Errno::INVAL)?;
        checked_end(request.offset, length)?;
        let flags = write_flags(&request);
        let data = InHeader::SIZE.saturating_add(WriteIn::SIZE);
        let request_buffer = call.request;
        let write = || {
            self.removals.with_room(
                || tells_at_once(handle.as_fd(), flags),
                || request_buffer.write_file(data, length, handle.as_fd(), request.offset, flags),
            )
        };
        let written = if request.write_flags & WRITE_KILL_SUIDGID != 0 {
            call.credentials.without_fsetid(write)?
        } else {
            write()?
        };
        call.answer(&WriteOut {
            size: u32::try_from(written).map_err(|_| Errno::OVERFLOW)?,
            padding: 0,
        })
    }

    /// A guest process closed a descriptor. Closing one of the host's for it brings out errors
    /// that the host keeps back until then (NFS, quotas).
    pub(crate) fn flush(&self, call: &mut Call<'_>) -> Answer {
        let request: FlushIn = call.arguments.take()?;
        let handle = self.handles.get(request.fh)?;
        let _permit = self.quota.take()?;
        let copy = dup(&handle)?;
        crate::syscall::close(copy)?;
        Ok(0)
    }

    pub(crate) fn fsync(&self, call: &mut Call<'_>) -> Answer {
        let request: FsyncIn = call.arguments.take()?;
        let handle = self.handles.get(request.fh)?;
        if request.fsync_flags & FSYNC_DATA != 0 {
            fdatasync(&handle)?;
        } else {
            fsync(&handle)?;
        }
        Ok(0)
    }

    pub(crate) fn release(&self, call: &mut Call<'_>) -> Answer {
        let request: ReleaseIn = call.arguments.take()?;
        self.handles.remove(request.fh)?;
        Ok(0)
    }

    pub(crate) fn fallocate(&self, call: &mut Call<'_>) -> Answer {
        let request: FallocateIn = call.arguments.take()?;
        let handle = self.handles.get(request.fh)?;
        let mode = FallocateFlags::from_bits_retain(request.mode);
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let change = || fallocate(&handle, mode, request.offset, request.length);
        // The request doesn't say whether the caller may keep set-id bits; root may.
        if call.header.uid == 0 {
            change()?;
        } else {
            call.credentials.without_fsetid(change)?;
        }
        Ok(0)
    }

    pub(crate) fn lseek(&self, call: &mut Call<'_>) -> Answer {
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        if call.session.has(init::WRITEBACK_CACHE) {
            // The guest asks without writing back first, so the host doesn't know where its data
            // is. Without this operation the guest takes everything for data.
            return Err(Errno::NOSYS);
        }
        let request: LseekIn = call.arguments.take()?;
        let handle = self.handles.get(request.fh)?;
        // The other kinds are a matter of the guest's own file position.
        let target = match request.whence {
            SEEK_DATA => SeekFrom::Data(request.offset),
            SEEK_HOLE => SeekFrom::Hole(request.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = seek(&handle, target)?;
        call.answer(&LseekOut { offset })
    }

    pub(crate) fn copy_file_range(&self, call: &mut Call<'_>) -> Answer {
        let request: CopyFileRangeIn = call.arguments.take()?;
        if request.flags != 0 {
            return Err(Errno::INVAL);
        }
        let source = self.handles.get(request.fh_in)?;
        let target = self.handles.get(request.fh_out)?;
        // A short copy is no error, and a long one keeps the thread.
        let length = usize::try_from(request.len.min(MAX_COPY)).map_err(|_| Errno::INVAL)?;
        let mut from = request.off_in;
        let mut to = request.off_out;
        let mut copy = || copy_file_range(&source, Some(&mut from), &target, Some(&mut to), length);
        let copied = if call.header.uid == 0 {
            copy()?
        } else {
            call.credentials.without_fsetid(copy)?
        };
        call.answer(&WriteOut {
            size: u32::try_from(copied).map_err(|_| Errno::OVERFLOW)?,
            padding: 0,
        })
    }
}

/// How the host writes: at the end, and durably, if the guest says so of this write. It may differ from what the
/// file was opened with (fcntl, pwritev2).
fn write_flags(request: &WriteIn) -> ReadWriteFlags {
    let guest = OFlags::from_bits_retain(request.flags);
    let mut flags = ReadWriteFlags::empty();
    if guest.contains(OFlags::APPEND) && request.write_flags & WRITE_CACHE == 0 {
        flags |= ReadWriteFlags::APPEND;
    }
    // Past its cache Linux leaves that to the server. SYNC has the bit of DSYNC and one of its own.
    if guest.contains(OFlags::SYNC) {
        flags |= ReadWriteFlags::SYNC;
    } else if request.flags & O_DSYNC != 0 {
        flags |= ReadWriteFlags::DSYNC;
    }
    flags
}

/// Whether closing a written file has nothing to say, because its file system keeps no errors back
/// until then. Of others, NFS for one, it isn't known.
fn closes_silently(file: impl AsFd) -> bool {
    let Ok(host) = fstatfs(file) else {
        return false;
    };
    matches!(
        host.f_type,
        libc::BTRFS_SUPER_MAGIC
            | libc::EXT4_SUPER_MAGIC
            | libc::F2FS_SUPER_MAGIC
            | libc::OVERLAYFS_SUPER_MAGIC
            | libc::TMPFS_MAGIC
            | libc::XFS_SUPER_MAGIC
    )
}

/// Whether the error of a write is about what it was to write, and not about what was written before.
fn tells_at_once(file: BorrowedFd<'_>, flags: ReadWriteFlags) -> bool {
    let waits = flags.intersects(ReadWriteFlags::SYNC | ReadWriteFlags::DSYNC)
        || fcntl_getfl(file).is_ok_and(|flags| flags.intersects(OFlags::SYNC | OFlags::DSYNC))
        || fstatvfs(file).is_ok_and(|host| host.f_flag.contains(StatVfsMountFlags::SYNCHRONOUS));
    !waits && closes_silently(file)
}

/// Refuses ranges that no file has; to some calls an offset of all ones means something else.
fn checked_end(offset: u64, length: usize) -> Result<(), Errno> {
    let length = u64::try_from(length).map_err(|_| Errno::INVAL)?;
    let end = offset.checked_add(length).ok_or(Errno::INVAL)?;
    i64::try_from(end).map(drop).map_err(|_| Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_as_durable_as_the_guest_says_of_it() {
        let flags = |flags: OFlags| {
            write_flags(&WriteIn {
                flags: flags.bits(),
                ..WriteIn::default()
            })
        };
        assert_eq!(flags(OFlags::WRONLY), ReadWriteFlags::empty());
        let durable = OFlags::from_bits_retain(O_DSYNC);
        assert_eq!(flags(durable), ReadWriteFlags::DSYNC);
        assert_eq!(
            flags(OFlags::SYNC | OFlags::APPEND),
            ReadWriteFlags::SYNC | ReadWriteFlags::APPEND
        );
    }
}
