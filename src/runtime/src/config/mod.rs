// SPDX-License-Identifier: Apache-2.0
//! The runtime's configuration: built-in defaults, TOML files with Kata's keys over them, and the
//! annotations of a pod over these, as far as the files allow.
//!
//! Everything is read strictly: a key or an annotation that is unknown, or whose value this build
//! can't honour, is an error that names it and says what is accepted. All that is wrong is named
//! at once.

mod annotations;
mod file;
pub(crate) mod host;
mod keys;
mod lookup;
mod options;
mod value;

use std::collections::{BTreeMap, HashMap};
use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protobuf::well_known_types::any::Any;
use toml::Value;
use tracing::Level;
use vmm::control::{FsCache, RateLimits};

pub(crate) use self::file::Origin;
use self::file::{Files, Reasons};
use self::keys::Key;
pub(crate) use self::lookup::Named;
use self::lookup::Source;
pub(crate) use self::options::is_ours;
use crate::error::Result;
use crate::network::Settings;
use crate::sandbox::{DiskSettings, HostPath};

/// Where kernel and image are, below the folder that the program is installed in.
const KERNEL: &str = "share/kata-containers/vmlinux.container";
const IMAGE: &str = "share/kata-containers/kata-containers.img";

/// The smallest memory that a guest boots with, in MiB.
pub(crate) const LEAST_MEMORY: u32 = 64;

/// The most virtual CPUs of a machine.
pub(crate) const MOST_VCPUS: u8 = vmm::kvm::MAX_VCPUS;

/// What the runtime goes by.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    /// An uncompressed guest kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's root file system, an EROFS image.
    pub(crate) image: PathBuf,
    /// Added to the kernel's command line, after the runtime's own parameters.
    pub(crate) kernel_params: String,
    /// Virtual CPUs of a machine whose containers ask for no more.
    pub(crate) vcpus: u8,
    /// The most that a machine gets, however many are asked for; the host's where nothing is set.
    most_vcpus: Option<u8>,
    /// Memory of a machine whose containers have no limit, in MiB.
    pub(crate) memory_mib: u32,
    /// The most that a machine gets, in MiB; the host's where nothing is set.
    most_memory_mib: Option<u32>,
    /// CPUs that a machine has beside what its containers' limits ask for.
    pub(crate) overhead_vcpus: f64,
    /// Memory that a machine has beside what its containers' limits ask for, in MiB.
    pub(crate) overhead_mib: u32,
    /// Whether a machine keeps the size that it boots with.
    pub(crate) fixed_size: bool,
    /// Whether the memory of a machine whose size is not fixed changes, too.
    pub(crate) virtio_mem: bool,
    /// Whether all of a sandbox on the host is in its own cgroup, its overhead included.
    pub(crate) cgroup_only: bool,
    /// Whether each virtual CPU keeps to a CPU of the host, where there are as many.
    pub(crate) pin_vcpus: bool,
    /// Whether the memory that a guest frees goes back to the host.
    pub(crate) reclaim: bool,
    /// How long the guest may trust what it has read of a shared file.
    pub(crate) shared_cache: FsCache,
    /// What of the host every guest sees, whatever its containers bind.
    pub(crate) host_paths: Vec<HostPath>,
    /// How the disks of containers are served.
    pub(crate) disks: DiskSettings,
    /// What the monitor logs; in detail, the guest's console goes to the log, too.
    pub(crate) monitor: Verbosity,
    /// What the agent logs.
    pub(crate) agent: Verbosity,
    /// Whether the guest has a shell for whoever reaches its console's port from the host.
    pub(crate) debug_console: bool,
    /// What the runtime logs.
    pub(crate) log: Verbosity,
    /// How the pod's network is made.
    pub(crate) network: Settings,
    /// Whether the seccomp profiles of containers are applied.
    pub(crate) seccomp: bool,
    /// Whether the monitor moves the streams of processes itself.
    pass_streams: bool,
    /// The vsock port where the agent takes these.
    streams_port: u32,
    /// How long the guest may take from power-on to a listening agent.
    pub(crate) boot_timeout: Duration,
    /// How long the agent may take for a call.
    pub(crate) call_timeout: Duration,
    /// Which annotations a pod may carry: patterns of their names, by the annotations' group.
    allowed: BTreeMap<&'static str, Vec<String>>,
    /// The annotations that have been applied.
    applied: BTreeMap<String, String>,
}

