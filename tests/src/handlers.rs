// SPDX-License-Identifier: Apache-2.0
//! The runtime handlers of a node, in the words of containerd 1.x and 2.x.
//!
//! Ours are made of the snippets that an admin adds to containerd's configuration; a handler more
//! for each network and each configuration that the suite needs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::cni::{KINDS, Network, Networks};
use crate::containerd::Tables;

/// The image that keeps a pod's namespaces.
pub(crate) const PAUSE: &str = "docker.io/library/pause:latest";
/// What is asked for a pod's sandbox: `shim`, or `podsandbox` for a pause container.
const SANDBOXER: &str = "NUTSHELL_TEST_SANDBOXER";
const RUNC: &str = "io.containerd.runc.v2";

/// Configurations of our runtime, each the handler's whose name ends so. The first: small machines,
/// for a pod needs no more, and the dev VM has room for several.
const CONFIGURATIONS: [(&str, &str); 4] = [
    ("", "[hypervisor.dragonball]\ndefault_memory = 256\n"),
    (
        "-growing",
        "[hypervisor.dragonball]\ndefault_memory = 256\ndefault_maxmemory = 2304\n\
         default_maxvcpus = 4\n[runtime]\nstatic_sandbox_resource_mgmt = false\n",
    ),
    ("-unknown-key", "[runtime]\nno_such_key = 1\n"),
    (
        "-unfit-key",
        "[hypervisor.dragonball]\nenable_iommu = true\n",
    ),
];

/// Whether containerd asks the runtime itself for a pod's sandbox.
///
/// A handler has no options then: containerd 2.1 takes them for runc's when it starts a container,
/// and fails (containerd/containerd#12986).
#[must_use]
pub fn by_sandbox_api() -> bool {
    env::var(SANDBOXER).is_ok_and(|sandboxer| sandboxer == "shim")
}

/// How containerd's configuration is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Of containerd 1.6 and 1.7.
    One,
    /// Of containerd 2.
    Two,
}

impl Dialect {
    fn version(self) -> u32 {
        match self {
            Self::One => 2,
            Self::Two => 3,
        }
    }

    /// What an admin adds.
    fn snippet(self) -> &'static str {
        match self {
            Self::One => include_str!("../k8s/containerd-1.toml"),
            Self::Two => include_str!("../k8s/containerd-2.toml"),
        }
    }

    /// The CRI plugin's table that holds networks and runtimes.
    fn plugin(self) -> &'static str {
        match self {
            Self::One => r#"plugins."io.containerd.grpc.v1.cri""#,
            Self::Two => r#"plugins."io.containerd.cri.v1.runtime""#,
        }
    }

    /// The plugin itself: its images, its networks, and where it serves streams.
    fn base(self, networks: &Networks) -> String {
        let streams = "stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n";
        let huge = "disable_hugetlb_controller = false\n";
        let (plugins, network) = (networks.plugins(), networks.configuration(Network::Bridge));
        match self {
            Self::One => format!(
                "[{cri}]\nsandbox_image = {PAUSE:?}\n{huge}{streams}\
                 [{cri}.cni]\nbin_dir = {plugins:?}\nconf_dir = {network:?}\n",
                cri = self.plugin(),
            ),
            Self::Two => format!(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\n{streams}\
                 [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = {PAUSE:?}\n\
                 [{cri}]\n{huge}\
                 [{cri}.cni]\nbin_dirs = [{plugins:?}]\nconf_dir = {network:?}\n",
                cri = self.plugin(),
            ),
        }
    }

    /// A handler of our runtime.
    fn kata(self, name: &str, network: &Path, configuration: &Path) -> Result<String> {
        let snippet = self.snippet();
        ensure!(
            snippet.contains("runtimes.kata]"),
            "the snippet for {self:?} defines no runtime handler kata"
        );
        let mut snippet = snippet.replace("runtimes.kata]", &format!("runtimes.{name}]"));
        snippet += &format!("cni_conf_dir = {network:?}\n");
        if by_sandbox_api() {
            ensure!(
                snippet.contains("\"podsandbox\""),
                "the snippet for {self:?} has no choice of a sandboxer"
            );
            return Ok(snippet.replace("\"podsandbox\"", "\"shim\""));
        }
        snippet += &format!(
            "[{cri}.containerd.runtimes.{name}.options]\nConfigPath = {configuration:?}\n",
            cri = self.plugin(),
        );
        Ok(snippet)
    }

    /// A handler of runc.
    fn runc(self, name: &str, network: &Path) -> String {
        format!(
            "[{cri}.containerd.runtimes.{name}]\n\
             runtime_type = {RUNC:?}\ncni_conf_dir = {network:?}\n",
            cri = self.plugin(),
        )
    }
}

/// containerd's tables for the CRI plugin with all handlers, whose files are put into `folder`.
pub(crate) fn tables(dialect: Dialect, folder: &Path, networks: &Networks) -> Result<Tables> {
    for (name, text) in CONFIGURATIONS {
        fs::write(configuration(folder, name), text)?;
    }
    let mut text = dialect.base(networks);
    let usual = configuration(folder, "");
    for kind in KINDS {
        let (suffix, network) = (kind.suffix(), networks.configuration(kind));
        text += &dialect.kata(&format!("kata{suffix}"), &network, &usual)?;
        text += &dialect.runc(&format!("runc{suffix}"), &network);
    }
    let network = networks.configuration(Network::Bridge);
    for (name, _) in CONFIGURATIONS.iter().filter(|(name, _)| !name.is_empty()) {
        let configuration = configuration(folder, name);
        text += &dialect.kata(&format!("kata{name}"), &network, &configuration)?;
    }
    Ok(Tables {
        version: dialect.version(),
        text,
    })
}

/// Where a configuration of our runtime is; the usual one has no name.
pub(crate) fn configuration(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("configuration{name}.toml"))
}
