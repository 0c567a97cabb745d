// SPDX-License-Identifier: Apache-2.0
//! What runs in the VM of a pod: kernel, and image with the agent.

pub(crate) mod agent;
pub(crate) mod kernel;

use crate::{build, progress, workspace};
use anyhow::{Context, Result};
use build::Profile;
use kernel::Flavour;
use std::fs;
use std::path::{self, Path, PathBuf};

/// The kernel's place below a prefix.
pub(crate) const KERNEL: &str = "share/kata-containers/vmlinux.container";
/// The image's place below a prefix.
pub(crate) const IMAGE: &str = "share/kata-containers/kata-containers.img";

/// Files that a VM is started from.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) image: PathBuf,
}

/// Builds what is not up to date. An image with a shell is one of its own.
pub(crate) fn build(profile: Profile, flavour: Flavour, shell: Option<&Path>) -> Result<Guest> {
    let kernel = kernel::build(flavour)?;
    let agent = agent::build(profile)?;
    let folder = workspace::target_dir()?.join("guest");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let suffix = shell.map_or("", |_| "-shell");
    let image = folder.join(format!("kata-containers-{}{suffix}.img", profile.name()));
    let mut command = build::cargo("run", Profile::Dev)?;
    command
        .args(["--package", "rootfs-builder", "--", "--agent"])
        .arg(agent)
        .arg("--output")
        .arg(&image);
    if let Some(shell) = shell {
        command.arg("--shell").arg(path::absolute(shell)?);
    }
    progress::run(&mut command).context("building the guest image")?;
    Ok(Guest { kernel, image })
}
