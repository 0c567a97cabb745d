// SPDX-License-Identifier: Apache-2.0
//! A sandbox: one virtual machine, its agent, and the files that it shares with the guest.
//!
//! It is made with its first container: one that has it to itself, or the one that stands for a
//! pod, and lives as long as that. Every object that it makes on the host is in the journal first.

mod binds;
mod cgroup;
mod cmdline;
mod cpus;
mod dial;
mod disks;
mod ended;
mod files;
mod forward;
mod growth;
pub(crate) mod journal;
mod log;
mod network;
mod plan;
mod share;
mod size;
mod streams;
mod vm;
mod volumes;

use std::fs::{File, OpenOptions};
use std::io::{self, stderr};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use protocols::agent::agent::CreateSandboxRequest;
use tokio::spawn;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tracing::{debug, info, warn};

use self::cgroup::Cgroups;
use self::cmdline::cmdline;
use self::cpus::Cpus;
pub(crate) use self::cpus::check_nodes;
pub(crate) use self::dial::connect;
use self::dial::dial;
use self::disks::Disks;
pub(crate) use self::disks::{InGuest, Settings as DiskSettings};
pub(crate) use self::ended::Ended;
pub(crate) use self::files::PodFiles;
use self::forward::Forwarder;
use self::growth::Demand;
use self::journal::{Journal, Object};
pub(crate) use self::plan::{GUEST_SHM, Plan};
pub(crate) use self::share::Share;
pub(crate) use self::size::Limits;
use self::size::Size;
pub(crate) use self::streams::{Passed, StreamDoor};
use self::vm::{Machine, Vm};
use crate::agent::Agent;
use crate::config::Config;
use crate::container::io::{StreamPorts, Streams};
use crate::error::{Context, Kind, Result, ShimError};
use crate::management::Listener;
use crate::network::{Namespace, Network, Place};
use crate::paths;
use crate::process::ProcessId;
use crate::volume::Watcher;

/// The agent's vsock port.
const AGENT_PORT: u32 = 1024;

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

/// A sandbox whose machine was asked to boot. What can be done meanwhile on the host is.
#[derive(Debug)]
pub(crate) struct Booting {
    id: String,
    name: String,
    share: Arc<Share>,
    vm: Vm,
    config: Config,
    plan: Plan,
    cpus: Cpus,
    cgroups: Cgroups,
    disks: Disks,
    journal: Journal,
    network: Option<Network>,
    management: Listener,
    begun: Instant,
}

/// What is there from the start of the machine on.
struct Started {
    share: Share,
    cgroups: Cgroups,
    vm: Vm,
    network: Option<Network>,
    management: Listener,
}

impl Booting {
    /// Makes the sandbox's host objects and starts its machine.
    ///
    /// On failure nothing is left behind.
    pub(crate) fn start(id: &str, name: &str, config: Config, plan: Plan) -> Result<Self> {
        let cpus = Cpus::new(config.pin_vcpus)?;
        let mut journal = Journal::create(paths::journal(name))?;
        match Self::start_with(id, name, &config, &plan, &mut journal) {
            Ok(Started {
                share,
                vm,
                network,
                cgroups,
                management,
            }) => Ok(Self {
                cgroups,
                id: id.to_owned(),
                name: name.to_owned(),
                share: Arc::new(share),
                vm,
                disks: Disks::new(DiskSettings {
                    queues: config.disks.queues.min(plan.size.vcpus.into()),
                    ..config.disks
                }),
                config,
                plan,
                cpus,
                journal,
                network,
                management,
                begun: Instant::now(),
            }),
            Err(error) => {
                remove(journal);
                Err(error)
            }
        }
    }

    fn start_with(
        id: &str,
        name: &str,
        config: &Config,
        plan: &Plan,
        journal: &mut Journal,
    ) -> Result<Started> {
        let kvm = open_kvm()?;
        let kernel = open("guest kernel", &config.kernel)?;
        let image = open("guest image", &config.image)?;
        let Size { vcpus, memory_mib } = plan.size;
        journal.record(Object::Process(
            ProcessId::own().internal(|| "own process".to_owned())?,
        ))?;
        let vsock_path = paths::vsock(name);
        if let Some(folder) = vsock_path.parent() {
            journal.make_folder(folder)?;
        }
        journal.record(Object::File(vsock_path.clone()))?;
        let vsock = UnixListener::bind(&vsock_path)
            .internal(|| format!("listen at {}", vsock_path.display()))?;
        let management_path = paths::monitor(name);
        journal.record(Object::File(management_path.clone()))?;
        let management = Listener::bind(&management_path)?;
        let share_path = paths::share(name);
        journal.make_folder(&share_path)?;
        let made = network::make(plan, config, journal)?;
        let console = if config.monitor.debug {
            Some(
                stderr()
                    .as_fd()
                    .try_clone_to_owned()
                    .internal(|| "console".to_owned())?,
            )
        } else {
            None
        };
        let cgroups = Cgroups::create(&plan.cgroup, config.cgroup_only, name, journal)?;
        info!(sandbox = id, vcpus, memory_mib, "booting");
        // Whatever fails from here on closes it.
        let share = Share::create(&share_path)?;
        let (network, nets) = made.unzip();
        // What is wired later is found through the machine's process.
        let home = match plan.network {
            Some(Place::New) => network.as_ref().map(|it| it.namespace().as_ref()),
            _ => None,
        };
        let started = share.open().and_then(|directory| {
            let machine = Machine {
                size: plan.size,
                most: plan.most,
                cmdline: cmdline(config, plan.most.memory_mib > memory_mib),
                log_level: config.monitor.level(),
                cache: config.shared_cache,
                balloon: config.reclaim,
                kvm,
                kernel,
                image,
                share: directory,
                vsock: vsock.into(),
                nets: nets.unwrap_or_default(),
                console,
            };
            Vm::start(&machine, &cgroups, home)
        });
        let recorded = started.and_then(|vm| {
            let process =
                ProcessId::of(vm.pid()).internal(|| "the machine's process".to_owned())?;
            journal.record(Object::Process(process))?;
            Ok(vm)
        });
        match recorded {
            Ok(vm) => Ok(Started {
                share,
                vm,
                network,
                cgroups,
                management,
            }),
            Err(error) => {
                if let Err(error) = share.close() {
                    warn!(error = error.chain(), "shared tree not unmounted");
                }
                Err(error)
            }
        }
    }

