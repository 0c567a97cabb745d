// SPDX-License-Identifier: Apache-2.0
//! The user that a process runs as.

use std::io::Read as _;

use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid, openat2};
use rustix::io::Errno;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::plan::ProcessPlan;
use crate::error::{Context as _, Result};

/// A passwd file of a container is read this far.
const LONGEST: u64 = 1 << 20;

/// Becomes the plan's user and groups. The process has one thread.
///
/// # Errors
///
/// The kernel's, with the ids.
pub(crate) fn become_user(plan: &ProcessPlan) -> Result<()> {
    let groups: Vec<Gid> = plan.groups.iter().copied().map(Gid::from_raw).collect();
    set_thread_groups(&groups).context(|| format!("set groups {:?}", plan.groups))?;
    let gid = Gid::from_raw(real(plan.gid).context(|| format!("set gid {}", plan.gid))?);
    set_thread_res_gid(gid, gid, gid).context(|| format!("set gid {}", plan.gid))?;
    let uid = Uid::from_raw(real(plan.uid).context(|| format!("set uid {}", plan.uid))?);
    set_thread_res_uid(uid, uid, uid).context(|| format!("set uid {}", plan.uid))
}

/// Becomes the root of the user namespace that this process is in, with no other groups.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn become_root() -> Result<()> {
    let context = || "become the root of the user namespace";
    set_thread_groups(&[]).context(context)?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).context(context)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).context(context)
}

/// To the kernel, -1 asks for no change: the process would stay root (setresuid(2)).
fn real(id: u32) -> std::result::Result<u32, Errno> {
    (id != u32::MAX).then_some(id).ok_or(Errno::INVAL)
}

/// The home folder that the container's own passwd file gives `uid`, else `/`.
pub(crate) fn home(uid: u32) -> String {
    let mut text = String::new();
    let file = openat2(
        rustix::fs::CWD,
        "/etc/passwd",
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    );
    if let Ok(file) = file {
        // A file that is not text leaves what was read before.
        let _ = std::fs::File::from(file)
            .take(LONGEST)
            .read_to_string(&mut text);
    }
    home_in(&text, uid).unwrap_or("/").to_owned()
}

fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        // name:password:uid:gid:comment:home:shell
        let mut fields = line.split(':');
        let found = fields.nth(2)?.parse() == Ok(uid);
        fields.nth(2).filter(|home| found && !home.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minus_one_is_nobody() {
        assert_eq!(real(u32::MAX), Err(Errno::INVAL));
        assert_eq!(real(0), Ok(0));
    }

    #[test]
    fn finds_the_home_of_a_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbad line\na:x:7:7::/home/a:/bin/sh\nb:x:8:8::";
        assert_eq!(home_in(passwd, 0), Some("/root"));
        assert_eq!(home_in(passwd, 7), Some("/home/a"));
        assert_eq!(home_in(passwd, 8), None);
        assert_eq!(home_in(passwd, 9), None);
    }
}
