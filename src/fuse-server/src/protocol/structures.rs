// SPDX-License-Identifier: Apache-2.0
//! Request and reply bodies.

use super::wire::wire;

wire! {
    /// In front of every request.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// In front of every reply; `error` is a negated errno.
    OutHeader { len: u32, error: i32, unique: u64, }

    /// What the guest's kernel can do. `flags2` follows if `flags` has `INIT_EXT`.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    /// What this server does.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, unused0: u64, unused1: u64,
        unused2: u64,
    }

    /// An inode's attributes.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        blksize: u32, flags: u32,
    }
    /// A node given to the guest: each counts as one lookup, to be forgotten some day.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: Attr,
    }
    /// Attributes and for how long they may be cached.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }

    /// How many lookups to forget.
    ForgetIn { nlookup: u64, }
    /// How many `ForgetOne` follow.
    BatchForgetIn { count: u32, dummy: u32, }
    /// One node of many.
    ForgetOne { nodeid: u64, nlookup: u64, }

    /// Asks for attributes.
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64, }
    /// Changes attributes.
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64,
        ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32,
        uid: u32, gid: u32, unused5: u32,
    }
    /// Asks for extended attributes of the inode, as statx(2).
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// A point in time.
    SxTime { tv_sec: i64, tv_nsec: u32, reserved: i32, }
    /// The attributes, as statx(2) lays them out.
    Statx {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16,
        spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64, atime: SxTime,
        btime: SxTime, ctime: SxTime, mtime: SxTime, rdev_major: u32, rdev_minor: u32,
        dev_major: u32, dev_minor: u32, spare1: Spare, spare2: Spare,
    }
    /// Seven words that carry nothing.
    Spare { a: u64, b: u64, c: u64, d: u64, e: u64, f: u64, g: u64, }
    /// Answer to `StatxIn`.
    StatxOut {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare0: u64, spare1: u64, stat: Statx,
    }

    /// Makes a file of any type.
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// Makes a directory.
    MkdirIn { mode: u32, umask: u32, }
    /// Where to; two names follow.
    RenameIn { newdir: u64, }
    /// As `RenameIn`, with the flags of renameat2(2).
    Rename2In { newdir: u64, flags: u32, padding: u32, }
    /// Which inode gets another name.
    LinkIn { oldnodeid: u64, }

    /// Opens a file or directory.
    OpenIn { flags: u32, open_flags: u32, }
    /// Makes and opens a file.
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// The handle.
    OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    /// Gives a handle back.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// Sent at each close of a descriptor.
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// Makes data durable.
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// Reads from a file or directory.
    ReadIn {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    /// Writes; `size` bytes follow.
    WriteIn {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    /// How much was written or copied.
    WriteOut { size: u32, padding: u32, }
    /// Reserves or frees space.
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// Looks for data or a hole.
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// Where it is.
    LseekOut { offset: u64, }
    /// Copies within the file system.
    CopyFileRangeIn {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }

    /// Sets an extended attribute; name and value follow.
    SetxattrIn { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    /// The same before `SETXATTR_EXT`.
    SetxattrCompatIn { size: u32, flags: u32, }
    /// Room for the value or the list; 0 asks for its size.
    GetxattrIn { size: u32, padding: u32, }
    /// The size.
    GetxattrOut { size: u32, padding: u32, }

    /// In front of a directory entry's name, which is padded to 8 bytes.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }
    /// Space and inodes of the file system.
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32,
        frsize: u32, padding: u32, spare0: u64, spare1: u64, spare2: u64,
    }

    /// In front of each request extension; `size` counts this header too.
    ExtHeader { size: u32, kind: u32, }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Wire;

    /// Sizes from `linux/fuse.h`: a field forgotten or misplaced shifts everything behind it.
    #[test]
    fn sizes_are_the_kernels() {
        assert_eq!(InHeader::SIZE, 40);
        assert_eq!(OutHeader::SIZE, 16);
        assert_eq!(InitOut::SIZE, 64);
        assert_eq!(Attr::SIZE, 88);
        assert_eq!(EntryOut::SIZE, 128);
        assert_eq!(AttrOut::SIZE, 104);
        assert_eq!(SetattrIn::SIZE, 88);
        assert_eq!(Statx::SIZE, 256);
        assert_eq!(StatxOut::SIZE, 288);
        assert_eq!(OpenOut::SIZE, 16);
        assert_eq!(ReadIn::SIZE, 40);
        assert_eq!(WriteIn::SIZE, 40);
        assert_eq!(StatfsOut::SIZE, 80);
        assert_eq!(CopyFileRangeIn::SIZE, 56);
        assert_eq!(Dirent::SIZE, 24);
    }

    #[test]
    fn a_structure_survives_the_wire() {
        let header = InHeader {
            len: 40,
            opcode: 26,
            unique: 7,
            nodeid: 1,
            total_extlen: 3,
            ..InHeader::default()
        };
        let mut bytes = Vec::new();
        header.put(&mut bytes);
        assert_eq!(InHeader::take(&mut bytes.as_slice()), Some(header));
        assert_eq!(InHeader::take(&mut &bytes[..39]), None);
    }
}
