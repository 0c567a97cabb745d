// SPDX-License-Identifier: Apache-2.0
//! What every container of a pod finds in `/etc` and at `/dev/shm`. containerd makes it itself where
//! a pause container stands for the pod; where the pod is made by the sandbox API, the runtime does.

use std::fs;
use std::path::{Path, PathBuf};

use protocols::containerd::cri::PodSandboxConfig;

use super::plan::SHM;
use crate::error::{Context, Kind, Result};
use crate::spec::Mount;

const HOSTS: &str = "hosts";
const HOSTNAME: &str = "hostname";
const RESOLV_CONF: &str = "resolv.conf";

/// A pod's files, on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFiles {
    folder: PathBuf,
}

impl PodFiles {
    /// Writes them into the sandbox's bundle, which containerd removes.
    pub(crate) fn write(bundle: &Path, pod: &PodSandboxConfig, dns: &[String]) -> Result<Self> {
        let hosts = of_host("/etc/hosts")?;
        let resolv_conf = if dns.is_empty() {
            of_host("/etc/resolv.conf")?
        } else {
            dns.join("\n") + "\n"
        };
        for (name, text) in [
            (HOSTS, hosts),
            (HOSTNAME, format!("{}\n", pod.hostname)),
            (RESOLV_CONF, resolv_conf),
        ] {
            let path = bundle.join(name);
            fs::write(&path, text).internal(|| format!("write {}", path.display()))?;
        }
        Ok(Self {
            folder: bundle.to_owned(),
        })
    }

    /// Adds them to a container's mounts, where it has none of its own.
    pub(crate) fn mount(&self, mounts: &mut Vec<Mount>) {
        for name in [HOSTS, HOSTNAME, RESOLV_CONF] {
            let destination = format!("/etc/{name}");
            if mounts.iter().all(|mount| mount.destination != destination) {
                mounts.push(bind(
                    destination,
                    self.folder.join(name).display().to_string(),
                ));
            }
        }
        // A container's own memory there is the default of the specification; the pod's is its own.
        for mount in mounts {
            if mount.destination == SHM && mount.kind == "tmpfs" {
                *mount = bind(SHM.to_owned(), SHM.to_owned());
            }
        }
    }
}

fn bind(destination: String, source: String) -> Mount {
    Mount {
        destination,
        source,
        kind: "bind".to_owned(),
        options: ["rbind", "rprivate", "rw"].map(str::to_owned).into(),
    }
}

/// The host's file; nothing where it has none.
fn of_host(path: &str) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        text => text.context(Kind::FailedPrecondition, || format!("read {path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_s_own_mounts_win() {
        let folder = tempfile::tempdir().unwrap();
        let pod = PodSandboxConfig {
            hostname: "web".to_owned(),
            ..Default::default()
        };
        let dns = ["nameserver 10.0.0.10".to_owned(), "search a.b".to_owned()];
        let files = PodFiles::write(folder.path(), &pod, &dns).unwrap();
        let read = |name| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(read(RESOLV_CONF), "nameserver 10.0.0.10\nsearch a.b\n");
        assert_eq!(read(HOSTNAME), "web\n");

        let tmpfs = Mount {
            destination: SHM.to_owned(),
            source: "shm".to_owned(),
            kind: "tmpfs".to_owned(),
            ..Mount::default()
        };
        let own = bind("/etc/hosts".to_owned(), "/var/lib/kubelet/hosts".to_owned());
        let mut mounts = vec![tmpfs, own.clone()];
        files.mount(&mut mounts);
        let sources: Vec<_> = mounts
            .iter()
            .map(|mount| (mount.destination.as_str(), mount.source.as_str()))
            .collect();
        let path = |name| folder.path().join(name).display().to_string();
        assert_eq!(
            sources,
            [
                (SHM, SHM),
                ("/etc/hosts", own.source.as_str()),
                ("/etc/hostname", path(HOSTNAME).as_str()),
                ("/etc/resolv.conf", path(RESOLV_CONF).as_str()),
            ]
        );
        assert!(mounts.iter().all(Mount::is_bind));
    }
}
