// SPDX-License-Identifier: Apache-2.0
//! The container that stands for a pod's sandbox, without a process.
//!
//! Kubernetes' "pause" container holds a pod's namespaces open and does nothing else. Here the
//! machine does that, so nothing runs in the guest for it: it lives as long as the machine, a
//! signal that would end the program ends the machine, and its exit is reported when everything
//! of the pod is gone from the host. So a network that is taken down after it has no user left.

use std::sync::Arc;
use std::time::SystemTime;

use protobuf::MessageField;
use protocols::agent::agent::StatsContainerResponse;
use protocols::containerd::task_events::{
    TaskDelete, TaskExit, TaskPaused, TaskResumed, TaskStart,
};
use tokio::select;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::actor::{Parts, SIGKILL, UNKNOWN_STATUS};
use super::io::{Stdio, Streams};
use super::process::precondition;
use super::{Command, Exit, Handle, Registry, Reply, Snapshot, Status};
use crate::error::{Kind, Result, ShimError};
use crate::events::Publisher;
use crate::hooks::Hooks;
use crate::sandbox::Sandbox;

/// What the program answers to SIGINT and SIGTERM, its only handlers: an orderly end.
const ORDERLY: [u32; 2] = [2, 15];

/// Killed by SIGKILL.
const KILLED: u32 = 137;

/// What happens beside the actor.
#[derive(Debug)]
enum Note {
    /// The machine has ended by itself.
    MachineEnded,
    /// Nothing of the sandbox is left.
    Gone(Exit),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Running,
    Paused,
    Stopped(Exit),
}

/// The actor.
#[derive(Debug)]
pub(crate) struct Pause {
    id: String,
    bundle: String,
    pid: u32,
    stdio: Stdio,
    /// Open as long as a process would hold them, for whoever reads them.
    streams: Option<Streams>,
    sandbox: Arc<Sandbox>,
    events: Publisher,
    registry: Arc<Registry>,
    hooks: Hooks,
    mailbox: mpsc::UnboundedReceiver<Command>,
    notes: mpsc::UnboundedReceiver<Note>,
    notify: mpsc::UnboundedSender<Note>,
    phase: Phase,
    /// The end has begun.
    ending: bool,
    waiters: Vec<Reply<Exit>>,
    /// Waits for the end of a container that was never started.
    delete: Option<Reply<(u32, Exit)>>,
}

impl Pause {
    /// Starts the actor of a sandbox whose machine runs.
    pub(crate) fn spawn(parts: Parts) -> Handle {
        let (sender, mailbox) = mpsc::unbounded_channel();
        let (notify, notes) = mpsc::unbounded_channel();
        let actor = Self {
            id: parts.id,
            bundle: parts.bundle,
            pid: parts.pid,
            stdio: parts.stdio,
            streams: Some(parts.streams),
            sandbox: parts.sandbox,
            events: parts.events,
            registry: parts.registry,
            hooks: parts.hooks,
            mailbox,
            notes,
            notify,
            phase: Phase::Created,
            ending: false,
            waiters: Vec::new(),
            delete: None,
        };
        let (sandbox, notify) = (Arc::clone(&actor.sandbox), actor.notify.clone());
        tokio::spawn(async move {
            sandbox.ended().await;
            let _ = notify.send(Note::MachineEnded);
        });
        tokio::spawn(actor.run());
        Handle { mailbox: sender }
    }

    async fn run(mut self) {
        loop {
            let deleted = select! {
                // The sender is this actor's own.
                Some(note) = self.notes.recv() => match note {
                    Note::MachineEnded => {
                        self.end(UNKNOWN_STATUS);
                        false
                    }
                    Note::Gone(exit) => self.ended(exit),
                },
                command = self.mailbox.recv() => match command {
                    Some(command) => self.handle(command),
                    None => true,
                },
            };
            if deleted {
                return;
            }
        }
    }

