// SPDX-License-Identifier: Apache-2.0
//! A node: a private containerd with its CRI plugin, networks, and the runtime handlers of the
//! suite.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::cni::{Network, Networks};
use crate::containerd::{Containerd, Options};
use crate::cri::messages::{
    Empty, ImageSpec, ImageStatusRequest, ImageStatusResponse, ListPodSandboxResponse,
    RemovePodSandboxRequest, StatusResponse, StopPodSandboxRequest,
};
use crate::cri::{Cri, LIMIT};
use crate::ctr::{CRI_NAMESPACE, Ctr};
use crate::handlers::{Dialect, PAUSE, by_sandbox_api, configuration, tables};
use crate::wait::until;

/// Folder of the programs of another containerd, 2.x, than the machine's.
const CONTAINERD: &str = "NUTSHELL_TEST_CONTAINERD";
/// Where the CRI plugin keeps its files, below containerd's root and state.
const CRI_FOLDER: &str = "io.containerd.grpc.v1.cri";
/// Parent of the pods' cgroups, as a kubelet makes it.
const CGROUP: &str = "/sys/fs/cgroup/kubepods";
const CONTROLLERS: &str = "+cpu +cpuset +io +memory +pids";

/// A running node.
#[derive(Debug)]
pub struct Node {
    // In the order of their ends: containerd, then what it uses.
    containerd: Containerd,
    networks: Networks,
    ctr: Ctr,
    cri: Cri,
    _folder: TempDir,
}

impl Node {
    /// The node of this process's tests: it lives as long as one of them holds it.
    pub fn shared() -> Result<Arc<Self>> {
        static SHARED: Mutex<Weak<Node>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = shared.upgrade() {
            return Ok(node);
        }
        let node = Arc::new(Self::start()?);
        *shared = Arc::downgrade(&node);
        Ok(node)
    }

    fn start() -> Result<Self> {
        let ctr = Ctr::from_env();
        let folder = tempfile::Builder::new()
            .prefix("nutshell-node-")
            .tempdir_in("/run")?;
        let networks = Networks::new(&folder.path().join("cni"))?;
        cgroup(Path::new(CGROUP))?;
        let programs = env::var_os(CONTAINERD).map(PathBuf::from);
        let dialect = match programs {
            Some(_) => Dialect::Two,
            None => Dialect::One,
        };
        let tables = tables(dialect, folder.path(), &networks)?;
        let usual = configuration(folder.path(), "");
        let usual = [("KATA_CONF_FILE", usual.as_path())];
        let containerd = Containerd::start_empty(
            &ctr,
            &Options {
                environment: if by_sandbox_api() { &usual } else { &[] },
                tables: Some(&tables),
                programs: programs.as_deref(),
                ..Options::default()
            },
        )?;
        // Made for the first pod and kept: no leak of its.
        for place in ["root", "state"] {
            let folder = containerd.folder().join(place).join(CRI_FOLDER);
            for kind in ["containers", "sandboxes"] {
                fs::create_dir_all(folder.join(kind))?;
            }
        }
        let cri = Cri::at(containerd.ctr().address());
        let own = containerd.ctr().in_namespace(CRI_NAMESPACE);
        containerd.import(&ctr, &[ctr.image(), PAUSE], &own)?;
        let node = Self {
            containerd,
            networks,
            ctr: own,
            cri,
            _folder: folder,
        };
        node.wait_until_ready()
            .with_context(|| node.containerd.log())?;
        Ok(node)
    }

    /// Its client.
    #[must_use]
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// `ctr` for the namespace of its pods.
    #[must_use]
    pub fn ctr(&self) -> &Ctr {
        &self.ctr
    }

    /// Its containerd.
    #[must_use]
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Its networks.
    #[must_use]
    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// The runtime handler under test, for pods of a network.
    #[must_use]
    pub fn handler(&self, network: Network) -> String {
        let name = if self.ctr.has_vm() { "kata" } else { "runc" };
        format!("{name}{}", network.suffix())
    }

    /// Folder of a pod's logs.
    #[must_use]
    pub fn logs(&self, pod: &str) -> PathBuf {
        self.containerd.folder().join("logs").join(pod)
    }

    /// Makes a pod's cgroup, as a kubelet does; answers its path below the cgroups' root.
    pub fn cgroup(&self, pod: &str) -> Result<PathBuf> {
        let path = Path::new(CGROUP).join(pod);
        cgroup(&path)?;
        Ok(Path::new("/").join(path.strip_prefix("/sys/fs/cgroup")?))
    }

    /// Removes all pods, by force; answers which there were.
    pub fn sweep(&self) -> Result<Vec<String>> {
        let list: ListPodSandboxResponse = self.cri.runtime("ListPodSandbox", &Empty::default())?;
        let mut left = Vec::new();
        for pod in list.items {
            left.push(pod.metadata.name.clone());
            let stop = StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
                ..Default::default()
            };
            let remove = RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
                ..Default::default()
            };
            // The second says what hinders the first as well.
            let _: Result<Empty> = self.cri.runtime("StopPodSandbox", &stop);
            let _: Empty = self.cri.runtime("RemovePodSandbox", &remove)?;
        }
        // A failed test leaves the cgroups that it has made.
        for entry in fs::read_dir(CGROUP).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        Ok(left)
    }

    fn wait_until_ready(&self) -> Result<()> {
        until("a node that is ready", LIMIT, || {
            let Ok(answer) = self
                .cri
                .runtime::<StatusResponse>("Status", &Empty::default())
            else {
                return Ok(None);
            };
            let conditions = &answer.status.conditions;
            let ready = !conditions.is_empty() && conditions.iter().all(|one| one.status);
            Ok(ready.then_some(()))
        })?;
        for image in [self.ctr.image(), PAUSE] {
            let request = ImageStatusRequest {
                image: Some(ImageSpec {
                    image: image.to_owned(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            };
            until(&format!("the image {image}"), LIMIT, || {
                let answer: ImageStatusResponse = self.cri.image("ImageStatus", &request)?;
                Ok(answer.image.is_some().then_some(()))
            })?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir(CGROUP);
    }
}

/// Makes a cgroup whose children have all controllers.
fn cgroup(path: &Path) -> Result<()> {
    fs::create_dir_all(path)?;
    for folder in [path.parent().unwrap_or(path), path] {
        let file = folder.join("cgroup.subtree_control");
        fs::write(&file, CONTROLLERS).with_context(|| file.display().to_string())?;
    }
    Ok(())
}
