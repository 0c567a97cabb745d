// SPDX-License-Identifier: Apache-2.0
//! Finding inodes by name, and forgetting them.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::attributes::{attr, stat, validity};
use crate::call::{Answer, Call};
use crate::inode::{Found, Inode};
use crate::options::Cache;
use crate::protocol::flags::{ATTR_SUBMOUNT, init};
use crate::protocol::{BatchForgetIn, EntryOut, ForgetIn, ForgetOne};
use crate::quota::Permit;
use crate::server::Server;
use crate::session::Session;

/// How a name below a directory is resolved: never out of the directory, never through a link.
/// Mount points are crossed.
pub(crate) const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);

impl Server {
    /// Looks a name up, counts the look-up and describes the inode.
    pub(super) fn entry(
        &self,
        session: Session,
        parent: &Inode,
        name: &CStr,
    ) -> Result<(EntryOut, Arc<Inode>), Errno> {
        let permit = self.quota.take()?;
        let path = openat2(
            parent,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            RESOLVE,
        )?;
        Ok(self.known(session, parent, self.found(parent, path, permit)?))
    }

    /// The same for a file that is open already.
    pub(super) fn entry_of(
        &self,
        session: Session,
        parent: &Inode,
        path: OwnedFd,
    ) -> Result<(EntryOut, Arc<Inode>), Errno> {
        let permit = self.quota.take()?;
        Ok(self.known(session, parent, self.found(parent, path, permit)?))
    }

    fn found(&self, parent: &Inode, path: OwnedFd, permit: Permit) -> Result<Found, Errno> {
        let stat = stat(&path)?;
        let own = self.cache_below.iter().find(|(key, _)| *key == parent.key);
        Ok(Found {
            path,
            stat,
            cache: own.map_or(parent.cache, |(_, cache)| *cache),
            permit,
        })
    }

    fn known(&self, session: Session, parent: &Inode, found: Found) -> (EntryOut, Arc<Inode>) {
        let stat = found.stat;
        let inode = self.inodes.look_up(found);
        let mounted = inode.mount() != parent.mount();
        let submount = mounted && inode.kind == FileType::Directory && session.has(init::SUBMOUNTS);
        let flags = if submount { ATTR_SUBMOUNT } else { 0 };
        let number = self.number(session, stat.stx_ino, inode.mount());
        let (attr_valid, attr_valid_nsec) = validity(&inode);
        // What is mounted here may be gone at the next look. A guest that looks then forgets all
        // below, and so lets the host have it back.
        let (entry_valid, entry_valid_nsec) = if mounted {
            (0, 0)
        } else {
            (attr_valid, attr_valid_nsec)
        };
        let entry = EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid,
            attr_valid,
            entry_valid_nsec,
            attr_valid_nsec,
            attr: attr(&stat, number, flags),
        };
        (entry, inode)
    }

    pub(crate) fn lookup(&self, call: &mut Call<'_>) -> Answer {
        let name = call.arguments.name()?;
        let parent = self.inodes.get(call.header.nodeid)?;
        match self.entry(call.session, &parent, name) {
            Ok((entry, _)) => call.answer(&entry),
            // No node, but a validity: the guest may remember that there is nothing.
            Err(Errno::NOENT) if parent.cache == Cache::Always => {
                let (entry_valid, entry_valid_nsec) = validity(&parent);
                call.answer(&EntryOut {
                    entry_valid,
                    entry_valid_nsec,
                    ..EntryOut::default()
                })
            }
            // At any other error Linux drops a name that it knew, with all below and what is mounted
            // there: a container that opens too many files would lose its /proc.
            Err(Errno::NFILE | Errno::MFILE) => Err(Errno::NOMEM),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn forget(&self, call: &mut Call<'_>) -> Answer {
        let request: ForgetIn = call.arguments.take()?;
        self.inodes.forget(call.header.nodeid, request.nlookup);
        Ok(0)
    }

    pub(crate) fn batch_forget(&self, call: &mut Call<'_>) -> Answer {
        let request: BatchForgetIn = call.arguments.take()?;
        for _ in 0..request.count {
            // The arguments' own length bounds the loop.
            let one: ForgetOne = call.arguments.take()?;
            self.inodes.forget(one.nodeid, one.nlookup);
        }
        Ok(0)
    }
}