    /// Nothing in here waits. Whether the container is deleted.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Start { exec, reply } => {
                answer(reply, only_init(&exec).and_then(|()| self.start()));
            }
            Command::State { exec, reply } => {
                answer(reply, only_init(&exec).map(|()| self.state()));
            }
            Command::Exec { reply, .. } => answer(reply, Err(self.no_process())),
            Command::Kill {
                exec,
                signal,
                reply,
                ..
            } => answer(reply, only_init(&exec).and_then(|()| self.kill(signal))),
            Command::Wait { exec, reply } => match (only_init(&exec), self.phase) {
                (Err(error), _) => answer(reply, Err(error)),
                (_, Phase::Stopped(exit)) => answer(reply, Ok(exit)),
                _ => self.waiters.push(reply),
            },
            Command::Delete { exec, reply } => match only_init(&exec) {
                Err(error) => answer(reply, Err(error)),
                Ok(()) => return self.delete(reply),
            },
            // Without a terminal there is nothing to do, and nobody reads the input.
            Command::Resize { exec, reply, .. } | Command::CloseStdin { exec, reply } => {
                answer(reply, only_init(&exec));
            }
            Command::Pause { reply } => answer(reply, self.pause()),
            Command::Resume { reply } => answer(reply, self.resume()),
            Command::Update { reply, .. } => answer(reply, Err(self.no_process())),
            // What the guest uses for it: nothing.
            Command::Stats { reply } => answer(reply, Ok(StatsContainerResponse::new())),
            Command::OutOfMemory | Command::Report(_) => {}
        }
        false
    }

    fn start(&mut self) -> Result<u32> {
        match self.phase {
            Phase::Created if !self.ending => {}
            Phase::Created | Phase::Stopped(_) => {
                return Err(precondition("the sandbox has ended"));
            }
            Phase::Running | Phase::Paused => {
                return Err(precondition("the sandbox runs already"));
            }
        }
        self.phase = Phase::Running;
        info!(container = self.id, "started");
        self.events.publish(&TaskStart {
            container_id: self.id.clone(),
            pid: self.pid,
            ..TaskStart::default()
        });
        let (hooks, pid) = (self.hooks.clone(), self.pid);
        tokio::spawn(async move { hooks.poststart(pid).await });
        Ok(self.pid)
    }

    fn state(&self) -> Snapshot {
        Snapshot {
            bundle: self.bundle.clone(),
            pid: self.pid,
            status: match self.phase {
                Phase::Created => Status::Created,
                Phase::Running => Status::Running,
                Phase::Paused => Status::Paused,
                Phase::Stopped(exit) => Status::Stopped(exit),
            },
            stdio: self.stdio.clone(),
        }
    }

    fn kill(&mut self, signal: u32) -> Result<()> {
        if let Phase::Stopped(_) = self.phase {
            return Err(ShimError::new(Kind::NotFound, "process already finished"));
        }
        if signal == SIGKILL {
            self.end(KILLED);
        } else if ORDERLY.contains(&signal) {
            self.end(0);
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        if self.phase != Phase::Running {
            return Err(precondition("the sandbox does not run"));
        }
        self.phase = Phase::Paused;
        self.events.publish(&TaskPaused {
            container_id: self.id.clone(),
            ..TaskPaused::default()
        });
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        if self.phase != Phase::Paused {
            return Err(precondition("the sandbox is not paused"));
        }
        self.phase = Phase::Running;
        self.events.publish(&TaskResumed {
            container_id: self.id.clone(),
            ..TaskResumed::default()
        });
        Ok(())
    }

    fn no_process(&self) -> ShimError {
        let id = &self.id;
        ShimError::new(
            Kind::Unimplemented,
            format!("{id} stands for its pod and has no process: ask a container of the pod"),
        )
    }

    /// Ends the machine, and with it everything that runs in the pod.
    fn end(&mut self, status: u32) {
        if self.ending {
            return;
        }
        self.ending = true;
        let (sandbox, notify) = (Arc::clone(&self.sandbox), self.notify.clone());
        let hooks = self.hooks.clone();
        tokio::spawn(async move {
            if let Err(error) = sandbox.stop().await {
                warn!(
                    sandbox = sandbox.id(),
                    error = error.chain(),
                    "not all removed"
                );
            }
            hooks.poststop().await;
            let at = SystemTime::now();
            let _ = notify.send(Note::Gone(Exit { status, at }));
        });
    }

    fn ended(&mut self, exit: Exit) -> bool {
        self.phase = Phase::Stopped(exit);
        self.streams = None;
        info!(container = self.id, status = exit.status, "ended");
        self.events.publish(&TaskExit {
            id: self.id.clone(),
            container_id: self.id.clone(),
            pid: self.pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..TaskExit::default()
        });
        for waiter in self.waiters.drain(..) {
            answer(waiter, Ok(exit));
        }
        match self.delete.take() {
            Some(reply) => self.delete(reply),
            None => false,
        }
    }

    fn delete(&mut self, reply: Reply<(u32, Exit)>) -> bool {
        match self.phase {
            Phase::Stopped(exit) => {
                self.events.publish(&TaskDelete {
                    container_id: self.id.clone(),
                    pid: self.pid,
                    exit_status: exit.status,
                    exited_at: MessageField::some(exit.at.into()),
                    ..TaskDelete::default()
                });
                self.registry.remove(&self.id);
                answer(reply, Ok((self.pid, exit)));
                return true;
            }
            Phase::Created if self.delete.is_none() => {
                self.delete = Some(reply);
                self.end(KILLED);
            }
            Phase::Created => answer(reply, Err(precondition("the sandbox is being deleted"))),
            Phase::Running | Phase::Paused => {
                answer(reply, Err(precondition("the sandbox still runs")));
            }
        }
        false
    }
}

fn only_init(exec: &str) -> Result<()> {
    if exec.is_empty() {
        return Ok(());
    }
    Err(ShimError::new(
        Kind::NotFound,
        format!("process {exec} does not exist"),
    ))
}

fn answer<T>(reply: Reply<T>, result: Result<T>) {
    // Whoever asked may have gone; what was done is done.
    let _ = reply.send(result);
}
