// SPDX-License-Identifier: Apache-2.0
//! Containers: an actor each, and how to talk to it.
//!
//! An actor owns its container's state and changes it one message at a time. It never waits for
//! the guest: a call to the agent runs as a task of its own and comes back as a message, so that
//! one slow call delays nothing but its own answer.

mod actor;
pub(crate) mod io;
mod output;
mod passed;
mod pause;
mod process;
mod registry;
#[cfg(test)]
mod tests;

use std::time::SystemTime;

use protocols::agent::agent::StatsContainerResponse;
use protocols::agent::oci;
use tokio::sync::{mpsc, oneshot};

pub(crate) use actor::{Actor, Parts};
pub(crate) use pause::Pause;
pub(crate) use registry::{Registry, Reservation};

use self::actor::Report;
use self::io::Stdio;
use crate::error::{Kind, Result, ShimError};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// A process's state, in containerd's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped(Exit),
}

/// What `State` answers.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) bundle: String,
    pub(crate) pid: u32,
    pub(crate) status: Status,
    pub(crate) stdio: Stdio,
}

/// Where an answer goes.
type Reply<T> = oneshot::Sender<Result<T>>;

/// What a container can be asked. `exec` names a process, empty for the container's init.
#[derive(Debug)]
pub(crate) enum Command {
    Start {
        exec: String,
        reply: Reply<u32>,
    },
    State {
        exec: String,
        reply: Reply<Snapshot>,
    },
    Exec {
        exec: String,
        stdio: Stdio,
        spec: Box<oci::Process>,
        reply: Reply<()>,
    },
    Kill {
        exec: String,
        signal: u32,
        all: bool,
        reply: Reply<()>,
    },
    Wait {
        exec: String,
        reply: Reply<Exit>,
    },
    Delete {
        exec: String,
        reply: Reply<(u32, Exit)>,
    },
    Resize {
        exec: String,
        rows: u32,
        columns: u32,
        reply: Reply<()>,
    },
    CloseStdin {
        exec: String,
        reply: Reply<()>,
    },
    Pause {
        reply: Reply<()>,
    },
    Resume {
        reply: Reply<()>,
    },
    Update {
        resources: Box<oci::LinuxResources>,
        /// CPUs of the host that it may run on; empty for no change.
        cpus: String,
        reply: Reply<()>,
    },
    Stats {
        reply: Reply<StatsContainerResponse>,
    },
    /// The guest says that the container ran out of memory.
    OutOfMemory,
    /// A call to the guest is done.
    Report(Report),
}

/// A container's mailbox.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    mailbox: mpsc::UnboundedSender<Command>,
}

impl Handle {
    /// Asks, and waits for the answer.
    pub(crate) async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        // A container that was deleted meanwhile answers nothing.
        let gone = || ShimError::new(Kind::NotFound, "the container does not exist any more");
        self.mailbox.send(command(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Tells, without an answer.
    pub(crate) fn tell(&self, command: Command) {
        // A container that is gone needs to know nothing.
        let _ = self.mailbox.send(command);
    }
}
