// SPDX-License-Identifier: Apache-2.0
//! How a directory is shared.

use std::path::PathBuf;
use std::time::Duration;

/// How long the guest may trust what it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Not at all: every look-up and read comes here. For directories that both sides change.
    Never,
    /// Names and attributes for a second, data until the file is seen changed: what NFS gives. What is open
    /// for writing only goes past the guest's cache.
    #[default]
    Auto,
    /// Until the guest itself forgets. Only for a tree that nobody but this guest changes.
    Always,
}

impl Cache {
    /// For how long names and attributes are valid.
    pub(crate) fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always => Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// Options of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Refuse everything that changes the file system.
    pub read_only: bool,
    /// How long the guest may cache.
    pub cache: Cache,
    /// Folders, as paths from the shared directory, below which it caches otherwise.
    pub cache_below: Vec<(PathBuf, Cache)>,
    /// Let the guest's page cache collect writes. Takes effect with `Cache::Always` for the whole
    /// directory only: a guest that writes back later decides alone on sizes and times.
    pub writeback: bool,
    /// Let the guest read and enforce POSIX ACLs. Costs a request an inode where permissions
    /// depend on groups.
    pub posix_acl: bool,
    /// Tell the guest where mounts below the directory begin, so that each becomes a file system
    /// of its own there, with its own device number. Costs a request a write on them: Linux
    /// asks for file capabilities each time on such a file system.
    pub announce_submounts: bool,
    /// The most descriptors held for the guest: one an inode that it knows, one a handle.
    pub max_open_files: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            cache: Cache::default(),
            cache_below: Vec::new(),
            writeback: false,
            posix_acl: false,
            announce_submounts: false,
            max_open_files: 64 * 1024,
        }
    }
}
