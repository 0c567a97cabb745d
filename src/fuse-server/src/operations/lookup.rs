// SPDX-License-Identifier: Apache-2.0
//! Finding inodes by name, and forgetting them.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Statx, openat2};
use rustix::io::Errno;

use super::attributes::{attr, stat, validity};
use crate::call::{Answer, Call};
use crate::inode::{Found, Inode, Key};
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
        let uncached = parent.cache == Cache::Never || self.uncached == Some(Key::new(&stat));
        Ok(Found {
            path,
            stat,
            cache: if uncached {
                Cache::Never
            } else {
                self.options.cache
            },
            permit,
        })
    }

    fn known(&self, session: Session, parent: &Inode, found: Found) -> (EntryOut, Arc<Inode>) {
        let stat = found.stat;
        let inode = self.inodes.look_up(found);
        let submount = inode.kind == FileType::Directory
            && inode.mount() != parent.mount()
            && session.has(init::SUBMOUNTS);
        let flags = if submount { ATTR_SUBMOUNT } else { 0 };
        (self.described(session, &inode, &stat, flags), inode)
    }

    fn described(&self, session: Session, inode: &Inode, stat: &Statx, flags: u32) -> EntryOut {
        let number = self.number(session, stat.stx_ino, inode.mount());
        let (seconds, nanoseconds) = validity(inode);
        EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid: seconds,
            attr_valid: seconds,
            entry_valid_nsec: nanoseconds,
            attr_valid_nsec: nanoseconds,
            attr: attr(stat, number, flags),
        }
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
