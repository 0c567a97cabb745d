// SPDX-License-Identifier: Apache-2.0
//! The pod: what its containers share, and the table of containers.

mod namespaces;

use std::collections::HashMap;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocols::agent::agent::CreateSandboxRequest;
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;
use tracing::warn;

use crate::cmdline::Parameters;
use crate::container::{Container, no_container};
use crate::engine::Launcher;
use crate::error::{AgentError, Context as _, Kind, Result};
use crate::passfd::Arrivals;
use crate::reaper::Reaper;
use crate::storage::{Held, Storages};
use namespaces::SharedNamespaces;

pub(crate) use namespaces::Pids;

/// Files that containers of the pod share.
const SANDBOX_FOLDER: &str = "/run/kata-containers/sandbox";
/// Name servers of the pod, which the runtime binds over the containers' own file.
const RESOLV_CONF: &str = "/run/kata-containers/sandbox/resolv.conf";
/// How long the answer to DestroySandbox has to leave the guest.
const FAREWELL: Duration = Duration::from_millis(50);
/// OOM events that wait for a runtime which does not ask.
const PENDING_EVENTS: usize = 64;

/// The pod.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) launcher: Launcher,
    pub(crate) storages: Storages,
    /// How long a plugged device may take to appear.
    pub(crate) hotplug_timeout: Duration,
    /// What processes' pipes hold, where not the kernel's usual.
    pub(crate) pipe_size: Option<usize>,
    /// Streams that the host connects, where it may.
    pub(crate) arrivals: Option<Arc<Arrivals>>,
    pub(crate) reaper: Reaper,
    containers: Mutex<HashMap<String, Slot>>,
    created: Mutex<Option<Held>>,
    shared: SharedNamespaces,
    oom_sender: mpsc::Sender<String>,
    oom_events: tokio::sync::Mutex<mpsc::Receiver<String>>,
    destroyed: Notify,
}

#[derive(Debug)]
enum Slot {
    /// The name is taken; the container is being created.
    Creating,
    Ready(Arc<Container>),
}

impl Sandbox {
    pub(crate) fn new(
        parameters: &Parameters,
        reaper: Reaper,
        arrivals: Option<Arc<Arrivals>>,
    ) -> Self {
        let (oom_sender, oom_events) = mpsc::channel(PENDING_EVENTS);
        Self {
            launcher: Launcher::new(reaper.clone(), parameters.launch_timeout),
            storages: Storages::new(parameters.hotplug_timeout, reaper.clone()),
            hotplug_timeout: parameters.hotplug_timeout,
            pipe_size: parameters.pipe_size,
            arrivals,
            reaper,
            containers: Mutex::default(),
            created: Mutex::default(),
            shared: SharedNamespaces::default(),
            oom_sender,
            oom_events: tokio::sync::Mutex::new(oom_events),
            destroyed: Notify::new(),
        }
    }

    /// CreateSandbox: host name, name servers, the pod's storages. From here on its containers
    /// share an IPC and a UTS namespace.
    ///
    /// # Errors
    ///
    /// A second sandbox, what is not supported, or a storage that can't be mounted.
    pub(crate) async fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        if lock(&self.created).is_some() {
            return Err(AgentError::new(Kind::AlreadyExists, "the sandbox exists"));
        }
        if !request.guest_hook_path.is_empty() {
            return Err(AgentError::unsupported("guest_hook_path is not supported"));
        }
        if let Some(module) = request.kernel_modules.first() {
            return Err(AgentError::unsupported(format!(
                "kernel module {:?}: the guest kernel loads no modules",
                module.name
            )));
        }
        if !request.hostname.is_empty() {
            rustix::system::sethostname(request.hostname.as_bytes())
                .context(|| format!("set host name {:?}", request.hostname))?;
        }
        write_resolv_conf(&request.dns)?;
        let held = self.storages.add(request.storages).await?;
        self.shared.enable();
        *lock(&self.created) = Some(held);
        Ok(())
    }

    /// DestroySandbox: ends all containers, gives the storages back and lets the server end.
    ///
    /// # Errors
    ///
    /// Never; what can't be undone goes with the guest.
    pub(crate) async fn destroy(&self) -> Result<()> {
        let ids: Vec<String> = lock(&self.containers).keys().cloned().collect();
        for id in ids {
            if let Err(error) = self.remove_container(&id, 0).await {
                warn!(container = id, error = error.line(), "container stays");
            }
        }
        self.end_pid_namespace().await;
        let held = lock(&self.created).take();
        if let Some(held) = held {
            self.storages.remove(held).await;
        }
        self.storages.end().await;
        self.destroyed.notify_one();
        Ok(())
    }

    /// Waits for DestroySandbox, and for its answer to leave.
    pub(crate) async fn destroyed(&self) {
        self.destroyed.notified().await;
        sleep(FAREWELL).await;
    }

    /// The container `id`.
    ///
    /// # Errors
    ///
    /// NOT_FOUND; FAILED_PRECONDITION while it is being created.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        match lock(&self.containers).get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating) => Err(AgentError::precondition(format!(
                "container {id:?} is being created"
            ))),
            None => Err(no_container(id)),
        }
    }

    /// Takes a name for a container to be created.
    ///
    /// # Errors
    ///
    /// ALREADY_EXISTS.
    pub(crate) fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(AgentError::new(
                Kind::AlreadyExists,
                format!("container {id:?} exists"),
            ));
        }
        containers.insert(id.to_owned(), Slot::Creating);
        Ok(Reservation {
            sandbox: Arc::clone(self),
            id: id.to_owned(),
        })
    }

    /// RemoveContainer. `timeout` is in seconds, 0 for none.
    ///
    /// # Errors
    ///
    /// NOT_FOUND, or processes that do not end.
    pub(crate) async fn remove_container(&self, id: &str, timeout: u32) -> Result<()> {
        let container = self.container(id)?;
        let patience = Some(Duration::from_secs(timeout.into())).filter(|time| !time.is_zero());
        container.remove(&self.storages, patience).await?;
        lock(&self.containers).remove(id);
        Ok(())
    }

    /// Queues an OOM event; a runtime that does not ask loses the newest.
    pub(crate) fn report_oom(&self, id: &str) {
        if self.oom_sender.try_send(id.to_owned()).is_err() {
            warn!(container = id, "OOM event dropped");
        }
    }

    /// GetOOMEvent: the next container that ran out of memory.
    pub(crate) async fn next_oom(&self) -> String {
        // The sender is part of this sandbox, so the channel does not close.
        self.oom_events
            .lock()
            .await
            .recv()
            .await
            .unwrap_or_default()
    }
}

/// A name that is taken until it is filled or dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    sandbox: Arc<Sandbox>,
    id: String,
}

impl Reservation {
    /// The name stands for `container` now.
    pub(crate) fn fill(self, container: Container) {
        let slot = Slot::Ready(Arc::new(container));
        lock(&self.sandbox.containers).insert(self.id.clone(), slot);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut containers = lock(&self.sandbox.containers);
        if matches!(containers.get(&self.id), Some(Slot::Creating)) {
            containers.remove(&self.id);
        }
    }
}

fn write_resolv_conf(lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(SANDBOX_FOLDER).context(|| format!("mkdir {SANDBOX_FOLDER}"))?;
    let mut text = lines.join("\n");
    text.push('\n');
    fs::write(RESOLV_CONF, text).context(|| format!("write {RESOLV_CONF}"))
}

/// A panic elsewhere leaves plain data behind, which stays usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
