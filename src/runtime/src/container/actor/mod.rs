// SPDX-License-Identifier: Apache-2.0
//! The actor: a container's state machine.
//!
//! ```text
//!          Start            the guest says so
//! Created ------> Starting -----------------> Running --+-- ended --> Stopped -- Delete --> gone
//!    |               |                                  |                ^
//!    |               +---- the start failed, ended -----+----------------+
//!    +-- Delete: killed first ------------------------------------------ +
//! ```
//!
//! Each transition publishes its event, so every event comes once and in order: start before
//! exit, because an end that is heard of before the start's answer waits for it; exit before
//! delete, because only a stopped process is deleted.

pub(super) mod kill;
mod lifecycle;
mod requests;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use protocols::containerd::task_events::{TaskOOM, TaskPaused, TaskResumed};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::warn;

use super::io::{Stdio, Streams};
use super::process::Process;
use super::{Command, Exit, Handle, Registry, Reply, Snapshot};
use crate::agent::{Agent, ProcessName};
use crate::error::{Kind, Result, ShimError};
use crate::events::Publisher;
use crate::hooks::Hooks;
use crate::sandbox::Sandbox;

/// The exit status of a process whose end nobody saw: its machine is gone. containerd's own word
/// for "unknown".
pub(super) const UNKNOWN_STATUS: u32 = 255;

/// How long a machine may outlive the connection to its agent.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) const SIGKILL: u32 = 9;

/// The exit status of a process that SIGKILL ended.
const KILLED: u32 = 137;

/// The outcome of a call to the guest.
#[derive(Debug)]
pub(crate) enum Report {
    Started {
        exec: String,
        /// Its streams, unless they are there already.
        result: Result<Option<Box<Streams>>>,
        reply: Reply<u32>,
    },
    Ended {
        exec: String,
        exit: Exit,
    },
    Paused {
        result: Result<()>,
        reply: Reply<()>,
    },
    Resumed {
        result: Result<()>,
        reply: Reply<()>,
    },
    ExecDrained {
        exec: String,
        exit: Exit,
        reply: Reply<(u32, Exit)>,
    },
    Removed {
        exit: Exit,
        result: Result<()>,
        reply: Reply<(u32, Exit)>,
    },
}

/// What a container is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) id: String,
    pub(crate) bundle: String,
    /// The process of the host that is reported for it.
    pub(crate) pid: u32,
    pub(crate) stdio: Stdio,
    pub(crate) streams: Streams,
    pub(crate) sandbox: Arc<Sandbox>,
    /// Whether the sandbox is this container's, and ends with it.
    pub(crate) owns_sandbox: bool,
    pub(crate) events: Publisher,
    pub(crate) registry: Arc<Registry>,
    pub(crate) hooks: Hooks,
}

/// A container's actor.
#[derive(Debug)]
pub(crate) struct Actor {
    id: String,
    bundle: String,
    pid: u32,
    sandbox: Arc<Sandbox>,
    owns_sandbox: bool,
    events: Publisher,
    registry: Arc<Registry>,
    hooks: Hooks,
    handle: Handle,
    mailbox: mpsc::UnboundedReceiver<Command>,
    init: Process,
    /// Whether the guest has told the init's end; its output may still be under way then.
    init_ended: watch::Sender<bool>,
    execs: HashMap<String, Process>,
    paused: bool,
    /// A delete that waits for the end of a container that was never started.
    delete: Option<Reply<(u32, Exit)>>,
}

impl Actor {
    /// Starts the actor of a container that the guest has created.
    pub(crate) fn spawn(parts: Parts) -> Handle {
        let (sender, mailbox) = mpsc::unbounded_channel();
        let handle = Handle { mailbox: sender };
        let name = ProcessName {
            container: parts.id.clone(),
            exec: String::new(),
        };
        let mut init = Process::new(name, parts.stdio);
        init.streams = Some(parts.streams);
        let actor = Self {
            id: parts.id,
            bundle: parts.bundle,
            pid: parts.pid,
            sandbox: parts.sandbox,
            owns_sandbox: parts.owns_sandbox,
            events: parts.events,
            registry: parts.registry,
            hooks: parts.hooks,
            handle: handle.clone(),
            mailbox,
            init,
            init_ended: watch::Sender::new(false),
            execs: HashMap::new(),
            paused: false,
            delete: None,
        };
        actor.watch(&actor.init.name);
        tokio::spawn(actor.run());
        handle
    }

    async fn run(mut self) {
        while let Some(command) = self.mailbox.recv().await {
            match command {
                Command::Report(Report::Removed {
                    exit,
                    result,
                    reply,
                }) => {
                    if self.removed(exit, result, reply) {
                        return;
                    }
                }
                command => self.handle(command),
            }
        }
    }

