// SPDX-License-Identifier: Apache-2.0
//! A sandbox on its way: its objects on the host are made, then its machine boots, then its agent is
//! told what the sandbox is.

use std::fs::{File, OpenOptions};
use std::io::{self, stderr};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use protocols::agent::agent::CreateSandboxRequest;
use tokio::spawn;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::cgroup::Cgroups;
use super::cmdline::cmdline;
use super::cpus::Cpus;
use super::dial::dial;
use super::disks::{Disks, InGuest, Settings as DiskSettings};
use super::forward::Forwarder;
use super::journal::{Journal, Object};
use super::size::Size;
use super::streams::StreamDoor;
use super::vm::{Machine, Vm};
use super::{Plan, Sandbox, Share, log, network, share, stop};
use crate::agent::Agent;
use crate::config::Config;
use crate::disk::Wanted;
use crate::error::{Context, Kind, Result, ShimError};
use crate::management::Listener;
use crate::network::{Network, Place};
use crate::paths;
use crate::process::ProcessId;
use crate::volume::Watcher;

/// The agent's vsock port.
const AGENT_PORT: u32 = 1024;

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
        let shared = share.add_host_paths(&config.host_paths);
        let started = shared.and_then(|()| share.open()).and_then(|directory| {
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

    /// Plugs in the disks of the first container: the guest finds them as it boots.
    pub(crate) async fn attach_disks(
        &self,
        container: &str,
        wanted: Vec<Wanted>,
    ) -> Result<InGuest> {
        self.disks.attach(&self.vm, container, wanted).await
    }

    /// Waits for the agent and sets the sandbox up in the guest.
    pub(crate) async fn finish(mut self) -> Result<Sandbox> {
        // While the guest boots.
        let network = self.network.as_ref();
        let vsock = paths::vsock(&self.name);
        let door = self.config.stream_port();
        let door = door.map(|port| StreamDoor::new(&vsock, port, self.vm.end()));
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
