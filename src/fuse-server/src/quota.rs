// SPDX-License-Identifier: Apache-2.0
//! How many files of the host one guest may hold open. Every inode that the guest knows and every
//! handle is a descriptor here, so without a bound the guest decides when the whole process runs
//! out of them (CVE-2020-10717).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;

/// The bound, shared by everything that opens files.
#[derive(Debug, Clone)]
pub(crate) struct Quota {
    left: Arc<AtomicUsize>,
}

/// The right to hold one descriptor; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    left: Arc<AtomicUsize>,
}

impl Quota {
    /// Allows `limit` descriptors at a time.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            left: Arc::new(AtomicUsize::new(limit)),
        }
    }

    /// Takes one.
    ///
    /// # Errors
    /// `NFILE` if none is left.
    pub(crate) fn take(&self) -> Result<Permit, Errno> {
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .map_err(|_| Errno::NFILE)?;
        Ok(Permit {
            left: Arc::clone(&self.left),
        })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.left.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_recovers() {
        let quota = Quota::new(2);
        let one = quota.take().unwrap();
        let _two = quota.take().unwrap();
        assert_eq!(quota.take().unwrap_err(), Errno::NFILE);
        drop(one);
        assert!(quota.take().is_ok());
    }
}
