// SPDX-License-Identifier: Apache-2.0
//! Open directories.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::PoisonError;

use rustix::fs::{FileType, OFlags, syncfs};
use rustix::io::Errno;

use crate::call::{Answer, Call};
use crate::inode::Inode;
use crate::listing::Entry;
use crate::name;
use crate::options::Cache;
use crate::protocol::flags::{init, open_out};
use crate::protocol::{Dirent, EntryOut, OpenIn, OpenOut, ROOT_ID, ReadIn, Wire};
use crate::server::Server;
use crate::session::Session;

/// The most of a directory that one request reads, in bytes.
const MAX_LISTING: usize = 64 * 1024;

impl Server {
    pub(crate) fn opendir(&self, call: &mut Call<'_>) -> Answer {
        let _: OpenIn = call.arguments.take()?;
        let inode = self.inodes.get(call.header.nodeid)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let permit = self.quota.take()?;
        let file = self
            .proc
            .reopen(inode.as_fd(), OFlags::RDONLY | OFlags::DIRECTORY)?;
        let open_flags = match inode.cache {
            Cache::Always => open_out::CACHE_DIR | open_out::KEEP_CACHE,
            Cache::Auto | Cache::Never => 0,
        };
        call.answer(&OpenOut {
            fh: self.handles.add_directory(file, permit),
            open_flags,
            backing_id: 0,
        })
    }

    /// Lists a directory from a position on; `plus` looks each name up as well.
    pub(crate) fn readdir(&self, call: &mut Call<'_>, plus: bool) -> Answer {
        let request: ReadIn = call.arguments.take()?;
        let handle = self.handles.get(request.fh)?;
        let inode = self.inodes.get(call.header.nodeid)?;
        let room = usize::try_from(request.size)
            .map_err(|_| Errno::INVAL)?
            .min(call.room())
            .min(MAX_LISTING);
        let mut entries = handle
            .listing()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        entries.go_to(&handle, request.offset)?;
        // An entry with attributes is several times the host's, which are read for as many as fit.
        let host_room = if plus { room / 4 } else { room };
        let listing = &mut *call.scratch;
        listing.clear();
        for index in 0.. {
            let entry = match entries.get(&handle, index, call.host, host_room) {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                // What has been listed goes out; the error comes again with the next request.
                Err(_) if !listing.is_empty() => break,
                Err(errno) => return Err(errno),
            };
            let name = entry.name();
            if listing.len().saturating_add(record_size(name, plus)) > room {
                if listing.is_empty() {
                    return Err(Errno::INVAL);
                }
                break;
            }
            if plus {
                self.put_entry(call.session, &inode, name, listing);
            }
            let number = if inode.id == ROOT_ID && name.to_bytes() == b".." {
                // What lies above the shared directory is nothing to the guest.
                ROOT_ID
            } else {
                self.number(call.session, entry.ino, inode.mount())
            };
            put_dirent(number, entry, listing);
        }
        entries.rest();
        drop(entries);
        call.answer_scratch()
    }

    /// Puts the look-up part of an entry. Without one (it is gone, or there is no room for another
    /// inode) the guest sees the name alone.
    fn put_entry(&self, session: Session, directory: &Inode, name: &CStr, listing: &mut Vec<u8>) {
        let entry = name::validated(name).and_then(|name| self.entry(session, directory, name));
        match entry {
            Ok((entry, _)) => entry.put(listing),
            Err(_) => EntryOut::default().put(listing),
        }
    }

    pub(crate) fn syncfs(&self, call: &mut Call<'_>) -> Answer {
        let inode = self.inodes.get(call.header.nodeid)?;
        let files = if call.session.has(init::SUBMOUNTS) {
            vec![inode]
        } else {
            // To the guest they are one file system.
            self.inodes.one_per_mount()
        };
        for inode in files {
            if !matches!(inode.kind, FileType::RegularFile | FileType::Directory) {
                return Err(Errno::INVAL);
            }
            let _permit = self.quota.take()?;
            syncfs(self.proc.reopen(inode.as_fd(), OFlags::RDONLY)?)?;
        }
        Ok(0)
    }
}

/// The length of one record of a listing, padded.
fn record_size(name: &CStr, plus: bool) -> usize {
    let entry = if plus { EntryOut::SIZE } else { 0 };
    Dirent::SIZE
        .saturating_add(name.count_bytes())
        .next_multiple_of(8)
        .saturating_add(entry)
}

fn put_dirent(ino: u64, entry: &Entry, listing: &mut Vec<u8>) {
    let name = entry.name().to_bytes();
    Dirent {
        ino,
        off: entry.next,
        namelen: u32::try_from(name.len()).unwrap_or(0),
        kind: entry.kind,
    }
    .put(listing);
    listing.extend_from_slice(name);
    listing.resize(listing.len().next_multiple_of(8), 0);
}
