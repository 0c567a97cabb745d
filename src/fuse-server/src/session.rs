// SPDX-License-Identifier: Apache-2.0
//! What the guest's kernel and this server agreed on at INIT.

use crate::options::{Cache, Options};
use crate::protocol::flags::init;
use crate::protocol::{InitIn, InitOut, MAJOR, MINOR};

/// The largest write, and so the largest read, in bytes.
pub(crate) const MAX_WRITE: u32 = 1024 * 1024;

/// The same in pages of 4 KiB; the guest's limit is also its queue's length.
const MAX_PAGES: u16 = 256;

/// Requests that the guest may have in flight in the background (read-ahead, write-back).
const MAX_BACKGROUND: u16 = 64;

/// The flags in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Session {
    flags: u64,
}

impl Session {
    /// Chooses among what the guest offers.
    pub(crate) fn negotiate(offered: u64, options: &Options) -> Self {
        // Without ATOMIC_O_TRUNC: Linux would have a file truncated here before it finds that the
        // file is being executed and must not be (ETXTBSY).
        let mut wanted = init::ASYNC_READ
            | init::BIG_WRITES
            | init::DONT_MASK
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT
            | init::INIT_EXT
            | init::CREATE_SUPP_GROUP;
        match options.cache {
            Cache::Never => wanted |= init::DIRECT_IO_ALLOW_MMAP,
            Cache::Auto => wanted |= init::AUTO_INVAL_DATA | init::DIRECT_IO_ALLOW_MMAP,
            Cache::Always => {
                wanted |= init::CACHE_SYMLINKS;
                if options.writeback {
                    wanted |= init::WRITEBACK_CACHE;
                }
            }
        }
        if !options.cache_below.is_empty() {
            wanted |= init::DIRECT_IO_ALLOW_MMAP;
        }
        if options.announce_submounts {
            wanted |= init::SUBMOUNTS;
        }
        if options.posix_acl {
            wanted |= init::POSIX_ACL;
        }
        Self {
            flags: offered & wanted,
        }
    }

    /// Whether all of `flags` were agreed on.
    pub(crate) fn has(self, flags: u64) -> bool {
        self.flags & flags == flags
    }

    /// The answer to INIT.
    pub(crate) fn reply(self, request: &InitIn) -> InitOut {
        let [low, high] = halves(self.flags);
        InitOut {
            major: MAJOR,
            minor: MINOR,
            max_readahead: request.max_readahead,
            flags: low,
            flags2: high,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages: MAX_PAGES,
            ..InitOut::default()
        }
    }
}

/// The low and the high word of a flag set.
fn halves(flags: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = flags.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

/// The flag set that two words make.
pub(crate) fn joined(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_both_want_is_agreed_on() {
        let options = Options {
            cache: Cache::Auto,
            writeback: true,
            ..Options::default()
        };
        let all = Session::negotiate(u64::MAX, &options);
        assert!(all.has(init::AUTO_INVAL_DATA | init::CREATE_SUPP_GROUP));
        assert!(!all.has(init::WRITEBACK_CACHE), "needs cache=always");
        assert!(!all.has(init::POSIX_ACL));
        assert!(!all.has(init::ATOMIC_O_TRUNC), "a running program's file");
        let little = Session::negotiate(init::ASYNC_READ, &options);
        assert!(little.has(init::ASYNC_READ));
        assert!(!little.has(init::SUBMOUNTS));
    }

    #[test]
    fn flag_words_split_and_join() {
        let flags = init::INIT_EXT | init::CREATE_SUPP_GROUP;
        let [low, high] = halves(flags);
        assert_eq!(joined(low, high), flags);
        assert_eq!(high, 1 << 2);
    }
}
