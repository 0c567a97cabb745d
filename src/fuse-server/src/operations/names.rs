// SPDX-License-Identifier: Apache-2.0
//! Names of inodes: removing, moving, adding; and what a symbolic link says.

use std::os::fd::AsFd;

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, FileType, RenameFlags, linkat, readlinkat_raw, renameat_with, unlinkat};
use rustix::io::Errno;

use crate::call::{Answer, Call};
use crate::proc::ProcSelfFd;
use crate::protocol::{LinkIn, PATH_MAX, Rename2In, RenameIn};
use crate::server::Server;

impl Server {
    pub(crate) fn unlink(&self, call: &mut Call<'_>, directory: bool) -> Answer {
        let name = call.arguments.name()?;
        let parent = self.inodes.get(call.header.nodeid)?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        unlinkat(&parent, name, flags)?;
        self.removals.note();
        Ok(0)
    }

    pub(crate) fn rename(&self, call: &mut Call<'_>) -> Answer {
        let request: RenameIn = call.arguments.take()?;
        self.rename_to(call, request.newdir, RenameFlags::empty())
    }

    pub(crate) fn rename2(&self, call: &mut Call<'_>) -> Answer {
        let request: Rename2In = call.arguments.take()?;
        let flags = RenameFlags::from_bits_retain(request.flags);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        self.rename_to(call, request.newdir, flags)
    }

    fn rename_to(&self, call: &mut Call<'_>, newdir: u64, flags: RenameFlags) -> Answer {
        let old_name = call.arguments.name()?;
        let new_name = call.arguments.name()?;
        let old = self.inodes.get(call.header.nodeid)?;
        let new = self.inodes.get(newdir)?;
        let rename = || renameat_with(&old, old_name, &new, new_name, flags);
        if flags.contains(RenameFlags::WHITEOUT) {
            // The whiteout left behind is a new inode.
            let caller = call.caller(0)?;
            call.credentials.as_caller(&caller, rename)?;
        } else {
            rename()?;
        }
        if !flags.intersects(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE) {
            // It may have replaced a file.
            self.removals.note();
        }
        Ok(0)
    }

    pub(crate) fn link(&self, call: &mut Call<'_>) -> Answer {
        let request: LinkIn = call.arguments.take()?;
        let name = call.arguments.name()?;
        let inode = self.inodes.get(request.oldnodeid)?;
        let parent = self.inodes.get(call.header.nodeid)?;
        // Linking the descriptor itself (AT_EMPTY_PATH) would take CAP_DAC_READ_SEARCH.
        linkat(
            &self.proc,
            ProcSelfFd::name(inode.as_fd()),
            &parent,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        let (entry, _) = self.entry(call.session, &parent, name)?;
        call.answer(&entry)
    }

    pub(crate) fn readlink(&self, call: &mut Call<'_>) -> Answer {
        let inode = self.inodes.get(call.header.nodeid)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        call.scratch.clear();
        call.scratch.reserve(PATH_MAX);
        readlinkat_raw(&inode, c"", spare_capacity(call.scratch))?;
        call.answer_scratch()
    }
}
