// SPDX-License-Identifier: Apache-2.0
//! A sandbox: one virtual machine, its agent, and the files that it shares with the guest.
//!
//! It is made with its first container: one that has it to itself, or the one that stands for a
//! pod, and lives as long as that. Every object that it makes on the host is in the journal first.

mod binds;
mod booting;
mod cgroup;
mod cmdline;
mod cpus;
mod dial;
mod disks;
mod ended;
mod files;
mod forward;
mod growth;
mod host_paths;
pub(crate) mod journal;
mod log;
mod network;
mod plan;
mod share;
mod size;
mod streams;
mod vm;
mod volumes;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tracing::{debug, warn};

pub(crate) use self::booting::Booting;
use self::cgroup::Cgroups;
use self::cpus::Cpus;
pub(crate) use self::cpus::check_nodes;
pub(crate) use self::dial::connect;
use self::disks::Disks;
pub(crate) use self::disks::{InGuest, Settings as DiskSettings};
pub(crate) use self::ended::Ended;
pub(crate) use self::files::PodFiles;
use self::forward::Forwarder;
use self::growth::Demand;
pub(crate) use self::host_paths::HostPath;
use self::journal::Journal;
pub(crate) use self::plan::{GUEST_SHM, Plan};
pub(crate) use self::share::Share;
pub(crate) use self::size::Limits;
pub(crate) use self::streams::{Passed, StreamDoor};
use self::vm::Vm;
use crate::agent::Agent;
use crate::config::Config;
use crate::container::io::{StreamPorts, Streams};
use crate::error::{Context, Result};
use crate::management::Listener;
use crate::network::{Namespace, Network};
use crate::volume::Watcher;

/// The vsock port of the debug console, where a guest has one.
pub(crate) const CONSOLE_PORT: u32 = 1026;

/// How long the guest may take to end what runs in it and to write its files out.
const GOODBYE: Duration = Duration::from_secs(5);

/// A sandbox whose machine runs, or ran.
#[derive(Debug)]
pub(crate) struct Sandbox {
    id: String,
    share: Arc<Share>,
    vm: Vm,
    agent: Agent,
    config: Config,
    plan: Plan,
    cpus: Cpus,
    /// Folders that the host changes.
    watcher: Watcher,
    cgroups: Cgroups,
    demand: Mutex<Demand>,
    disks: Disks,
    stopping: AtomicBool,
    journal: Arc<Mutex<Option<Journal>>>,
    network: Option<Arc<Mutex<Network>>>,
    namespace: Option<Arc<Namespace>>,
    /// Who forwards ports, until it begins.
    forwarder: Mutex<Option<Forwarder>>,
    /// The socket of its management, until somebody is served there.
    management: Mutex<Option<Listener>>,
    /// Where streams are passed that the monitor moves.
    door: Option<StreamDoor>,
}

impl Sandbox {
    /// A sandbox without a machine's files: a process that stands for it, and an agent.
    #[cfg(test)]
    pub(crate) fn for_test(agent: Agent) -> Self {
        Self {
            id: "test".to_owned(),
            share: Arc::new(Share::for_test()),
            vm: Vm::for_test(),
            agent,
            config: Config::built_in(),
            plan: Plan::for_test(),
            watcher: Watcher::default(),
            cpus: Cpus::new(false).unwrap(),
            cgroups: Cgroups::default(),
            demand: Mutex::default(),
            disks: Disks::new(Config::built_in().disks),
            stopping: AtomicBool::new(false),
            journal: Arc::default(),
            network: None,
            namespace: None,
            forwarder: Mutex::default(),
            management: Mutex::default(),
            door: None,
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Has the monitor move a new process's streams, where the configuration says so.
    pub(crate) async fn pass(&self, streams: &mut Streams) -> Result<StreamPorts> {
        match &self.door {
            Some(door) => streams.pass(door).await,
            None => Ok(StreamPorts::default()),
        }
    }

    pub(crate) fn share(&self) -> Arc<Share> {
        Arc::clone(&self.share)
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Answers on the management socket until the machine ends.
    pub(crate) async fn manage(self: Arc<Self>) {
        let listener = self.management.lock().await.take();
        if let Some(listener) = listener {
            listener.serve(self).await;
        }
    }

    /// Holds the machine to CPUs of the host, for one of its containers.
    pub(crate) fn assign_cpus(&self, container: &str, list: &str) -> Result<()> {
        self.cpus.assign(self.pid(), container, list)
    }

    /// A container is gone: its CPUs don't count any more.
    pub(crate) fn release_cpus(&self, container: &str) {
        if let Err(error) = self.cpus.release(self.pid(), container) {
            warn!(container, %error, "CPUs not released");
        }
    }

    /// Folders of the host that the guest has copies of.
    pub(crate) fn watcher(&self) -> &Watcher {
        &self.watcher
    }

    /// The machine's process.
    pub(crate) fn pid(&self) -> u32 {
        self.vm.pid()
    }

    /// Waits for the machine's end; why it ended.
    pub(crate) async fn ended(&self) -> String {
        self.vm.ended().await.describe()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.vm.has_ended()
    }

    /// How the machine has ended, if it has.
    pub(crate) fn end(&self) -> Option<Ended> {
        self.vm.end().borrow().clone()
    }

    /// Whether the machine ends, or has ended, because it was told to.
    pub(crate) fn was_stopped(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Ends a machine whose agent can't be reached any more.
    pub(crate) async fn kill(&self) {
        stop(&self.vm).await;
    }

    /// Ends the sandbox and removes everything of it from the host. Called again, it waits for
    /// the first call's end.
    pub(crate) async fn stop(&self) -> Result<()> {
        self.stopping.store(true, Ordering::Relaxed);
        let mut journal = self.journal.lock().await;
        let Some(journal) = journal.take() else {
            return Ok(());
        };
        // What the guest has not written yet would be lost with it.
        if !self.vm.has_ended()
            && let Err(error) = self.agent.destroy_sandbox(GOODBYE).await
        {
            debug!(sandbox = self.id, error = error.chain(), "no orderly end");
        }
        let stopped = self.vm.stop().await.map(drop);
        // Waits for mounts in progress, so not here.
        let share = Arc::clone(&self.share);
        let closed = spawn_blocking(move || share.close())
            .await
            .internal(|| "task".to_owned())
            .flatten();
        // The machine's own end is the first to report.
        let removed = spawn_blocking(move || journal.close())
            .await
            .internal(|| "task".to_owned())
            .flatten();
        stopped.and(removed).and(closed)
    }
}

/// For a machine whose end nobody waits for.
async fn stop(vm: &Vm) {
    if let Err(error) = vm.stop().await {
        warn!(error = error.chain(), "not stopped");
    }
}
