// SPDX-License-Identifier: Apache-2.0
//! A container: its cgroup, its storages, its processes.
//!
//! Each container has locks of its own, and none is held while another container waits: one for
//! what changes the container (create, start, exec, remove), held across the change, and short
//! ones for its tables. Signals, waits and streams never take the first.

mod create;
mod diagnostics;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod process;
mod requests;
mod stdio;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

pub(crate) use create::create;
pub(crate) use diagnostics::termination_log;
pub(crate) use process::Process;
pub(crate) use requests::{
    close_stdin, exec, freeze, read, resize, signal, stats, update, wait, write_stdin,
};
pub(crate) use stdio::{Output, Stdio};

use crate::cgroup::Cgroup;
use crate::engine::{Gate, Hooks, Launcher, ProcessPlan};
use crate::error::{AgentError, Kind, Result};
use crate::storage::Held;

/// How long an ended process can still be read from when nobody reads.
const LINGER: Duration = Duration::from_secs(10);

/// A container that was created.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    /// The exec id that the runtime gave the first process, besides the empty one.
    init_id: String,
    cgroup: Cgroup,
    init: Arc<Process>,
    /// Not the guest's.
    own_network: bool,
    /// What execs inherit.
    plan: ProcessPlan,
    hooks: Hooks,
    launcher: Launcher,
    stage: Mutex<Stage>,
    /// Processes by exec id; the first process is under the empty one.
    processes: Mutex<HashMap<String, Entry>>,
    held: Mutex<Option<Held>>,
    /// Where in the guest its last words to Kubernetes are.
    termination_log: Option<PathBuf>,
    /// Held across a change of the container, also by work on another thread.
    change: Arc<tokio::sync::Mutex<()>>,
    watches: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
enum Stage {
    /// The first process waits behind the gate.
    Created(Gate),
    Started,
    Removed,
}

#[derive(Debug)]
enum Entry {
    /// The exec id is taken; the process does not exist yet.
    Starting,
    Live(Arc<Process>),
    /// Its status was taken; its output may still be read.
    Waited(Arc<Process>),
}

impl Container {
    /// Executes the container's program.
    ///
    /// # Errors
    ///
    /// A container that was started before, or a program that can't be executed.
    pub(crate) async fn start(&self) -> Result<()> {
        let _change = self.change.lock().await;
        let gate = {
            let mut stage = self.stage();
            match std::mem::replace(&mut *stage, Stage::Started) {
                Stage::Created(gate) => gate,
                Stage::Started => {
                    return Err(AgentError::precondition(format!(
                        "container {:?} was started already",
                        self.id
                    )));
                }
                Stage::Removed => {
                    *stage = Stage::Removed;
                    return Err(no_container(&self.id));
                }
            }
        };
        gate.open().await?;
        let started = self.launcher.started(&self.hooks, self.init.pid()).await;
        if started.is_err() {
            // The specification ends a container whose hooks after its start fail.
            self.cgroup.kill()?;
        }
        started
    }

    /// Kills what still runs and gives everything back.
    ///
    /// # Errors
    ///
    /// Processes that do not end within `patience`; the container then stays.
    pub(crate) async fn remove(
        &self,
        storages: &crate::storage::Storages,
        patience: Option<Duration>,
    ) -> Result<()> {
        let removal = async {
            let _change = self.change.lock().await;
            self.cgroup.remove().await
        };
        match patience {
            Some(patience) => timeout(patience, removal).await.map_err(|_| {
                AgentError::internal(format!(
                    "container {:?}: processes do not end in time",
                    self.id
                ))
            })??,
            None => removal.await?,
        }
        let before = std::mem::replace(&mut *self.stage(), Stage::Removed);
        if !matches!(before, Stage::Removed) {
            self.launcher.stopped(&self.hooks).await;
        }
        let held = lock(&self.held).take();
        if let Some(held) = held {
            storages.remove(held).await;
        }
        Ok(())
    }

    /// The process of an exec id; the first process by an empty id, its own, or the container's.
    fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        match self.processes().get(self.normal(exec_id)) {
            Some(Entry::Live(process) | Entry::Waited(process)) => Ok(Arc::clone(process)),
            Some(Entry::Starting) => Err(AgentError::precondition(format!(
                "process {exec_id:?} of container {:?} is being started",
                self.id
            ))),
            None => Err(self.no_process(exec_id)),
        }
    }

    fn normal<'a>(&self, exec_id: &'a str) -> &'a str {
        if exec_id == self.id || exec_id == self.init_id {
            ""
        } else {
            exec_id
        }
    }

    /// Marks a process's status as taken. Its entry goes when its output has been read.
    fn waited(self: &Arc<Self>, exec_id: &str) {
        let exec_id = self.normal(exec_id).to_owned();
        let process = {
            let mut processes = self.processes();
            let Some(Entry::Live(process)) = processes.get(&exec_id) else {
                return;
            };
            let process = Arc::clone(process);
            processes.insert(exec_id.clone(), Entry::Waited(Arc::clone(&process)));
            process
        };
        let container = Arc::downgrade(self);
        tokio::spawn(async move {
            process.stdio.drained(LINGER).await;
            if let Some(container) = container.upgrade() {
                container.processes().remove(&exec_id);
            }
        });
    }

    fn no_process(&self, exec_id: &str) -> AgentError {
        AgentError::not_found(format!(
            "container {:?} has no process {exec_id:?}",
            self.id
        ))
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        lock(&self.stage)
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        lock(&self.processes)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        for watch in &self.watches {
            watch.abort();
        }
    }
}

/// A panic elsewhere leaves plain data behind, which stays usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn no_container(id: &str) -> AgentError {
    AgentError::new(Kind::NotFound, format!("container {id:?} does not exist"))
}
