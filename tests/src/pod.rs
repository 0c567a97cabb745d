// SPDX-License-Identifier: Apache-2.0
//! Pods and their containers, as a kubelet makes them.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cni::Network;
use crate::cri::messages::{
    ContainerConfig, ContainerMetadata, ContainerRequest, ContainerState, ContainerStatus,
    ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse, Empty,
    ExecSyncRequest, ExecSyncResponse, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxStatus,
    PodSandboxStatusRequest, PodSandboxStatusResponse, RemovePodSandboxRequest,
    RunPodSandboxRequest, RunPodSandboxResponse, StopContainerRequest, StopPodSandboxRequest,
};
use crate::cri::{Cri, LIMIT};
use crate::node::Node;
use crate::wait::until;

/// A pod that is asked for: what a kubelet says of it.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The interface's own words.
    pub config: PodSandboxConfig,
    /// Which network it joins.
    network: Network,
    /// Instead of the handler under test.
    handler: Option<String>,
}

impl Spec {
    /// A pod of this name, with nothing special.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "tests".to_owned(),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(metadata).into(),
            hostname: name.to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(NamespaceMode::CONTAINER)).into(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        Self {
            config,
            network: Network::Bridge,
            handler: None,
        }
    }

    /// Run by another runtime handler than the one under test.
    #[must_use]
    pub fn handled_by(mut self, handler: &str) -> Self {
        self.handler = Some(handler.to_owned());
        self
    }

    /// Its containers see each other's processes.
    #[must_use]
    pub fn with_shared_processes(mut self) -> Self {
        let linux = self.config.linux.mut_or_insert_default();
        let context = linux.security_context.mut_or_insert_default();
        context.namespace_options = Some(namespaces(NamespaceMode::POD)).into();
        self
    }

    /// Joins another network.
    #[must_use]
    pub fn on(mut self, network: Network) -> Self {
        self.network = network;
        self
    }

    /// May have privileged containers.
    #[must_use]
    pub fn privileged(mut self) -> Self {
        let linux = self.config.linux.mut_or_insert_default();
        let context = linux.security_context.mut_or_insert_default();
        context.privileged = true;
        self
    }

    /// With an annotation.
    #[must_use]
    pub fn with_annotation(mut self, key: &str, value: &str) -> Self {
        self.config
            .annotations
            .insert(key.to_owned(), value.to_owned());
        self
    }

    /// With a sysctl.
    #[must_use]
    pub fn with_sysctl(mut self, key: &str, value: &str) -> Self {
        let linux = self.config.linux.mut_or_insert_default();
        linux.sysctls.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Runs it.
    pub fn run(mut self, node: &Node) -> Result<Pod> {
        let name = self.config.metadata.name.clone();
        let logs = node.logs(&name);
        fs::create_dir_all(&logs)?;
        self.config.log_directory = logs.display().to_string();
        let cgroup = node.cgroup(&name)?;
        self.config.linux.mut_or_insert_default().cgroup_parent = cgroup.display().to_string();
        let request = RunPodSandboxRequest {
            config: Some(self.config.clone()).into(),
            runtime_handler: self.handler.unwrap_or_else(|| node.handler(self.network)),
            ..Default::default()
        };
        let mut pod = Pod {
            cri: node.cri().clone(),
            config: self.config,
            cgroup,
            logs,
            image: node.ctr().image().to_owned(),
            id: String::new(),
        };
        let answer = pod
            .cri
            .runtime::<RunPodSandboxResponse>("RunPodSandbox", &request);
        match answer {
            Ok(answer) => pod.id = answer.pod_sandbox_id,
            Err(error) => {
                pod.remove_cgroup().context("after a pod that failed")?;
                return Err(error);
            }
        }
        Ok(pod)
    }
}

fn namespaces(processes: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        pid: processes.into(),
        ..Default::default()
    }
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    cri: Cri,
    config: PodSandboxConfig,
    cgroup: PathBuf,
    logs: PathBuf,
    image: String,
    /// Its sandbox's id.
    pub id: String,
}

impl Pod {
    /// Runs a pod with nothing special.
    pub fn run(node: &Node, name: &str) -> Result<Self> {
        Spec::new(name).run(node)
    }

    /// A container of this pod that is asked for: a shell's script.
    #[must_use]
    pub fn container(&self, name: &str, script: &str) -> ContainerConfig {
        self.container_of(name, &["sh", "-c", script])
    }

