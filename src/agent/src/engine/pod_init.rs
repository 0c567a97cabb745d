// SPDX-License-Identifier: Apache-2.0
//! The first process of a pid namespace that the containers of a pod share, for pods whose runtime
//! makes no pause container: it reaps what is left to it, and does nothing else. It is a copy of
//! the helper, with an empty root, a user without a name and no capabilities: the containers see
//! it as process 1, and may look at what it has.

use std::path::PathBuf;

use rustix::fd::AsFd as _;
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::setsid;
use rustix::thread::{set_name, set_no_new_privs};

use super::capabilities::Sets;
use super::channel::Channel;
use super::plan::{ProcessPlan, Report, RootfsPlan};
use super::process::connect;
use super::{rootfs, user};
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};
use crate::sys;

/// The pod does not outlive it: the last that the kernel may choose, as for a pause container.
pub(super) const OOM_SCORE: i16 = -998;
/// The user of pause containers.
const NOBODY: u32 = 65535;
/// Covered by the empty root, in a mount namespace of its own.
const PLACE: &str = "/tmp";

/// Reports to the agent and stays. Only returns on failure.
pub(super) fn run(channel: &Channel) -> AgentError {
    match settle(channel).and_then(|()| {
        // The caller's too: it is never returned to.
        sys::process::close_from(3).context(|| "close descriptors")
    }) {
        Ok(()) => sys::process::reap_for_ever(),
        Err(error) => error,
    }
}

fn settle(channel: &Channel) -> Result<()> {
    setsid().context(|| "start a session")?;
    set_name(c"pause").context(|| "set its name")?;
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(|| "leave the propagation of mounts")?;
    let options = MountOptions::parse(&["ro", "nosuid", "nodev", "noexec", "size=4k"])?;
    let empty = mount::filesystem("tmpfs", "", &options)?;
    let place = mount::create_beneath(PLACE.as_ref(), Target::Directory).context(|| PLACE)?;
    mount::attach(&empty, place.as_fd(), &options)?;
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open /dev/null")?;
    let plan = RootfsPlan {
        path: PathBuf::from(PLACE),
        ..RootfsPlan::default()
    };
    rootfs::enter(&empty, &plan)?;
    connect(&null, &null, &null)?;
    let nobody = ProcessPlan {
        uid: NOBODY,
        gid: NOBODY,
        ..ProcessPlan::default()
    };
    Sets::default().limit()?;
    user::become_user(&nobody)?;
    Sets::default().apply(0)?;
    set_no_new_privs(true).context(|| "set no_new_privs")?;
    channel
        .send(&Report::Ready, &[])
        .context(|| "report to the agent")
}
