// SPDX-License-Identifier: Apache-2.0
//! What a sandbox is to be, as its first container's specification says.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::slice::from_ref;

use protocols::agent::agent::Storage;
use protocols::containerd::cri::PodSandboxConfig;
use rustix::fs::statfs;
use tracing::warn;

use super::files::PodFiles;
use super::size::{self, Size};
use crate::config::Config;
use crate::error::{Context, Kind, Result, ShimError};
use crate::mount;
use crate::network::{Model, Place};
use crate::spec::{Mount, Spec};

/// Where every container finds its shared memory.
pub(super) const SHM: &str = "/dev/shm";

/// Where every container finds its name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The pod's shared memory in the guest.
pub(crate) const GUEST_SHM: &str = "/run/kata-containers/sandbox/shm";

/// What Kubernetes and Docker give where nobody asks for more.
const SHM_SIZE: u64 = 64 << 20;

/// A sandbox to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What it boots with.
    pub(crate) size: Size,
    /// What it may grow to.
    pub(crate) most: Size,
    /// The guest's; empty leaves the kernel's own.
    pub(crate) hostname: String,
    /// The sandbox's cgroup on the host; empty for none.
    pub(crate) cgroup: String,
    /// Where its network is; none without.
    pub(crate) network: Option<Place>,
    /// What the containers of a pod have in common; `None` for a container of its own.
    pub(crate) pod: Option<PodPlan>,
}

/// What the containers of a pod have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodPlan {
    /// The lines of `resolv.conf`.
    pub(crate) dns: Vec<String>,
    /// The size of the shared memory, in bytes.
    pub(crate) shm_size: u64,
    /// Kernel parameters of the pod's namespaces.
    pub(crate) sysctls: HashMap<String, String>,
    /// What containerd leaves to the runtime.
    pub(crate) files: Option<PodFiles>,
}

impl Plan {
    /// For a container that has a sandbox of its own.
    pub(crate) fn single(spec: &Spec, config: &Config) -> Result<Self> {
        let (size, most) = size::bounds(size::of_container(spec, config), config);
        Ok(Self {
            size,
            most,
            hostname: spec.hostname.clone(),
            cgroup: spec.linux.cgroups_path.clone(),
            network: network(spec, config)?,
            pod: None,
        })
    }

    /// For a pod, from what Kubernetes says of it: its configuration and its network namespace.
    pub(crate) fn of_config(
        id: &str,
        pod: &PodSandboxConfig,
        netns: &str,
        config: &Config,
    ) -> Result<Self> {
        let linux = pod.linux.get_or_default();
        let resources = linux.resources.get_or_default();
        let dns = pod.dns_config.get_or_default();
        let line = |name: &str, words: &[String]| format!("{name} {}", words.join(" "));
        let mut lines: Vec<_> = dns
            .servers
            .iter()
            .map(|server| line("nameserver", from_ref(server)))
            .collect();
        for (name, words) in [("search", &dns.searches), ("options", &dns.options)] {
            if !words.is_empty() {
                lines.push(line(name, words));
            }
        }
        let (size, most) = size::bounds(size::of_resources(resources, config), config);
        Ok(Self {
            size,
            most,
            hostname: pod.hostname.clone(),
            cgroup: below(&linux.cgroup_parent, id),
            network: place(Some(netns).filter(|path| !path.is_empty()), config)?,
            pod: Some(PodPlan {
                dns: lines,
                shm_size: SHM_SIZE,
                sysctls: linux.sysctls.clone(),
                files: None,
            }),
        })
    }

    #[cfg(test)]
    pub(crate) fn for_test() -> Self {
        let config = Config::built_in();
        let text = br#"{"linux": {"namespaces": [{"type": "network"}]}}"#;
        let spec = crate::spec::read(text).unwrap();
        Self::single(&spec, &config).unwrap()
    }

    /// For a pod, from the specification of the container that stands for it.
    pub(crate) fn pod(spec: &Spec, config: &Config) -> Result<Self> {
        let bind = |destination: &str| {
            let mut mounts = spec.mounts.iter();
            mounts.find(|mount| mount.destination == destination && mount.is_bind())
        };
        let dns = match bind(RESOLV_CONF) {
            Some(mount) => lines(Path::new(&mount.source))?,
            None => Vec::new(),
        };
        let (size, most) = size::bounds(size::of_pod(&spec.annotations, config)?, config);
        Ok(Self {
            size,
            most,
            hostname: spec.hostname.clone(),
            cgroup: spec.linux.cgroups_path.clone(),
            network: network(spec, config)?,
            pod: Some(PodPlan {
                dns,
                shm_size: bind(SHM).map_or(SHM_SIZE, shm_size),
                sysctls: spec.linux.sysctl.clone(),
                files: None,
            }),
        })
    }
}

impl PodPlan {
    /// The shared memory, for the agent to mount.
    pub(super) fn shm(&self) -> Storage {
        Storage {
            driver: "ephemeral".to_owned(),
            source: "shm".to_owned(),
            fstype: "tmpfs".to_owned(),
            options: vec![
                "noexec".to_owned(),
                "nosuid".to_owned(),
                "nodev".to_owned(),
                "mode=1777".to_owned(),
                format!("size={}", self.shm_size),
            ],
            mount_point: GUEST_SHM.to_owned(),
            ..Storage::default()
        }
    }
}