    /// The shared tree, to prepare while the machine boots.
    pub(crate) fn share(&self) -> Arc<Share> {
        Arc::clone(&self.share)
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.vm.has_ended()
    }

    /// Waits for the agent and sets the sandbox up in the guest.
    pub(crate) async fn finish(mut self) -> Result<Sandbox> {
        // While the guest boots.
        let network = self.network.as_ref();
        let vsock = paths::vsock(&self.name);
        let door = self.config.stream_port();
        let door = door.map(|port| StreamDoor::new(&vsock, port));
        let forwarder = network.and_then(|it| Forwarder::new(it, vsock));
        match self.connect().await {
            Ok(agent) => {
                info!(
                    sandbox = self.id,
                    milliseconds = self.begun.elapsed().as_millis(),
                    "agent ready"
                );
                Ok(Sandbox {
                    id: self.id,
                    share: self.share,
                    vm: self.vm,
                    agent,
                    config: self.config,
                    plan: self.plan,
                    cpus: self.cpus,
                    watcher: Watcher::default(),
                    cgroups: self.cgroups,
                    demand: Mutex::default(),
                    disks: self.disks,
                    stopping: AtomicBool::new(false),
                    journal: Arc::new(Mutex::new(Some(self.journal))),
                    namespace: self.network.as_ref().map(|it| Arc::clone(it.namespace())),
                    network: self.network.map(|it| Arc::new(Mutex::new(it))),
                    forwarder: Mutex::new(forwarder),
                    management: Mutex::new(Some(self.management)),
                    door,
                })
            }
            Err(error) => {
                self.abandon().await;
                Err(error)
            }
        }
    }

    /// Takes everything back.
    pub(crate) async fn abandon(self) {
        stop(&self.vm).await;
        if let Err(error) = self.share.close() {
            warn!(error = error.chain(), "shared tree not unmounted");
        }
        remove(self.journal);
    }

    async fn connect(&mut self) -> Result<Agent> {
        let files = format!(
            "kernel {}, image {}",
            self.config.kernel.display(),
            self.config.image.display()
        );
        self.vm.ready(self.config.boot_timeout, &files).await?;
        self.cgroups.take_vcpus(self.vm.pid())?;
        let vsock = paths::vsock(&self.name);
        let stream = dial(&vsock, AGENT_PORT).await?;
        let agent = Agent::new(stream, self.config.call_timeout, self.vm.end());
        let (mut dns, mut storages) = (Vec::new(), vec![share::storage()]);
        if let Some(pod) = &self.plan.pod {
            dns.clone_from(&pod.dns);
            storages.push(pod.shm());
        }
        let request = CreateSandboxRequest {
            hostname: self.plan.hostname.clone(),
            dns,
            sandbox_id: self.id.clone(),
            storages,
            ..Default::default()
        };
        agent.create_sandbox(&request).await?;
        // It has said that it is ready as soon as calls are taken, and opens its other ports then.
        spawn(log::relay(self.id.clone(), vsock));
        if let Some(network) = &mut self.network {
            agent.update_network(&network.news()).await?;
            network.told();
        }
        Ok(agent)
    }
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
        let mut stopped = Ok(());
        if !self.vm.has_ended() {
            // What the guest has not written yet would be lost with it.
            if let Err(error) = self.agent.destroy_sandbox(GOODBYE).await {
                debug!(sandbox = self.id, error = error.chain(), "no orderly end");
            }
            stopped = self.vm.stop().await.map(drop);
        }
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

/// For a sandbox that was not to be: the first error is the one to report.
fn remove(journal: Journal) {
    if let Err(error) = journal.close() {
        warn!(error = error.chain(), "not all removed");
    }
}

fn open_kvm() -> Result<File> {
    let context = |error: &io::Error| match error.kind() {
        io::ErrorKind::NotFound => "this host has no KVM: open /dev/kvm",
        io::ErrorKind::PermissionDenied => "KVM may not be used: open /dev/kvm",
        _ => "open /dev/kvm",
    };
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| {
            ShimError::new(
                Kind::FailedPrecondition,
                format!("{}: {error}", context(&error)),
            )
        })
}

fn open(what: &str, path: &Path) -> Result<File> {
    let context = || format!("{what} {}", path.display());
    let file = File::open(path).context(Kind::FailedPrecondition, context)?;
    let metadata = file.metadata().internal(context)?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(ShimError::new(
            Kind::FailedPrecondition,
            format!("{}: not a file with contents", context()),
        ));
    }
    Ok(file)
}
