// SPDX-License-Identifier: Apache-2.0
//! Volumes of a pod, where a kubelet puts them, and how containers ask for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
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

    /// Where a kubelet binds a part of a volume (`subPath`) for a container's mount.
    pub fn subpath(&self, volume: &str, container: &str, mount: usize) -> Result<PathBuf> {
        let folder = self.folder.path().join("pods/uid/volume-subpaths");
        let path = folder.join(volume).join(container).join(mount.to_string());
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

/// A mount of the host's, for as long as a test uses it.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// A new file system.
    pub fn new(kind: &str, options: &str, at: &Path) -> Result<Self> {
        Self::mount(
            Command::new("mount").args(["-t", kind, "-o", options, kind]),
            at,
        )
    }

    /// A file system in a file, where no device node opens: a guest may make some there.
    pub fn image(image: &Path, at: &Path) -> Result<Self> {
        Self::mount(
            Command::new("mount").args(["-o", "loop,nodev"]).arg(image),
            at,
        )
    }

    /// A folder in another place as well.
    pub fn bind(from: &Path, at: &Path) -> Result<Self> {
        Self::mount(Command::new("mount").arg("--bind").arg(from), at)
    }

    /// A folder as a mount of its own, whose copies follow what is mounted in it.
    pub fn shared(at: &Path) -> Result<Self> {
        let mounted = Self::bind(at, at)?;
        let mut change = Command::new("mount");
        let status = change.arg("--make-shared").arg(at).status()?;
        ensure!(status.success(), "{change:?}");
        Ok(mounted)
    }

    fn mount(command: &mut Command, at: &Path) -> Result<Self> {
        let status = command.arg(at).status()?;
        ensure!(status.success(), "{command:?}");
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whoever still uses it keeps it until then.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
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