/// How much a program logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verbosity {
    /// In detail, whatever the level.
    pub(crate) debug: bool,
    level: Level,
}

impl Verbosity {
    fn at(level: Level) -> Self {
        Self {
            debug: false,
            level,
        }
    }

    /// The least severe level that is logged.
    pub(crate) fn level(self) -> Level {
        if self.debug {
            // The order of levels is that of detail.
            self.level.max(Level::DEBUG)
        } else {
            self.level
        }
    }
}

impl Config {
    /// What holds without any file.
    pub(crate) fn built_in() -> Self {
        let prefix = prefix(env::current_exe().ok().as_deref());
        Self {
            kernel: prefix.join(KERNEL),
            image: prefix.join(IMAGE),
            kernel_params: String::new(),
            vcpus: 1,
            most_vcpus: None,
            memory_mib: 2048,
            most_memory_mib: None,
            overhead_vcpus: 0.0,
            overhead_mib: 64,
            fixed_size: true,
            virtio_mem: true,
            cgroup_only: true,
            pin_vcpus: false,
            reclaim: true,
            shared_cache: FsCache::Auto,
            host_paths: Vec::new(),
            disks: DiskSettings {
                direct: false,
                io_uring: true,
                queues: 1,
                limits: RateLimits::default(),
            },
            monitor: Verbosity::at(Level::INFO),
            agent: Verbosity::at(Level::WARN),
            debug_console: false,
            log: Verbosity::at(Level::INFO),
            network: Settings::default(),
            seccomp: true,
            pass_streams: false,
            streams_port: 1027,
            boot_timeout: Duration::from_secs(60),
            call_timeout: Duration::from_secs(60),
            allowed: BTreeMap::new(),
            applied: BTreeMap::new(),
        }
    }

    /// The configuration of a sandbox: from the options of containerd's runtime handler, and the
    /// annotations of the pod, or of the container that has a sandbox of its own.
    pub(crate) fn for_sandbox(
        options: Option<&Any>,
        annotations: &HashMap<String, String>,
    ) -> Result<Self> {
        let mut sourced = Sourced::read(options::named(options)?)?;
        sourced.annotate(annotations)?;
        Ok(sourced.config)
    }

    /// What holds with this text in place of a file.
    #[cfg(test)]
    pub(crate) fn of_text(text: &str) -> Self {
        let named = Named::InPlace(text.to_owned());
        Sourced::read(Some(named)).unwrap().config
    }

    /// Checks what a further container of the sandbox asks for. It can't change a machine that
    /// runs: all that it may do is repeat the pod's own annotations, which containerd copies.
    pub(crate) fn check_member(&self, annotations: &HashMap<String, String>) -> Result<()> {
        annotations::check_member(&self.applied, annotations)
    }

    /// The most virtual CPUs of a machine.
    pub(crate) fn vcpu_limit(&self) -> u8 {
        let most = self
            .most_vcpus
            .unwrap_or_else(|| host::cpus().min(MOST_VCPUS));
        most.max(self.vcpus)
    }

    /// The most memory of a machine, in MiB.
    pub(crate) fn memory_limit(&self) -> u32 {
        let most = self.most_memory_mib.unwrap_or_else(host::memory_mib);
        most.max(self.memory_mib)
    }

    /// Where the agent takes streams that the monitor moves, if it is to move them.
    pub(crate) fn stream_port(&self) -> Option<u32> {
        self.pass_streams.then_some(self.streams_port)
    }

    /// Why the values don't go together, if they don't.
    fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        if let Some(most) = self.most_vcpus.filter(|&most| most < self.vcpus) {
            let reason = format!("more than default_maxvcpus, which is {most}");
            found.push(("default_vcpus", reason));
        }
        if let Some(most) = self.most_memory_mib.filter(|&most| most < self.memory_mib) {
            let reason = format!("more than default_maxmemory, which is {most}");
            found.push(("default_memory", reason));
        }
        found
    }
}

