// SPDX-License-Identifier: Apache-2.0
//! Networks of pods: Debian's CNI plugins with configurations of our own, on a bridge of our own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process::Running;

/// Where Debian's package containernetworking-plugins has them.
const PLUGINS: &str = "/usr/lib/cni";
/// The bridge on the host, its addresses those of the gateway.
pub const BRIDGE: &str = "nutshell-pods";
/// The bridge's own addresses.
pub const GATEWAYS: [&str; 2] = ["10.88.0.1", "fd00:88::1"];

const LIMIT: Duration = Duration::from_secs(30);

/// Fails, once it has seen that the plugins before it have done their work.
const FAILING: &str = r#"#!/bin/sh
config=$(cat)
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
ADD)
    echo '{"cniVersion":"1.0.0","code":100,"msg":"the test network is out of order"}'
    exit 1 ;;
esac
"#;

/// Passes on what the plugins before it have made, and takes away the namespace that they made it
/// in.
const VANISHING: &str = r#"#!/bin/sh
config=$(cat)
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
ADD)
    umount "$CNI_NETNS" && rm "$CNI_NETNS" || exit 1
    printf '%s' "$config" | sed 's/.*"prevResult"://; s/,"type":"vanishing".*//' ;;
esac
"#;

/// Networks, one a folder: which one a pod joins is its runtime handler's choice.
#[derive(Debug)]
pub struct Networks {
    folder: PathBuf,
}

/// A kind of network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// A bridge with the usual MTU, both address families.
    Bridge,
    /// The same with jumbo frames.
    Jumbo,
    /// A bridge whose chain of plugins fails behind it.
    Failing,
    /// A bridge; then somebody removes the network namespace.
    Vanishing,
}

/// All kinds.
pub const KINDS: [Network; 4] = [
    Network::Bridge,
    Network::Jumbo,
    Network::Failing,
    Network::Vanishing,
];

impl Network {
    /// What its runtime handlers' names end with.
    #[must_use]
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Bridge => "",
            Self::Jumbo => "-jumbo",
            Self::Failing => "-failing",
            Self::Vanishing => "-vanishing",
        }
    }

    /// Largest packet.
    #[must_use]
    pub fn mtu(self) -> u32 {
        match self {
            Self::Jumbo => 9000,
            Self::Bridge | Self::Failing | Self::Vanishing => 1500,
        }
    }
}

impl Networks {
    /// Makes the bridge, and the configurations below `folder`.
    pub fn new(folder: &Path) -> Result<Self> {
        let this = Self {
            folder: folder.to_owned(),
        };
        // A bridge takes the largest MTU that all of its ports have.
        ip(&["link", "add", BRIDGE, "mtu", "9000", "type", "bridge"])?;
        ip(&["link", "set", BRIDGE, "up"])?;
        let plugins = this.plugins();
        fs::create_dir_all(&plugins)?;
        let installed = fs::read_dir(PLUGINS).with_context(|| {
            format!("no CNI plugins in {PLUGINS}; Debian's package is containernetworking-plugins")
        })?;
        for plugin in installed {
            let plugin = plugin?;
            symlink(plugin.path(), plugins.join(plugin.file_name()))?;
        }
        for (name, script) in [("failing", FAILING), ("vanishing", VANISHING)] {
            let path = plugins.join(name);
            fs::write(&path, script)?;
            fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        }
        for kind in KINDS {
            let folder = this.configuration(kind);
            fs::create_dir_all(&folder)?;
            let list = serde_json::to_vec_pretty(&this.list(kind))?;
            fs::write(folder.join("10-pods.conflist"), list)?;
        }
        Ok(this)
    }

    /// Folder of the plugins.
    #[must_use]
    pub fn plugins(&self) -> PathBuf {
        self.folder.join("plugins")
    }

    /// Folder of a network's configuration.
    #[must_use]
    pub fn configuration(&self, kind: Network) -> PathBuf {
        self.folder.join(format!("net{}", kind.suffix()))
    }

    fn list(&self, kind: Network) -> Value {
        let mut plugins = vec![json!({
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "mtu": kind.mtu(),
            "ipam": {
                "type": "host-local",
                "dataDir": self.folder.join("leases"),
                "ranges": [
                    [{ "subnet": "10.88.0.0/16", "gateway": GATEWAYS[0] }],
                    [{ "subnet": "fd00:88::/64", "gateway": GATEWAYS[1] }],
                ],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        })];
        match kind {
            Network::Bridge | Network::Jumbo => {}
            Network::Failing => plugins.push(json!({ "type": "failing" })),
            Network::Vanishing => plugins.push(json!({ "type": "vanishing" })),
        }
        // All kinds are one network, whose addresses are given once.
        json!({ "cniVersion": "0.4.0", "name": "pods", "plugins": plugins })
    }

    /// Addresses that are given to pods.
    pub fn leases(&self) -> Result<Vec<String>> {
        let Ok(entries) = fs::read_dir(self.folder.join("leases/pods")) else {
            return Ok(Vec::new());
        };
        let mut leases = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !name.starts_with("last_reserved_ip") && name != "lock" {
                leases.push(name);
            }
        }
        leases.sort();
        Ok(leases)
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", BRIDGE]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let mut running = Running::start(Command::new("ip").args(arguments))?;
    running.close_stdin();
    let output = running.finish(LIMIT)?;
    ensure!(output.code == Some(0), "{output}");
    Ok(())
}
