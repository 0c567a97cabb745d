// SPDX-License-Identifier: Apache-2.0
//! Flag words of the protocol.

/// `InitIn` and `InitOut`: what the two sides can do. Bits 32 and up travel in `flags2`.
#[allow(missing_docs, reason = "the names are the protocol's own")]
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// `SetattrIn::valid`.
#[allow(missing_docs, reason = "the names are the protocol's own")]
pub mod setattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `OpenOut::open_flags`.
#[allow(missing_docs, reason = "the names are the protocol's own")]
pub mod open_out {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// `OpenIn::open_flags` and `CreateIn::open_flags`: clear set-id bits while truncating.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `WriteIn::write_flags`: written back from the page cache.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `WriteIn::write_flags`: the writer may not keep set-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `SetxattrIn::setxattr_flags`: clear S_ISGID as `chmod` by this caller would.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `FsyncIn::fsync_flags`: data only.
pub const FSYNC_DATA: u32 = 1 << 0;
/// `Attr::flags`: a mount point of the host, to be mounted by the guest as a file system of its
/// own.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;
/// `GetattrIn::getattr_flags`: `fh` is valid.
pub const GETATTR_FH: u32 = 1 << 0;
/// Extension type: supplementary groups; the lower numbers are security contexts.
pub const EXT_GROUPS: u32 = 32;