    /// A container of this pod that is asked for.
    #[must_use]
    pub fn container_of(&self, name: &str, argv: &[&str]) -> ContainerConfig {
        let options = &self.config.linux.security_context.namespace_options;
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                ..Default::default()
            })
            .into(),
            image: Some(ImageSpec {
                image: self.image.clone(),
                ..Default::default()
            })
            .into(),
            command: argv.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: options.clone(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    /// Creates a container.
    pub fn create(&self, config: &ContainerConfig) -> Result<Container> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config.clone()).into(),
            sandbox_config: Some(self.config.clone()).into(),
            ..Default::default()
        };
        let answer: CreateContainerResponse = self.cri.runtime("CreateContainer", &request)?;
        Ok(Container {
            cri: self.cri.clone(),
            id: answer.container_id,
            log: self.logs.join(&config.log_path),
        })
    }

    /// Creates and starts a container.
    pub fn start(&self, config: &ContainerConfig) -> Result<Container> {
        let container = self.create(config)?;
        container.start()?;
        Ok(container)
    }

    /// Creates and starts a container that runs a shell's script.
    pub fn start_script(&self, name: &str, script: &str) -> Result<Container> {
        self.start(&self.container(name, script))
    }

    /// What containerd says of it.
    pub fn status(&self) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer: PodSandboxStatusResponse = self.cri.runtime("PodSandboxStatus", &request)?;
        answer.status.into_option().context("no status")
    }

    /// Its addresses: IPv4, then IPv6.
    pub fn addresses(&self) -> Result<[String; 2]> {
        let network = self.status()?.network;
        let mut all = vec![network.ip.clone()];
        all.extend(network.additional_ips.iter().map(|one| one.ip.clone()));
        // Which family comes first is the plugin's choice.
        let pick = |v6: bool| {
            let found = all.iter().find(|address| address.contains(':') == v6);
            found.cloned().with_context(|| format!("addresses {all:?}"))
        };
        Ok([pick(false)?, pick(true)?])
    }

    /// Stops it and everything in it.
    pub fn stop(&self) -> Result<()> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let _: Empty = self.cri.runtime("StopPodSandbox", &request)?;
        Ok(())
    }

    /// Removes it, as a kubelet does: stopped first, its cgroup last.
    pub fn remove(&self) -> Result<()> {
        self.stop()?;
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let _: Empty = self.cri.runtime("RemovePodSandbox", &request)?;
        self.remove_cgroup()
    }

    fn remove_cgroup(&self) -> Result<()> {
        let path = format!("/sys/fs/cgroup{}", self.cgroup.display());
        let mut last = None;
        until(&format!("an empty cgroup {path}"), LIMIT, || {
            let removed = fs::remove_dir(&path);
            last = removed.as_ref().err().map(ToString::to_string);
            Ok(removed.is_ok().then_some(()))
        })
        .with_context(|| last.unwrap_or_default())
    }
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub struct Container {
    cri: Cri,
    /// Its id.
    pub id: String,
    log: PathBuf,
}

impl Container {
    fn request(&self) -> ContainerRequest {
        ContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        }
    }

    /// Starts it.
    pub fn start(&self) -> Result<()> {
        let _: Empty = self.cri.runtime("StartContainer", &self.request())?;
        Ok(())
    }

    /// Stops it: SIGTERM, then SIGKILL once `seconds` have passed.
    pub fn stop(&self, seconds: i64) -> Result<()> {
        let request = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: seconds,
            ..Default::default()
        };
        let _: Empty = self.cri.runtime("StopContainer", &request)?;
        Ok(())
    }

    /// Removes it, by force where it runs.
    pub fn remove(&self) -> Result<()> {
        let _: Empty = self.cri.runtime("RemoveContainer", &self.request())?;
        Ok(())
    }

    /// What containerd says of it.
    pub fn status(&self) -> Result<ContainerStatus> {
        let answer: ContainerStatusResponse =
            self.cri.runtime("ContainerStatus", &self.request())?;
        answer.status.into_option().context("no status")
    }

    /// Waits for its end; answers its exit code.
    pub fn wait(&self, limit: Duration) -> Result<i32> {
        until(&format!("the end of container {}", self.id), limit, || {
            let status = self.status()?;
            let exited = status.state == ContainerState::CONTAINER_EXITED.into();
            Ok(exited.then_some(status.exit_code))
        })
        .with_context(|| self.describe())
    }

    /// Runs a command in it to its end, with containerd's own deadline.
    pub fn exec(&self, argv: &[&str]) -> Result<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: argv.iter().map(|&word| word.to_owned()).collect(),
            timeout: LIMIT.as_secs().cast_signed(),
            ..Default::default()
        };
        self.cri.runtime("ExecSync", &request)
    }

    /// Runs a shell's script in it; answers its output. Fails unless it ends with 0 and says
    /// nothing on standard error.
    pub fn shell(&self, script: &str) -> Result<String> {
        let answer = self.exec(&["sh", "-c", script])?;
        let stdout = String::from_utf8_lossy(&answer.stdout);
        let stderr = String::from_utf8_lossy(&answer.stderr);
        ensure!(
            answer.exit_code == 0 && stderr.is_empty(),
            "`{script}`: exit code {}\n--- stdout: {stdout}\n--- stderr: {stderr}",
            answer.exit_code,
        );
        Ok(stdout.trim_end().to_owned())
    }

    /// What its log has of a stream, `stdout` or `stderr`.
    pub fn log(&self, stream: &str) -> Result<String> {
        let text = fs::read_to_string(&self.log)
            .with_context(|| format!("reading {}", self.log.display()))?;
        let mut out = String::new();
        for line in text.lines() {
            // A time, the stream, F for a full line or P for a part of one, and the words.
            let mut fields = line.splitn(4, ' ');
            let (_, of, kind, words) = (fields.next(), fields.next(), fields.next(), fields.next());
            if of == Some(stream) {
                out.push_str(words.unwrap_or_default());
                if kind == Some("F") {
                    out.push('\n');
                }
            }
        }
        Ok(out)
    }

    /// Waits until its log has the words.
    pub fn wait_for_log(&self, words: &str, limit: Duration) -> Result<()> {
        until(&format!("{words:?} in a log"), limit, || {
            Ok(self.log("stdout")?.contains(words).then_some(()))
        })
        .with_context(|| self.describe())
    }

    fn describe(&self) -> String {
        let status = self.status();
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        match status {
            Ok(status) => format!(
                "state {:?}, exit code {}, {} {}\n--- log: {log}",
                status.state, status.exit_code, status.reason, status.message
            ),
            Err(error) => format!("{error:#}\n--- log: {log}"),
        }
    }
}
