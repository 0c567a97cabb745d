// SPDX-License-Identifier: Apache-2.0
//! Extended attributes.
//!
//! The guest sees `user.` attributes, file capabilities, and ACLs if they are on. The rest are the
//! host's: its security labels, what its overlay mounts note under `trusted.`. Nothing is renamed,
//! so the host clears capabilities on a write as it does for its own processes
//! (CVE-2021-20263).

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::buffer::spare_capacity;
use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use crate::call::{Answer, Call};
use crate::credentials::Caller;
use crate::proc::ProcSelfFd;
use crate::protocol::flags::{SETXATTR_ACL_KILL_SGID, init};
use crate::protocol::{GetxattrIn, GetxattrOut, NAME_MAX, SetxattrCompatIn, SetxattrIn};
use crate::server::Server;

/// The largest value, and the longest list of names, in bytes (the kernel's own limits).
const MAX_VALUE: usize = 64 * 1024;

/// Whether the guest has to do with an attribute.
fn is_visible(name: &[u8], acl: bool) -> bool {
    match name {
        b"security.capability" => true,
        b"system.posix_acl_access" | b"system.posix_acl_default" => acl,
        _ => name.starts_with(b"user."),
    }
}

/// Takes an attribute's name off a call.
fn attribute<'a>(call: &mut Call<'a>) -> Result<&'a CStr, Errno> {
    let name = call.arguments.string()?;
    if name.is_empty() || name.count_bytes() > NAME_MAX {
        return Err(Errno::RANGE);
    }
    if !is_visible(name.to_bytes(), call.session.has(init::POSIX_ACL)) {
        return Err(Errno::OPNOTSUPP);
    }
    Ok(name)
}

impl Server {
    pub(crate) fn getxattr(&self, call: &mut Call<'_>) -> Answer {
        let request: GetxattrIn = call.arguments.take()?;
        let name = attribute(call)?;
        let inode = self.inodes.get(call.header.nodeid)?;
        call.scratch.clear();
        call.scratch.reserve(MAX_VALUE);
        getxattr(
            ProcSelfFd::name(inode.as_fd()),
            name,
            spare_capacity(call.scratch),
        )?;
        answer_sized(call, request.size)
    }

    pub(crate) fn listxattr(&self, call: &mut Call<'_>) -> Answer {
        let request: GetxattrIn = call.arguments.take()?;
        let inode = self.inodes.get(call.header.nodeid)?;
        call.host.clear();
        call.host.reserve(MAX_VALUE);
        listxattr(ProcSelfFd::name(inode.as_fd()), spare_capacity(call.host))?;
        let acl = call.session.has(init::POSIX_ACL);
        call.scratch.clear();
        for name in call.host.split_inclusive(|byte| *byte == 0) {
            if is_visible(name.strip_suffix(&[0]).unwrap_or(name), acl) {
                call.scratch.extend_from_slice(name);
            }
        }
        answer_sized(call, request.size)
    }

    pub(crate) fn setxattr(&self, call: &mut Call<'_>) -> Answer {
        let request = if call.session.has(init::SETXATTR_EXT) {
            call.arguments.take()?
        } else {
            let compat: SetxattrCompatIn = call.arguments.take()?;
            SetxattrIn {
                size: compat.size,
                flags: compat.flags,
                ..SetxattrIn::default()
            }
        };
        let name = attribute(call)?;
        let size = usize::try_from(request.size).map_err(|_| Errno::TOOBIG)?;
        if size > MAX_VALUE {
            return Err(Errno::TOOBIG);
        }
        let value = call.arguments.bytes(size)?;
        let flags = XattrFlags::from_bits(request.flags).ok_or(Errno::INVAL)?;
        let inode = self.inodes.get(call.header.nodeid)?;
        let set = || setxattr(ProcSelfFd::name(inode.as_fd()), name, value, flags);
        if request.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 {
            // The host clears S_ISGID unless the setter is in the file's group or privileged; the
            // guest's kernel has found that its caller is neither.
            let caller = Caller {
                uid: call.header.uid,
                gid: call.header.gid,
                groups: Vec::new(),
                umask: 0,
            };
            call.credentials
                .as_caller(&caller, || call.credentials.without_fsetid(set))?;
        } else {
            set()?;
        }
        Ok(0)
    }

    pub(crate) fn removexattr(&self, call: &mut Call<'_>) -> Answer {
        let name = attribute(call)?;
        let inode = self.inodes.get(call.header.nodeid)?;
        removexattr(ProcSelfFd::name(inode.as_fd()), name)?;
        Ok(0)
    }
}

/// Answers with what is in `scratch`, or with its size if that is what was asked for.
fn answer_sized(call: &mut Call<'_>, size: u32) -> Answer {
    let length = u32::try_from(call.scratch.len()).map_err(|_| Errno::TOOBIG)?;
    if size == 0 {
        return call.answer(&GetxattrOut {
            size: length,
            padding: 0,
        });
    }
    if length > size || call.scratch.len() > call.room() {
        return Err(Errno::RANGE);
    }
    call.answer_scratch()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_attributes_stay_the_hosts() {
        assert!(is_visible(b"user.a", false));
        assert!(is_visible(b"security.capability", false));
        assert!(!is_visible(b"security.selinux", true));
        assert!(!is_visible(b"trusted.overlay.opaque", true));
        assert!(!is_visible(b"system.posix_acl_access", false));
        assert!(is_visible(b"system.posix_acl_access", true));
    }
}