/// A configuration, and where its values come from.
#[derive(Debug)]
pub(crate) struct Sourced {
    pub(crate) config: Config,
    /// The files that were read, in the order of their weight.
    pub(crate) files: Vec<String>,
    origins: HashMap<(&'static str, &'static str), Origin>,
}

impl Sourced {
    /// Reads the files; `named` is what the caller names, if anything.
    pub(crate) fn read(named: Option<Named>) -> Result<Self> {
        Self::of(&lookup::sources(named)?)
    }

    fn of(sources: &[Source]) -> Result<Self> {
        let files = Files::read(sources);
        let mut reasons = files.reasons;
        let mut sourced = Self {
            config: Config::built_in(),
            files: files.names,
            origins: HashMap::new(),
        };
        for (key, value, origin) in files.settings {
            sourced.set(key, &value, origin, &mut reasons);
        }
        sourced.check(&mut reasons);
        reasons.into_result().map(|()| sourced)
    }

    /// Applies a pod's annotations.
    pub(crate) fn annotate(&mut self, annotations: &HashMap<String, String>) -> Result<()> {
        let mut reasons = Reasons::default();
        let (vcpus, memory) = (self.config.vcpu_limit(), self.config.memory_limit());
        for (key, value, name) in annotations::select(&self.config, annotations, &mut reasons) {
            self.set(key, &value, Origin::Annotation(name.clone()), &mut reasons);
            if let Some(text) = annotations.get(&name) {
                self.config.applied.insert(name, text.clone());
            }
        }
        // A pod must not ask for more than the host has, where the operator sets no bound.
        for (name, beyond, limit) in [
            ("default_vcpus", self.config.vcpus > vcpus, vcpus.into()),
            ("default_memory", self.config.memory_mib > memory, memory),
        ] {
            if beyond {
                self.object(
                    name,
                    &format!("this host grants {limit} at most"),
                    &mut reasons,
                );
            }
        }
        self.check(&mut reasons);
        reasons.into_result()
    }

    /// Every key that can be set, with its value and where that comes from.
    pub(crate) fn values(&self) -> impl Iterator<Item = (&'static Key, Value, Origin)> {
        keys::all().filter_map(|key| {
            let value = key.value(&self.config)?;
            let origin = self.origins.get(&key.path()).cloned();
            Some((key, value, origin.unwrap_or(Origin::BuiltIn)))
        })
    }

    fn set(&mut self, key: &'static Key, value: &Value, origin: Origin, reasons: &mut Reasons) {
        match key.apply(&mut self.config, value) {
            Ok(()) => {
                self.origins.insert(key.path(), origin);
            }
            Err(reason) => reasons.add(origin, format!("{key} = {value}: {reason}")),
        }
    }

    fn check(&self, reasons: &mut Reasons) {
        let host = host::memory_mib();
        let named = self.origins.contains_key(&keys::MEMORY);
        if named && self.config.most_memory_mib.is_none() && self.config.memory_mib > host {
            let reason = format!("more than this host has, which is {host}");
            self.object("default_memory", &reason, reasons);
        }
        for (name, reason) in self.config.contradictions() {
            self.object(name, &reason, reasons);
        }
    }

    /// Objects to the value of a key of the machine.
    fn object(&self, name: &str, reason: &str, reasons: &mut Reasons) {
        if let Some((key, value, origin)) = self.values().find(|(key, ..)| key.name == name) {
            reasons.add(origin, format!("{key} = {value}: {reason}"));
        }
    }
}

/// The least number of CPUs, up to `most`, that is not less than `wanted`.
pub(crate) fn whole_cpus(wanted: f64, most: u8) -> Option<u8> {
    (1..=most).find(|&count| f64::from(count) >= wanted)
}

/// The folder that holds `bin/` with this program in it; `/usr` where it lies elsewhere.
fn prefix(program: Option<&Path>) -> PathBuf {
    program
        .and_then(Path::parent)
        .filter(|folder| folder.file_name().is_some_and(|name| name == "bin"))
        .and_then(Path::parent)
        .filter(|prefix| prefix.join(KERNEL).exists())
        .map_or_else(|| PathBuf::from("/usr"), Path::to_owned)
}

#[cfg(test)]
mod tests;
