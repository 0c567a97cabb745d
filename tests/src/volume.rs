// SPDX-License-Identifier: Apache-2.0
//! Volumes of a pod, where a kubelet puts them, and how containers ask for them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::cri::messages::{ContainerConfig, Mount};

/// A pod's folder of a kubelet.
#[derive(Debug)]
pub struct Volumes {
    folder: TempDir,
}

impl Volumes {
    /// An empty one, on the machine's own disk.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("nutshell-volumes-")
            .tempdir_in("/var/tmp")?;
        Ok(Self { folder })
    }

    /// Where the volume of a kind (`empty-dir`, `configmap`, ...) is; made unless it is there.
    pub fn volume(&self, kind: &str, name: &str) -> Result<PathBuf> {
        let path = self
            .folder
            .path()
            .join("pods/uid/volumes")
            .join(format!("kubernetes.io~{kind}"))
            .join(name);
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

/// How a container has a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may write.
    Write,
    /// It may not.
    Read,
}

/// A container that has `source` of the host at `destination`.
#[must_use]
pub fn with_mount(
    mut config: ContainerConfig,
    source: &Path,
    destination: &str,
    access: Access,
) -> ContainerConfig {
    config.mounts.push(Mount {
        container_path: destination.to_owned(),
        host_path: source.display().to_string(),
        readonly: access == Access::Read,
        ..Default::default()
    });
    config
}

/// A container with every capability and every device of its machine. Its pod must be
/// [privileged](crate::pod::Spec::privileged), too.
#[must_use]
pub fn privileged(mut config: ContainerConfig) -> ContainerConfig {
    let linux = config.linux.mut_or_insert_default();
    linux.security_context.mut_or_insert_default().privileged = true;
    config
}