/// A sandbox's cgroup in its pod's, as a kubelet names that: a path, or a slice of systemd's.
fn below(parent: &str, id: &str) -> String {
    if parent.is_empty() {
        String::new()
    } else if parent.ends_with(".slice") {
        let slice = parent.rsplit('/').next().unwrap_or(parent);
        format!("{slice}:cri-containerd:{id}")
    } else {
        format!("{parent}/{id}")
    }
}

/// Where the specification wants the network to be.
fn network(spec: &Spec, config: &Config) -> Result<Option<Place>> {
    let mut namespaces = spec.linux.namespaces.iter();
    match namespaces.find(|namespace| namespace.kind == "network") {
        Some(network) if network.path.is_empty() && config.network.model != Model::None => {
            Ok(Some(Place::New))
        }
        network => place(network.map(|it| it.path.as_str()), config),
    }
}

/// A namespace that is there. None means the host's own.
fn place(path: Option<&str>, config: &Config) -> Result<Option<Place>> {
    match path {
        _ if config.network.model == Model::None => Ok(None),
        Some(path) => Ok(Some(Place::At(PathBuf::from(path)))),
        None => Err(ShimError::new(
            Kind::InvalidArgument,
            "no network namespace is given: a guest can't use the host's network",
        )),
    }
}

/// The size of the tmpfs that the pod would have had on the host.
fn shm_size(shm: &Mount) -> u64 {
    match statfs(Path::new(&shm.source)) {
        Ok(found) if found.f_type == mount::TMPFS_MAGIC => Some(mount::size(&found))
            .filter(|&size| size > 0)
            .unwrap_or(SHM_SIZE),
        Ok(_) => SHM_SIZE,
        Err(error) => {
            warn!(%error, source = shm.source, "shared memory of the default size");
            SHM_SIZE
        }
    }
}

/// The lines of a `resolv.conf` that say something.
fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path)
        .context(Kind::InvalidArgument, || format!("read {}", path.display()))?;
    Ok(text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
        .map(ToOwned::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use protocols::containerd::cri::{DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig};

    use super::*;
    use crate::spec;

    #[test]
    fn a_pod_s_plan_comes_from_its_pause_container() {
        let root = tempfile::tempdir().unwrap();
        let resolv = root.path().join("resolv.conf");
        fs::write(&resolv, "# by hand\nnameserver 10.0.0.10\n\nsearch a.b\n").unwrap();
        let text = format!(
            r#"{{"hostname": "web-0",
                "annotations": {{"io.kubernetes.cri.sandbox-memory": "268435456"}},
                "mounts": [
                  {{"destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
                    "options": ["rbind"]}},
                  {{"destination": "/etc/resolv.conf", "type": "bind", "source": {resolv:?},
                    "options": ["rbind", "ro"]}}],
                "linux": {{"sysctl": {{"net.ipv4.ip_unprivileged_port_start": "0"}},
                  "namespaces": [{{"type": "network", "path": "/run/netns/n"}}]}}}}"#
        );
        let spec = spec::read(text.as_bytes()).unwrap();
        let plan = Plan::pod(&spec, &Config::built_in()).unwrap();
        let pod = plan.pod.unwrap();
        assert_eq!(plan.hostname, "web-0");
        assert_eq!(plan.size.memory_mib, 320);
        assert_eq!(plan.network, Some(Place::At("/run/netns/n".into())));
        assert_eq!(pod.dns, ["nameserver 10.0.0.10", "search a.b"]);
        assert_eq!(pod.sysctls.len(), 1);
        assert!(pod.shm_size > 0);
    }

    #[test]
    fn a_pod_s_plan_comes_from_its_configuration() {
        let words = |text: &str| text.split(' ').map(ToOwned::to_owned).collect();
        let pod = PodSandboxConfig {
            hostname: "web-0".to_owned(),
            dns_config: Some(DNSConfig {
                servers: words("10.0.0.10 fd00::10"),
                searches: words("a.b c.d"),
                ..Default::default()
            })
            .into(),
            linux: Some(LinuxPodSandboxConfig {
                resources: Some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 250_000,
                    memory_limit_in_bytes: 1 << 30,
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let config = Config::of_text("[hypervisor.dragonball]\ndefault_maxvcpus = 8");
        let plan = Plan::of_config("p1", &pod, "/run/netns/n", &config).unwrap();
        assert_eq!((plan.size.vcpus, plan.size.memory_mib), (3, 1088));
        assert_eq!(plan.hostname, "web-0");
        assert_eq!(plan.cgroup, "");
        assert_eq!(below("/kubepods/pod1", "p1"), "/kubepods/pod1/p1");
        assert_eq!(
            below("/kubepods.slice/kubepods-pod1.slice", "p1"),
            "kubepods-pod1.slice:cri-containerd:p1"
        );
        assert_eq!(plan.network, Some(Place::At("/run/netns/n".into())));
        let dns = [
            "nameserver 10.0.0.10",
            "nameserver fd00::10",
            "search a.b c.d",
        ];
        assert_eq!(plan.pod.unwrap().dns, dns);
    }
}
