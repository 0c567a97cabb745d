// SPDX-License-Identifier: Apache-2.0
//! Checked instructions for the helper: nothing in here needs to be looked at twice.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::capabilities::Sets;
use super::devices::Node;
use super::hooks::Hooks;
use super::rlimits::Limit;
use super::seccomp::Profile;
use super::user_namespace::Mappings;
use crate::error::AgentError;
use crate::mount::{MountOptions, Propagation};

/// What the helper shall do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) enum Job {
    /// Make a container and its first process, which waits for the word to execute.
    Create(Box<ContainerPlan>),
    /// Start one more process in a container, which executes at once.
    Exec(Box<ProcessPlan>),
    /// Make a pid namespace whose first process reaps what is left to it.
    PidNamespace,
}

impl Job {
    /// The process of a container that comes to be.
    pub(crate) fn process(&self) -> Option<&ProcessPlan> {
        match self {
            Self::Create(plan) => Some(&plan.process),
            Self::Exec(plan) => Some(plan),
            Self::PidNamespace => None,
        }
    }

    /// Whether that process gets three pipes.
    pub(crate) fn has_pipes(&self) -> bool {
        self.process()
            .is_some_and(|process| process.terminal.is_none())
    }
}

/// A container.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ContainerPlan {
    /// Namespaces to make, each once.
    pub(crate) new_namespaces: Vec<Namespace>,
    /// Namespaces to join; their descriptors are passed in this order.
    pub(crate) joined_namespaces: Vec<Namespace>,
    pub(crate) rootfs: RootfsPlan,
    /// `None` leaves the host name of the UTS namespace.
    pub(crate) hostname: Option<String>,
    /// Paths below `/proc/sys` and values.
    pub(crate) sysctls: Vec<(String, String)>,
    /// Of a new user namespace.
    pub(crate) mappings: Option<Mappings>,
    pub(crate) hooks: Hooks,
    pub(crate) process: ProcessPlan,
}

/// Kinds of namespaces that this agent makes or joins.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) enum Namespace {
    Mount,
    Pid,
    Ipc,
    Uts,
    Network,
    Cgroup,
    User,
    Time,
}

impl Namespace {
    /// The `CLONE_NEW*` flag.
    pub(crate) fn flag(self) -> u64 {
        let flag = match self {
            Self::Mount => libc::CLONE_NEWNS,
            Self::Pid => libc::CLONE_NEWPID,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Network => libc::CLONE_NEWNET,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
            Self::User => libc::CLONE_NEWUSER,
            Self::Time => CLONE_NEWTIME,
        };
        u64::from(flag.cast_unsigned())
    }
}

/// `clone3(2)` has it, older calls use the bit otherwise.
const CLONE_NEWTIME: libc::c_int = 0x80;

/// The container's file system.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct RootfsPlan {
    /// Where it is in the guest.
    pub(crate) path: PathBuf,
    pub(crate) readonly: bool,
    pub(crate) propagation: Option<Propagation>,
    pub(crate) mounts: Vec<MountPlan>,
    /// Device nodes besides the six that every container has.
    pub(crate) devices: Vec<Node>,
    pub(crate) masked: Vec<PathBuf>,
    pub(crate) readonly_paths: Vec<PathBuf>,
}

/// One mount of a container.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct MountPlan {
    /// As seen from the container.
    pub(crate) destination: PathBuf,
    /// A path of the guest for a bind, a name for anything else.
    pub(crate) source: String,
    /// The type of file system; not used for a bind.
    pub(crate) kind: String,
    pub(crate) options: MountOptions,
}

impl MountPlan {
    /// What failed, with the mount's name.
    pub(super) fn failed(&self, error: &AgentError) -> AgentError {
        let source = if self.source.is_empty() {
            &self.kind
        } else {
            &self.source
        };
        let place = &self.destination;
        let line = format!("mount {source:?} on {place:?}: {}", error.line());
        AgentError::new(error.kind(), line)
    }
}

/// A process in a container.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct ProcessPlan {
    /// Not empty.
    pub(crate) arguments: Vec<String>,
    /// `NAME=value`.
    pub(crate) environment: Vec<String>,
    /// Absolute.
    pub(crate) cwd: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) capabilities: Sets,
    pub(crate) limits: Vec<Limit>,
    pub(crate) no_new_privileges: bool,
    /// -1000 to 1000.
    pub(crate) oom_score_adjust: i16,
    /// `None`: three pipes instead.
    pub(crate) terminal: Option<WindowSize>,
    pub(crate) seccomp: Option<Profile>,
    /// Whether the container has a user namespace: ids and rights are those in it.
    pub(crate) user_namespace: bool,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct WindowSize {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// What the helper and the new process report.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) enum Report {
    /// The process exists: its pid; its pidfd is passed along.
    Spawned(i32),
    /// The container's file system is mounted; the process waits for the hooks of that moment.
    Mounted,
    /// The process is ready to execute; with a terminal, its master side is passed along.
    Ready,
    /// It failed and ends.
    Failed(crate::error::Failure),
}

/// The word that a process waits for before it goes on: into its root, or to its program.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Go;
