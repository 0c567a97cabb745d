// SPDX-License-Identifier: Apache-2.0
//! Making inodes. All of it happens as the guest's caller, so that the host decides on owner,
//! group, set-id bits and default ACLs as it would for a local process.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    Dev, FileType, Mode, OFlags, StatVfsMountFlags, fstatvfs, makedev, mkdirat, mknodat, openat2,
    symlinkat,
};
use rustix::io::Errno;

use super::attributes::decoded_device;
use super::file::host_flags;
use super::lookup::RESOLVE;
use crate::call::{Answer, Call};
use crate::inode::Inode;
use crate::protocol::{CreateIn, EntryOut, MkdirIn, MknodIn, OpenOut, PATH_MAX, Wire};
use crate::quota::Permit;
use crate::server::Server;

impl Server {
    pub(crate) fn mkdir(&self, call: &mut Call<'_>) -> Answer {
        let request: MkdirIn = call.arguments.take()?;
        let name = call.arguments.name()?;
        let parent = self.inodes.get(call.header.nodeid)?;
        let caller = call.caller(request.umask)?;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        call.credentials
            .as_caller(&caller, || mkdirat(&parent, name, mode))?;
        let (entry, _) = self.entry(call.session, &parent, name)?;
        call.answer(&entry)
    }

    pub(crate) fn mknod(&self, call: &mut Call<'_>) -> Answer {
        let request: MknodIn = call.arguments.take()?;
        let name = call.arguments.name()?;
        let parent = self.inodes.get(call.header.nodeid)?;
        let (kind, device) = special_file(&parent, &request)?;
        let caller = call.caller(request.umask)?;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        call.credentials
            .as_caller(&caller, || mknodat(&parent, name, kind, mode, device))?;
        let (entry, _) = self.entry(call.session, &parent, name)?;
        call.answer(&entry)
    }

    pub(crate) fn symlink(&self, call: &mut Call<'_>) -> Answer {
        let name = call.arguments.name()?;
        // The target is the guest's text: nothing on the host ever follows it.
        let target = call.arguments.string()?;
        if target.is_empty() || target.count_bytes() >= PATH_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let parent = self.inodes.get(call.header.nodeid)?;
        let caller = call.caller(0)?;
        call.credentials
            .as_caller(&caller, || symlinkat(target, &parent, name))?;
        let (entry, _) = self.entry(call.session, &parent, name)?;
        call.answer(&entry)
    }

    pub(crate) fn create(&self, call: &mut Call<'_>) -> Answer {
        let request: CreateIn = call.arguments.take()?;
        let name = call.arguments.name()?;
        let parent = self.inodes.get(call.header.nodeid)?;
        let caller = call.caller(request.umask)?;
        let flags = host_flags(request.flags, call.session)?;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let permit = self.quota.take()?;
        // Always exclusive: what exists already may be a device or FIFO, and is opened only after
        // its type is known (CVE-2020-35517), and by who may.
        let made = call.credentials.as_caller(&caller, || {
            let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat2(&parent, name, flags.union(new), mode, RESOLVE)
        });
        let exclusive = OFlags::from_bits_retain(request.flags).contains(OFlags::EXCL);
        let (entry, inode, file) = match made {
            Ok(file) => {
                let path = self.proc.reopen(file.as_fd(), OFlags::PATH)?;
                let (entry, inode) = self.entry_of(call.session, &parent, path)?;
                (entry, inode, file)
            }
            // Somebody made it after the guest had looked. Whether the caller may open it, only the
            // guest can tell: at this error Linux looks once more, and opens what it finds.
            Err(Errno::EXIST) if !exclusive => return Err(Errno::STALE),
            Err(errno) => return Err(errno),
        };
        self.answer_opened(call, (&entry, &inode), (file, flags), permit)
    }

    pub(crate) fn tmpfile(&self, call: &mut Call<'_>) -> Answer {
        // The name that follows is the guest kernel's placeholder for an unnamed file.
        let request: CreateIn = call.arguments.take()?;
        let parent = self.inodes.get(call.header.nodeid)?;
        let caller = call.caller(request.umask)?;
        let flags = host_flags(request.flags, call.session)?;
        let exclusive = OFlags::from_bits_retain(request.flags) & OFlags::EXCL;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let permit = self.quota.take()?;
        let file = call.credentials.as_caller(&caller, || {
            let new = OFlags::TMPFILE | exclusive | OFlags::CLOEXEC;
            openat2(&parent, c".", flags.union(new), mode, RESOLVE)
        })?;
        let path = self.proc.reopen(file.as_fd(), OFlags::PATH)?;
        let (entry, inode) = self.entry_of(call.session, &parent, path)?;
        self.answer_opened(call, (&entry, &inode), (file, flags), permit)
    }

    /// The answer to what makes a file and opens it: an entry, and what open(2) would have said.
    fn answer_opened(
        &self,
        call: &mut Call<'_>,
        (entry, inode): (&EntryOut, &Inode),
        (file, flags): (OwnedFd, OFlags),
        permit: Permit,
    ) -> Answer {
        let open_flags = self.open_reply_flags(call.session, inode, &file, flags);
        let fh = self.handles.add_file(file, permit);
        call.scratch.clear();
        entry.put(call.scratch);
        OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        }
        .put(call.scratch);
        call.answer_scratch()
    }
}

/// The type and number of a file to make. A device node that a guest makes for itself would be the
/// host's device to whoever finds it on the host, so there have to be no device nodes on that
/// mount; overlayfs's whiteout, which stands for no device, is always allowed.
fn special_file(parent: &Inode, request: &MknodIn) -> Result<(FileType, Dev), Errno> {
    let kind = FileType::from_raw_mode(request.mode);
    match kind {
        FileType::RegularFile | FileType::Fifo | FileType::Socket => Ok((kind, 0)),
        FileType::CharacterDevice if request.rdev == 0 => Ok((kind, 0)),
        FileType::CharacterDevice | FileType::BlockDevice => {
            if !fstatvfs(parent)?.f_flag.contains(StatVfsMountFlags::NODEV) {
                return Err(Errno::PERM);
            }
            let (major, minor) = decoded_device(request.rdev);
            Ok((kind, makedev(major, minor)))
        }
        _ => Err(Errno::INVAL),
    }
}
