// SPDX-License-Identifier: Apache-2.0
//! The inodes that the guest knows.
//!
//! An inode enters with its first look-up and leaves when the guest has forgotten all of them.
//! Node numbers are never used twice, so a stale one finds nothing rather than another file.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FileType, Statx, makedev};
use rustix::io::Errno;

use crate::options::Cache;
use crate::protocol::ROOT_ID;
use crate::quota::Permit;

/// What makes two look-ups the same inode. The mount is part of it: one directory may be seen
/// through several mounts with different rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    device: u64,
    inode: u64,
    mount: u64,
}

impl Key {
    pub(crate) fn new(stat: &Statx) -> Self {
        Self {
            device: makedev(stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }
}

/// When a file's data last changed, as far as the host shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Stamp {
    pub(crate) fn new(stat: &Statx) -> Self {
        Self {
            size: stat.stx_size,
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        }
    }
}

/// A file of the host, known but not open.
#[derive(Debug)]
pub(crate) struct Inode {
    /// Its number towards the guest.
    pub(crate) id: u64,
    /// Its type, which never changes.
    pub(crate) kind: FileType,
    /// How long the guest may trust what it has seen of it.
    pub(crate) cache: Cache,
    pub(crate) key: Key,
    path: OwnedFd,
    /// Look-ups not yet forgotten. Grows under the table's read lock and shrinks under its write
    /// lock, so nobody finds an inode that is about to go.
    lookups: AtomicU64,
    opened: Mutex<Option<Stamp>>,
    _permit: Permit,
}

impl Inode {
    /// The mount that it was reached through.
    pub(crate) fn mount(&self) -> u64 {
        self.key.mount
    }

    /// Notes the file's state at an open; tells whether it is that of the open before.
    pub(crate) fn unchanged_since_open(&self, stamp: Stamp) -> bool {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.replace(stamp) == Some(stamp)
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.path.as_fd()
    }
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<Key, Arc<Inode>>,
}

/// All inodes that the guest knows.
#[derive(Debug)]
pub(crate) struct Inodes {
    root: Arc<Inode>,
    table: RwLock<Table>,
    next: AtomicU64,
}

/// A file that a look-up came to, not yet in the table.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) path: OwnedFd,
    pub(crate) stat: Statx,
    pub(crate) cache: Cache,
    pub(crate) permit: Permit,
}

impl Found {
    fn into_inode(self, id: u64, lookups: u64) -> Inode {
        Inode {
            id,
            kind: FileType::from_raw_mode(self.stat.stx_mode.into()),
            cache: self.cache,
            key: Key::new(&self.stat),
            path: self.path,
            lookups: AtomicU64::new(lookups),
            opened: Mutex::new(None),
            _permit: self.permit,
        }
    }
}

impl Inodes {
    /// A table with nothing but the root, which is never forgotten.
    pub(crate) fn new(root: Found) -> Self {
        Self {
            root: Arc::new(root.into_inode(ROOT_ID, 1)),
            table: RwLock::default(),
            next: AtomicU64::new(ROOT_ID),
        }
    }

    /// The inode with this number.
    ///
    /// # Errors
    /// `STALE` if there is none.
    pub(crate) fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        if id == ROOT_ID {
            return Ok(Arc::clone(&self.root));
        }
        self.read().by_id.get(&id).cloned().ok_or(Errno::STALE)
    }

    /// Counts a look-up of the file and returns its inode, which is new if the guest didn't know
    /// it.
    pub(crate) fn look_up(&self, found: Found) -> Arc<Inode> {
        let key = Key::new(&found.stat);
        if key == self.root.key {
            return Arc::clone(&self.root);
        }
        if let Some(inode) = self.read().by_key.get(&key) {
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            return Arc::clone(inode);
        }
        let mut table = self.write();
        if let Some(inode) = table.by_key.get(&key) {
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            return Arc::clone(inode);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let inode = Arc::new(found.into_inode(id, 1));
        table.by_id.insert(id, Arc::clone(&inode));
        table.by_key.insert(key, Arc::clone(&inode));
        inode
    }

    /// Takes back `count` look-ups of a node. More than there were counts as all; a number that
    /// is not in the table is ignored: the guest only lies to itself.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let mut table = self.write();
        let Some(inode) = table.by_id.get(&id) else {
            return;
        };
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        if left == 0 {
            let key = inode.key;
            let gone = (table.by_id.remove(&id), table.by_key.remove(&key));
            // Closing the descriptor may have to free a deleted file: not under the lock.
            drop(table);
            drop(gone);
        }
    }

    /// The mount of the shared directory itself.
    pub(crate) fn root_mount(&self) -> u64 {
        self.root.mount()
    }

    /// A file or directory on each of the mounts that the guest knows.
    pub(crate) fn one_per_mount(&self) -> Vec<Arc<Inode>> {
        let mut mounts = HashMap::from([(self.root.mount(), Arc::clone(&self.root))]);
        for inode in self.read().by_id.values() {
            if matches!(inode.kind, FileType::RegularFile | FileType::Directory) {
                mounts
                    .entry(inode.mount())
                    .or_insert_with(|| Arc::clone(inode));
            }
        }
        mounts.into_values().collect()
    }

    /// Forgets everything but the root.
    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut *self.write());
        drop(gone);
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}
