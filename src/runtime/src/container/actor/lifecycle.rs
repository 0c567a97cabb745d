// SPDX-License-Identifier: Apache-2.0
//! From created to deleted: the transitions of the actor's processes, each with its event.

use std::mem;
use std::sync::Arc;
use std::time::SystemTime;

use protobuf::MessageField;
use protocols::agent::agent::ExecProcessRequest;
use protocols::agent::oci;
use protocols::containerd::task_events::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskStart,
};
use tracing::{debug, info, warn};

use super::{Actor, KILLED, Report, UNKNOWN_STATUS, answer};
use crate::agent::ProcessName;
use crate::container::io::{Pumps, Stdio, Streams};
use crate::container::process::{Phase, Process, precondition};
use crate::container::{Command, Exit, Reply};
use crate::error::{Kind, Result, ShimError};

impl Actor {
    pub(super) fn add_exec(
        &mut self,
        exec: String,
        stdio: Stdio,
        spec: Box<oci::Process>,
    ) -> Result<()> {
        match self.init.phase {
            Phase::Stopped(_) | Phase::Deleting(_) => {
                return Err(precondition("the container does not run"));
            }
            _ if self.paused => return Err(precondition("the container is paused")),
            _ => {}
        }
        if self.execs.contains_key(&exec) {
            return Err(ShimError::new(
                Kind::AlreadyExists,
                format!("process {exec} exists already"),
            ));
        }
        let name = ProcessName {
            container: self.id.clone(),
            exec: exec.clone(),
        };
        let mut process = Process::new(name, stdio);
        process.spec = Some(spec);
        self.events.publish(&TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: exec.clone(),
            ..TaskExecAdded::default()
        });
        self.execs.insert(exec, process);
        Ok(())
    }

    pub(super) fn start(&mut self, exec: String, reply: Reply<u32>) {
        let handle = self.handle.clone();
        let init_runs = self.init.phase == Phase::Running;
        let process = match self.process(&exec) {
            Ok(process) => process,
            Err(error) => return answer(reply, Err(error)),
        };
        if !exec.is_empty() && !init_runs {
            return answer(reply, Err(precondition("the container does not run")));
        }
        if let Err(error) = process.begin_start() {
            return answer(reply, Err(error));
        }
        let report = move |exec, result, reply| {
            handle.tell(Command::Report(Report::Started {
                exec,
                result,
                reply,
            }));
        };
        let name = process.name.clone();
        let Some(mut spec) = process.spec.take() else {
            let sandbox = Arc::clone(&self.sandbox);
            return self.call(|agent| async move {
                // Whoever wires the network between create and start (Docker) has done so.
                let result = match sandbox.follow_network().await {
                    Ok(()) => agent.start_container(&name.container).await,
                    Err(error) => Err(error),
                };
                report(exec, result.map(|()| None), reply);
            });
        };
        let mut streams = match process.stdio.open() {
            Ok(streams) => streams,
            Err(error) => return report(exec, Err(error), reply),
        };
        spec.Terminal = process.stdio.terminal;
        let sandbox = Arc::clone(&self.sandbox);
        self.call(|agent| async move {
            let begun = async {
                let ports = sandbox.pass(&mut streams).await?;
                let request = ExecProcessRequest {
                    container_id: name.container,
                    exec_id: name.exec,
                    process: MessageField::some(*spec),
                    stdin_port: ports.stdin,
                    stdout_port: ports.stdout,
                    stderr_port: ports.stderr,
                    ..Default::default()
                };
                agent.exec(&request).await
            };
            let result = begun.await.map(|()| Some(Box::new(streams)));
            report(exec, result, reply);
        });
    }

    pub(super) fn started(
        &mut self,
        exec: &str,
        result: Result<Option<Box<Streams>>>,
        reply: Reply<u32>,
    ) {
        let agent = self.sandbox.agent().clone();
        let process = match self.process(exec) {
            Ok(process) => process,
            Err(error) => return answer(reply, Err(error)),
        };
        let ended = match process.phase {
            Phase::Starting { ended } => ended,
            _ => None,
        };
        match result {
            Err(error) => {
                if exec.is_empty() {
                    // The guest has ended, or will end, what it could not start.
                    process.phase = Phase::Created;
                } else {
                    // Nothing ever ran, so nothing exits: no event.
                    process.end(Exit {
                        status: UNKNOWN_STATUS,
                        at: SystemTime::now(),
                    });
                }
                info!(
                    container = self.id,
                    exec,
                    error = error.chain(),
                    "not started"
                );
                answer(reply, Err(error));
            }
            Ok(streams) => {
                process.phase = Phase::Running;
                if let Some(streams) = streams {
                    process.put_streams(*streams);
                }
                let streams = process.streams.take();
                process.pumps = streams.map(|streams| streams.pump(&agent, &process.name));
                let name = process.name.clone();
                info!(container = self.id, exec, "started");
                self.publish_start(exec);
                if exec.is_empty() {
                    let (hooks, pid) = (self.hooks.clone(), self.pid);
                    tokio::spawn(async move { hooks.poststart(pid).await });
                } else {
                    self.watch(&name);
                }
                answer(reply, Ok(self.pid));
            }
        }
        if let Some(exit) = ended {
            self.ended(exec, exit);
        }
    }

    fn publish_start(&self, exec: &str) {
        let (container_id, pid) = (self.id.clone(), self.pid);
        if exec.is_empty() {
            self.events.publish(&TaskStart {
                container_id,
                pid,
                ..TaskStart::default()
            });
        } else {
            self.events.publish(&TaskExecStarted {
                container_id,
                exec_id: exec.to_owned(),
                pid,
                ..TaskExecStarted::default()
            });
        }
    }

    /// A process has ended.
    pub(super) fn ended(&mut self, exec: &str, exit: Exit) {
        let id = self.id.clone();
        let handle = self.handle.clone();
        if exec.is_empty() {
            self.init_ended.send_replace(true);
        }
        let Ok(process) = self.process(exec) else {
            return;
        };
        match &mut process.phase {
            Phase::Starting { ended } => {
                *ended = Some(exit);
                return;
            }
            Phase::Created | Phase::Running => {}
            Phase::Stopped(_) | Phase::Deleting(_) => return,
        }
        if let Some(settled) = process.pumps.as_mut().and_then(Pumps::process_ended) {
            process.ending = Some(exit);
            let exec = exec.to_owned();
            tokio::spawn(async move {
                settled.await;
                handle.tell(Command::Report(Report::Ended { exec, exit }));
            });
            return;
        }
        process.end(exit);
        info!(container = id, exec, status = exit.status, "ended");
        self.publish_exit(exec, exit);
        if exec.is_empty()
            && let Some(reply) = self.delete.take()
        {
            self.remove(exit, reply);
        }
    }

    fn publish_exit(&self, exec: &str, exit: Exit) {
        // containerd knows a container's init by the container's own name.
        let id = if exec.is_empty() { &self.id } else { exec };
        self.events.publish(&TaskExit {
            id: id.to_owned(),
            container_id: self.id.clone(),
            pid: self.pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..TaskExit::default()
        });
    }

    /// The container is gone, and with it what ran in it: ends the execs whose end was not told.
    fn end_execs(&mut self) {
        for (exec, mut process) in mem::take(&mut self.execs) {
            let started = match process.phase {
                Phase::Created | Phase::Starting { .. } => false,
                Phase::Running => true,
                Phase::Stopped(_) | Phase::Deleting(_) => continue,
            };
            let exit = process.ending.unwrap_or_else(|| Exit {
                status: KILLED,
                at: SystemTime::now(),
            });
            process.end(exit);
            // What was not started has no exit that could come after its start.
            if started {
                info!(container = self.id, exec, "ended with its container");
                self.publish_exit(&exec, exit);
            }
        }
    }

    pub(super) fn delete_exec(&mut self, exec: String, reply: Reply<(u32, Exit)>) {
        let handle = self.handle.clone();
        let process = match self.process(&exec) {
            Ok(process) => process,
            Err(error) => return answer(reply, Err(error)),
        };
        let exit = match process.phase {
            // Added, but never started.
            Phase::Created => Exit {
                status: 0,
                at: SystemTime::now(),
            },
            Phase::Stopped(exit) => exit,
            Phase::Starting { .. } | Phase::Running => {
                return answer(reply, Err(precondition("the process still runs")));
            }
            Phase::Deleting(_) => {
                return answer(reply, Err(precondition("the process is being deleted")));
            }
        };
        process.phase = Phase::Deleting(exit);
        let pumps = process.pumps.take();
        tokio::spawn(async move {
            if let Some(pumps) = pumps {
                pumps.drained().await;
            }
            handle.tell(Command::Report(Report::ExecDrained { exec, exit, reply }));
        });
    }

    pub(super) fn delete(&mut self, reply: Reply<(u32, Exit)>) {
        match self.init.phase {
            Phase::Stopped(exit) => self.remove(exit, reply),
            Phase::Created if self.delete.is_none() => {
                // It exists in the guest and waits for its start: it is ended first.
                self.delete = Some(reply);
                let (id, kill) = (self.id.clone(), self.init_kill());
                tokio::spawn(async move {
                    if let Err(error) = kill.run().await {
                        debug!(container = id, error = error.chain(), "not killed");
                    }
                });
            }
            Phase::Created | Phase::Deleting(_) => {
                answer(reply, Err(precondition("the container is being deleted")));
            }
            Phase::Starting { .. } | Phase::Running => {
                answer(reply, Err(precondition("the container still runs")));
            }
        }
    }

    /// Removes a stopped container: from the guest, then from the host.
    fn remove(&mut self, exit: Exit, reply: Reply<(u32, Exit)>) {
        self.init.phase = Phase::Deleting(exit);
        let pumps = self.init.pumps.take();
        let (id, sandbox, handle) = (
            self.id.clone(),
            Arc::clone(&self.sandbox),
            self.handle.clone(),
        );
        let (hooks, owns_sandbox) = (self.hooks.clone(), self.owns_sandbox);
        tokio::spawn(async move {
            if let Some(pumps) = pumps {
                pumps.drained().await;
            }
            if !sandbox.has_ended() {
                match sandbox.agent().remove_container(&id).await {
                    Ok(()) if !owns_sandbox => sandbox.detach_disks(&id).await,
                    // The disks go with the machine.
                    Ok(()) => {}
                    // What stays in the guest goes with it.
                    Err(error) => warn!(
                        container = id,
                        error = error.chain(),
                        "not removed from the guest"
                    ),
                }
            }
            hooks.poststop().await;
            sandbox.release_cpus(&id);
            sandbox.watcher().remove(&id);
            if !owns_sandbox {
                sandbox.dismiss(&id);
            }
            let result = match sandbox.unshare(&id).await {
                Ok(gone) if !owns_sandbox => {
                    sandbox.forget(gone).await;
                    Ok(())
                }
                other => other.map(drop),
            };
            handle.tell(Command::Report(Report::Removed {
                exit,
                result,
                reply,
            }));
        });
    }

    /// The container is removed; whether that is the actor's end.
    pub(super) fn removed(
        &mut self,
        exit: Exit,
        result: Result<()>,
        reply: Reply<(u32, Exit)>,
    ) -> bool {
        if let Err(error) = result {
            // It can be deleted again.
            self.init.phase = Phase::Stopped(exit);
            answer(reply, Err(error));
            return false;
        }
        self.end_execs();
        let pid = self.pid;
        self.events.publish(&TaskDelete {
            container_id: self.id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..TaskDelete::default()
        });
        self.registry.remove(&self.id);
        if self.owns_sandbox {
            // containerd's `Shutdown` finds it done.
            let sandbox = Arc::clone(&self.sandbox);
            tokio::spawn(async move {
                if let Err(error) = sandbox.stop().await {
                    warn!(
                        sandbox = sandbox.id(),
                        error = error.chain(),
                        "not all removed"
                    );
                }
            });
        }
        answer(reply, Ok((pid, exit)));
        true
    }
}
