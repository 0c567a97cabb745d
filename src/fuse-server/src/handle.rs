// SPDX-License-Identifier: Apache-2.0
//! The files and directories that the guest has open. Numbers are never used twice.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::io::Errno;

use crate::listing::{Kept, Listing};
use crate::quota::Permit;

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    file: OwnedFd,
    /// Of a directory.
    listing: Option<Mutex<Listing>>,
    _permit: Permit,
}

impl Handle {
    /// The entries of a directory.
    ///
    /// # Errors
    /// `NOTDIR` for a file.
    pub(crate) fn listing(&self) -> Result<&Mutex<Listing>, Errno> {
        self.listing.as_ref().ok_or(Errno::NOTDIR)
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// All open handles.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    table: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
    kept: Kept,
}

impl Handles {
    /// Takes an open file.
    pub(crate) fn add_file(&self, file: OwnedFd, permit: Permit) -> u64 {
        self.add(file, None, permit)
    }

    /// Takes an open directory.
    pub(crate) fn add_directory(&self, file: OwnedFd, permit: Permit) -> u64 {
        let listing = Listing::new(self.kept.clone());
        self.add(file, Some(Mutex::new(listing)), permit)
    }

    fn add(&self, file: OwnedFd, listing: Option<Mutex<Listing>>, permit: Permit) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let handle = Arc::new(Handle {
            file,
            listing,
            _permit: permit,
        });
        self.table
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, handle);
        id
    }

    /// The handle with this number.
    ///
    /// # Errors
    /// `BADF` if there is none.
    pub(crate) fn get(&self, id: u64) -> Result<Arc<Handle>, Errno> {
        self.table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .cloned()
            .ok_or(Errno::BADF)
    }

    /// Lets a handle go; the file closes when the requests in flight on it are done.
    ///
    /// # Errors
    /// `BADF` if there is none.
    pub(crate) fn remove(&self, id: u64) -> Result<(), Errno> {
        let gone = self
            .table
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        gone.map(drop).ok_or(Errno::BADF)
    }

    /// Lets all of them go.
    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut *self.table.write().unwrap_or_else(PoisonError::into_inner));
        drop(gone);
    }
}