    /// Nothing in here waits.
    fn handle(&mut self, command: Command) {
        match command {
            Command::Start { exec, reply } => self.start(exec, reply),
            Command::State { exec, reply } => {
                let _ = reply.send(self.state(&exec));
            }
            Command::Exec {
                exec,
                stdio,
                spec,
                reply,
            } => {
                let _ = reply.send(self.add_exec(exec, stdio, spec));
            }
            Command::Kill {
                exec,
                signal,
                all,
                reply,
            } => self.kill(&exec, signal, all, reply),
            Command::Wait { exec, reply } => match self.process(&exec) {
                Ok(process) => process.wait(reply),
                Err(error) => answer(reply, Err(error)),
            },
            Command::Delete { exec, reply } if exec.is_empty() => self.delete(reply),
            Command::Delete { exec, reply } => self.delete_exec(exec, reply),
            Command::Resize {
                exec,
                rows,
                columns,
                reply,
            } => {
                self.resize(&exec, rows, columns, reply);
            }
            Command::CloseStdin { exec, reply } => {
                answer(reply, self.process(&exec).map(Process::close_stdin));
            }
            Command::Pause { reply } => self.pause(reply),
            Command::Resume { reply } => self.resume(reply),
            Command::Update {
                resources,
                cpus,
                reply,
            } => self.update(*resources, &cpus, reply),
            Command::Stats { reply } => self.stats(reply),
            Command::OutOfMemory => self.events.publish(&TaskOOM {
                container_id: self.id.clone(),
                ..TaskOOM::default()
            }),
            Command::Report(report) => self.report(report),
        }
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Started {
                exec,
                result,
                reply,
            } => self.started(&exec, result, reply),
            Report::Ended { exec, exit } => self.ended(&exec, exit),
            Report::Paused { result, reply } => {
                if result.is_ok() {
                    self.paused = true;
                    self.events.publish(&TaskPaused {
                        container_id: self.id.clone(),
                        ..TaskPaused::default()
                    });
                }
                answer(reply, result);
            }
            Report::Resumed { result, reply } => {
                if result.is_ok() {
                    self.paused = false;
                    self.events.publish(&TaskResumed {
                        container_id: self.id.clone(),
                        ..TaskResumed::default()
                    });
                }
                answer(reply, result);
            }
            Report::ExecDrained { exec, exit, reply } => {
                self.execs.remove(&exec);
                answer(reply, Ok((self.pid, exit)));
            }
            // Ends the loop: `run` takes it.
            Report::Removed { .. } => {}
        }
    }

    fn process(&mut self, exec: &str) -> Result<&mut Process> {
        if exec.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs
            .get_mut(exec)
            .ok_or_else(|| ShimError::new(Kind::NotFound, format!("process {exec} does not exist")))
    }

    fn state(&mut self, exec: &str) -> Result<Snapshot> {
        let (bundle, pid, paused) = (self.bundle.clone(), self.pid, self.paused);
        let process = self.process(exec)?;
        Ok(Snapshot {
            bundle,
            // A process that was never started has none.
            pid: if process.spec.is_some() { 0 } else { pid },
            status: process.status(paused),
            stdio: process.stdio.clone(),
        })
    }

    /// Runs a call to the guest beside the actor.
    fn call<F>(&self, call: impl FnOnce(Agent) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        tokio::spawn(call(self.sandbox.agent().clone()));
    }

    /// Waits for a process's end beside the actor.
    fn watch(&self, name: &ProcessName) {
        let (sandbox, handle, name) =
            (Arc::clone(&self.sandbox), self.handle.clone(), name.clone());
        tokio::spawn(async move {
            let status = match sandbox.agent().wait(&name).await {
                Ok(status) => status,
                Err(error) => {
                    if error.kind() == Kind::Unavailable {
                        await_end(&sandbox).await;
                    }
                    if sandbox.was_stopped() {
                        // The end of the sandbox is the end of what ran in it.
                        KILLED
                    } else {
                        warn!(process = ?name, error = error.chain(), "exit status unknown");
                        UNKNOWN_STATUS
                    }
                }
            };
            let exit = Exit {
                status,
                at: SystemTime::now(),
            };
            handle.tell(Command::Report(Report::Ended {
                exec: name.exec,
                exit,
            }));
        });
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T>) {
    // Whoever asked may have gone; what was done is done.
    let _ = reply.send(result);
}

/// The connection to the agent broke: waits for the machine's end, and brings it about if need
/// be. A guest without its agent is of no use to anybody.
async fn await_end(sandbox: &Sandbox) {
    if timeout(ORPHAN_TIMEOUT, sandbox.ended()).await.is_err() {
        warn!(
            sandbox = sandbox.id(),
            "the agent is gone and its machine is not: stopped"
        );
        // The end may be told before the machine's process is gone.
        tokio::select! {
            () = sandbox.kill() => {}
            _ = sandbox.ended() => {}
        }
    }
}
