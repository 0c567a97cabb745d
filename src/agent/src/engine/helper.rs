// SPDX-License-Identifier: Apache-2.0
//! The helper: this binary, executed again, with one thread. It joins the namespaces that exist,
//! clones the new process as a child of the agent, and ends.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces,
};

use super::channel::Channel;
use super::plan::{ContainerPlan, Job, Namespace, Report};
use super::pod_init;
use super::process::{self, Inherited};
use super::seccomp::Profile;
use super::user_namespace::{self, Prepared};
use crate::error::{AgentError, Context as _, Failure, Result};
use crate::sys::clone::{Side, SingleThreaded, clone_sibling};
use crate::sys::process::exit_now;

/// The argument that tells a helper from the agent.
pub(crate) const ROLE: &str = "container-helper";

/// A container's namespaces, for an exec. All but the cgroup namespace: from within it the helper
/// could not clone into the container's cgroup, as its own lies outside (cgroup v2, "nsdelegate").
/// And not the user namespace, from within which none of another owner can be joined.
const JOINED: ThreadNameSpaceType = ThreadNameSpaceType::MOUNT
    .union(ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME)
    .union(ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION)
    .union(ThreadNameSpaceType::PROCESS_ID)
    .union(ThreadNameSpaceType::TIME)
    .union(ThreadNameSpaceType::NETWORK);

/// Does one job, which comes over standard input. What fails is reported there.
pub(crate) fn main() {
    // Away from the numbers that become the new process's streams.
    let Ok(socket) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else {
        return;
    };
    let channel = Channel::new(socket);
    if let Err(error) = work(&channel) {
        let _ = channel.send_plain(&Report::Failed(Failure::from(&error)));
    }
}

fn work(channel: &Channel) -> Result<()> {
    // While /proc is still the guest's.
    let proof = SingleThreaded::prove().context(|| "helper")?;
    // From here on no process of a container may trace this one or look into it (CVE-2016-9962).
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context(|| "protect the helper")?;
    let (job, descriptors) = channel.receive::<Job>().context(|| "receive the job")?;
    let descriptors = Descriptors::split(descriptors, &job)?;
    let mut filter = None;
    if let Some(process) = job.process() {
        filter = process.seccomp.as_ref().map(Profile::compile).transpose()?;
        adjust_oom_score(process.oom_score_adjust)?;
        if process.user_namespace {
            user_namespace::open_streams(&descriptors.streams);
            for limit in &process.limits {
                limit.raise()?;
            }
        }
    } else {
        adjust_oom_score(pod_init::OOM_SCORE)?;
    }
    let own_file = own_file()?;
    let namespaces = join(&job, &descriptors)?;
    let prepared = match &job {
        Job::Create(plan) => {
            let user = descriptors.user_namespace(plan);
            user_namespace::enter(&proof, plan, user)?
        }
        Job::Exec(_) | Job::PidNamespace => Prepared::default(),
    };
    let side = clone_sibling(&proof, namespaces, descriptors.cgroup.as_fd())
        .context(|| "clone the process")?;
    match side {
        Side::Parent(pid, pidfd) => channel
            .send(&Report::Spawned(pid), &[pidfd.as_fd()])
            .context(|| "report to the agent"),
        Side::Child => {
            let inherited = Inherited {
                channel,
                streams: descriptors.streams,
                init: descriptors.init,
                filter,
                prepared,
                own_file,
            };
            let error = match &job {
                Job::Create(plan) => process::container(plan, &inherited),
                Job::Exec(plan) => process::exec(plan, &inherited),
                Job::PidNamespace => pod_init::run(channel),
            };
            let _ = channel.send_plain(&Report::Failed(Failure::from(&error)));
            exit_now(1)
        }
    }
}

/// Device and file number of this binary.
fn own_file() -> Result<(u64, u64)> {
    let status = rustix::fs::stat("/proc/self/exe").context(|| "look at the helper's file")?;
    Ok((status.st_dev, status.st_ino))
}

fn adjust_oom_score(score: i16) -> Result<()> {
    if score == 0 {
        return Ok(());
    }
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .context(|| format!("set oom_score_adj {score}"))
}

/// Joins what exists already; the result is what the clone shall make new.
fn join(job: &Job, descriptors: &Descriptors) -> Result<u64> {
    match job {
        Job::Create(plan) => {
            let joined = plan.joined_namespaces.iter().zip(&descriptors.namespaces);
            // The user namespace comes last: its rights may not reach the others.
            for (kind, namespace) in joined.filter(|(kind, _)| **kind != Namespace::User) {
                move_into_link_name_space(namespace.as_fd(), None)
                    .context(|| format!("join the {kind:?} namespace"))?;
            }
            if plan.joined_namespaces.contains(&Namespace::Uts) {
                plan.set_hostname()?;
            }
            Ok(plan
                .new_namespaces
                .iter()
                // Made by the process itself, once it is in its cgroup, and by the helper before.
                .filter(|kind| !matches!(kind, Namespace::Cgroup | Namespace::User))
                .fold(0, |flags, kind| flags | kind.flag()))
        }
        Job::Exec(_) => {
            if let Some(init) = &descriptors.init {
                move_into_thread_name_spaces(init.as_fd(), JOINED)
                    .context(|| "join the container's namespaces")?;
            }
            Ok(0)
        }
        Job::PidNamespace => Ok(Namespace::Pid.flag() | Namespace::Mount.flag()),
    }
}

/// What comes with a job, in this order.
#[derive(Debug)]
struct Descriptors {
    cgroup: OwnedFd,
    /// The container's first process, for an exec.
    init: Option<OwnedFd>,
    /// None with a terminal.
    streams: Vec<OwnedFd>,
    /// Namespaces to join.
    namespaces: Vec<OwnedFd>,
}

impl Descriptors {
    /// The user namespace that a container joins.
    fn user_namespace(&self, plan: &ContainerPlan) -> Option<BorrowedFd<'_>> {
        let user = |kind: &Namespace| *kind == Namespace::User;
        let index = plan.joined_namespaces.iter().position(user)?;
        self.namespaces.get(index).map(AsFd::as_fd)
    }

    fn split(all: Vec<OwnedFd>, job: &Job) -> Result<Self> {
        let missing = || AgentError::internal("the job lacks a descriptor");
        let mut all = all.into_iter();
        let cgroup = all.next().ok_or_else(missing)?;
        let init = match job {
            Job::Create(_) | Job::PidNamespace => None,
            Job::Exec(_) => Some(all.next().ok_or_else(missing)?),
        };
        let streams = if job.has_pipes() { 3 } else { 0 };
        Ok(Self {
            cgroup,
            init,
            streams: all.by_ref().take(streams).collect(),
            namespaces: all.collect(),
        })
    }
}
