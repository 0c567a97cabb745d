// SPDX-License-Identifier: Apache-2.0
//! Who a thread is towards the host's file systems.
//!
//! The guest's kernel checks permissions (`default_permissions` is how virtio-fs mounts), so the
//! server acts as itself. What depends on the caller's identity is what the host decides while
//! it creates an inode: its owner, and whether set-id bits survive. For that moment the thread
//! takes the caller's file-system user and group, its umask, and no more groups than the guest
//! says (CVE-2022-0358: the server's own groups let a set-group-id file through), and gives up
//! `CAP_FSETID`. It keeps the rights to pass directories, because whether the caller may create
//! there has been decided.

use std::process::abort;

use rustix::fs::Mode;
use rustix::io::{Errno, Result};
use rustix::process::{Gid, getegid, geteuid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
};

use crate::syscall::{set_fsgid, set_fsuid, unshare_fs};

/// The guest process that an inode is created for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups, as far as the guest's kernel tells: at most the directory's.
    pub(crate) groups: Vec<u32>,
    pub(crate) umask: u32,
}

/// The identity of the calling thread, taken once and restored after each change.
#[derive(Debug)]
pub(crate) struct Credentials {
    uid: u32,
    gid: u32,
    sets: CapabilitySets,
}

impl Credentials {
    /// Prepares the calling thread: a umask and working directory of its own, no groups.
    pub(crate) fn enter() -> Result<Self> {
        unshare_fs()?;
        umask(Mode::empty());
        let sets = capabilities(None)?;
        if sets.effective.contains(CapabilitySet::SETGID) {
            set_thread_groups(&[])?;
        }
        Ok(Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            sets,
        })
    }

    /// Runs `operation` with the identity of `caller`.
    ///
    /// # Errors
    /// `PERM` if this process can't act for that user; otherwise the operation's.
    pub(crate) fn as_caller<T>(
        &self,
        caller: &Caller,
        operation: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        umask(Mode::from_raw_mode(caller.umask & 0o777));
        if caller.uid == self.uid && caller.gid == self.gid && caller.groups.is_empty() {
            return operation();
        }
        let groups: Option<Vec<Gid>> = caller.groups.iter().map(|gid| group(*gid)).collect();
        let groups = groups.ok_or(Errno::INVAL)?;
        let _identity = Identity {
            original: self,
            groups: !groups.is_empty(),
        };
        if !groups.is_empty() {
            set_thread_groups(&groups)?;
        }
        set_fsgid(caller.gid)?;
        set_fsuid(caller.uid)?;
        if caller.uid != self.uid {
            // Leaving user 0 dropped the rights over files; coming from another user nothing was
            // dropped. Say exactly what is wanted.
            self.set_effective(self.sets.effective.difference(CapabilitySet::FSETID))?;
        }
        operation()
    }

    /// Runs `operation` without the right to keep set-id bits on a file that it changes: the host
    /// then clears them as it would for an ordinary user.
    pub(crate) fn without_fsetid<T>(&self, operation: impl FnOnce() -> Result<T>) -> Result<T> {
        if !self.sets.effective.contains(CapabilitySet::FSETID) {
            return operation();
        }
        let _right = Right { original: self };
        self.set_effective(self.sets.effective.difference(CapabilitySet::FSETID))?;
        operation()
    }

    fn set_effective(&self, effective: CapabilitySet) -> Result<()> {
        set_capabilities(
            None,
            CapabilitySets {
                effective,
                ..self.sets
            },
        )
    }

    fn restore_identity(&self, groups: bool) -> Result<()> {
        set_fsuid(self.uid)?;
        set_fsgid(self.gid)?;
        self.set_effective(self.sets.effective)?;
        if groups {
            set_thread_groups(&[])?;
        }
        Ok(())
    }
}

/// Restores the thread's users, groups and rights on every way out.
struct Identity<'a> {
    original: &'a Credentials,
    groups: bool,
}

impl Drop for Identity<'_> {
    fn drop(&mut self) {
        // A thread may always return to what its real and saved users and its permitted set still
        // hold. If not, the next operation would run as some guest's user.
        if self.original.restore_identity(self.groups).is_err() {
            abort();
        }
    }
}

/// Restores the thread's rights on every way out.
struct Right<'a> {
    original: &'a Credentials,
}

impl Drop for Right<'_> {
    fn drop(&mut self) {
        if self
            .original
            .set_effective(self.original.sets.effective)
            .is_err()
        {
            abort();
        }
    }
}

/// A group number, unless it is the one that means "none".
fn group(gid: u32) -> Option<Gid> {
    (gid != u32::MAX).then(|| Gid::from_raw(gid))
}
