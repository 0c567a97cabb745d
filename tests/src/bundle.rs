// SPDX-License-Identifier: Apache-2.0
//! A root filesystem and an OCI specification, for what `ctr run` has no flag for.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::ctr::Ctr;

/// Folders of the root filesystem.
const FOLDERS: [&str; 8] = ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"];

/// A folder with `config.json` and `rootfs`, gone with this value.
#[derive(Debug)]
pub struct Bundle {
    folder: TempDir,
    spec: Value,
}

impl Bundle {
    /// containerd's default specification over a busybox of the machine's; runs a shell's script.
    pub fn new(ctr: &Ctr, script: &str) -> Result<Self> {
        // Not below a run folder that the leak check watches, and not on an overlay.
        let folder = tempfile::Builder::new()
            .prefix("nutshell-tests-")
            .tempdir_in("/run")?;
        let root = folder.path().join("rootfs");
        for name in FOLDERS {
            fs::create_dir_all(root.join(name))?;
        }
        fs::set_permissions(root.join("tmp"), PermissionsExt::from_mode(0o1777))?;
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))?;
        let busybox = busybox()?;
        fs::copy(&busybox, root.join("bin/busybox"))?;
        let applets = Command::new(&busybox).arg("--list").output()?;
        ensure!(applets.status.success(), "busybox lists no applets");
        for applet in String::from_utf8_lossy(&applets.stdout).lines() {
            if applet != "busybox" {
                symlink("busybox", root.join("bin").join(applet))?;
            }
        }
        let output = ctr.call(&["oci", "spec"])?.exits(0)?;
        let mut spec: Value = serde_json::from_slice(&output.stdout)?;
        merge(
            &mut spec,
            json!({
                "root": { "path": root },
                "process": { "args": ["sh", "-c", script], "env": ["PATH=/bin"] },
            }),
        );
        Ok(Self { folder, spec })
    }

    /// Changes the specification: objects are merged, everything else is replaced.
    #[must_use]
    pub fn with(mut self, change: Value) -> Self {
        merge(&mut self.spec, change);
        self
    }

    /// Adds a mount to the specification.
    #[must_use]
    pub fn with_mount(mut self, mount: Value) -> Self {
        if let Some(mounts) = self.spec.get_mut("mounts").and_then(Value::as_array_mut) {
            mounts.push(mount);
        }
        self
    }

    /// Nothing masked, nothing read-only, and these capabilities. `ctr run --privileged` would also
    /// ask for every device of the host, which a container in a VM can't have.
    #[must_use]
    pub fn privileged(self, capabilities: &[&str]) -> Self {
        self.with(json!({
            "process": { "capabilities": {
                "bounding": capabilities, "permitted": capabilities, "effective": capabilities,
            }},
            "linux": { "maskedPaths": [], "readonlyPaths": [] },
        }))
    }

    /// The root filesystem.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    /// Writes the specification; answers its path.
    pub fn write(&self) -> Result<PathBuf> {
        let path = self.folder.path().join("config.json");
        fs::write(&path, serde_json::to_vec_pretty(&self.spec)?)?;
        Ok(path)
    }
}

fn busybox() -> Result<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| Path::exists(path))
        .context("no busybox on this machine; Debian's package is busybox-static")
}

fn merge(into: &mut Value, change: Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (key, value) in change {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change,
    }
}
