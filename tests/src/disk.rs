// SPDX-License-Identifier: Apache-2.0
//! Disks of the host: files that hold a disk's content, loop devices on them, and volumes that
//! guests mount from them.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::cri::messages::{ContainerConfig, Device};

/// What makes a file system of this kind, and says nothing of it.
fn mkfs(kind: &str) -> Command {
    let mut command = Command::new(format!("mkfs.{kind}"));
    command.arg("-q");
    command
}

/// A file that holds a disk's content, gone with this value.
#[derive(Debug)]
pub struct Image {
    folder: TempDir,
}

impl Image {
    /// A disk of zeroes, sparse.
    pub fn new(bytes: u64) -> Result<Self> {
        Self::new_in(Path::new("/var/tmp"), bytes)
    }

    fn new_in(place: &Path, bytes: u64) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("nutshell-disk-")
            .tempdir_in(place)?;
        let image = Self { folder };
        File::create(image.path())?.set_len(bytes)?;
        Ok(image)
    }

    /// A disk with an ext4 file system, empty or with the content of a folder.
    pub fn ext4(bytes: u64, content: Option<&Path>) -> Result<Self> {
        let image = Self::new(bytes)?;
        let mut command = mkfs("ext4");
        if let Some(content) = content {
            command.arg("-d").arg(content);
        }
        run(command.arg(image.path()))?;
        Ok(image)
    }

    /// A disk in a folder, with an empty ext4 whose own structures have their place on the host, while
    /// what files hold has none yet.
    pub fn ext4_in(place: &Path, bytes: u64) -> Result<Self> {
        let image = Self::new_in(place, bytes)?;
        run(mkfs("ext4")
            .args(["-b", "4096", "-O", "^metadata_csum,^uninit_bg"])
            .args(["-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"])
            .arg(image.path()))?;
        Ok(image)
    }

    /// A disk with an empty file system of this kind.
    pub fn with_filesystem(kind: &str, bytes: u64) -> Result<Self> {
        let image = Self::new(bytes)?;
        run(mkfs(kind).arg(image.path()))?;
        Ok(image)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// The host finds nothing wrong with its file system, an ext4.
    pub fn check(&self) -> Result<()> {
        self.check_with("ext4")
    }

    /// The host finds nothing wrong with its file system of this kind.
    pub fn check_with(&self, kind: &str) -> Result<()> {
        let (program, options) = match kind {
            "xfs" => ("xfs_repair", "-n"),
            _ => ("e2fsck", "-fn"),
        };
        run(Command::new(program).arg(options).arg(self.path())).map(drop)
    }
}

/// A loop device, detached with this value.
#[derive(Debug)]
pub struct Loop {
    path: PathBuf,
}

impl Loop {
    /// A block device with the content of `image`.
    pub fn new(image: &Image) -> Result<Self> {
        let path = run(Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image.path()))?;
        Ok(Self { path: path.into() })
    }

    /// Its node.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its node, as text.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// It has more bytes from now on, as the image below it has.
    pub fn grow(&self, image: &Image, bytes: u64) -> Result<()> {
        let file = File::options().write(true).open(image.path())?;
        file.set_len(bytes)?;
        run(Command::new("losetup")
            .arg("--set-capacity")
            .arg(&self.path))
        .map(drop)
    }

    /// What the host reads at its start.
    pub fn start(&self, bytes: usize) -> Result<String> {
        let mut content = vec![0; bytes];
        File::open(&self.path)?.read_exact(&mut content)?;
        Ok(String::from_utf8_lossy(&content).into_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = run(Command::new("losetup").arg("--detach").arg(&self.path));
        if let Err(error) = detached {
            eprintln!("{error:#}");
        }
    }
}

/// A direct-assigned volume, taken back with this value.
#[derive(Debug)]
pub struct Assigned {
    path: PathBuf,
}

impl Assigned {
    /// Tells the runtime that what is bound from `path` is a disk.
    pub fn add(path: &Path, info: &Value) -> Result<Self> {
        run(Command::new("kata-ctl")
            .args(["direct-volume", "add", "--volume-path"])
            .arg(path)
            .args(["--mount-info", &info.to_string()]))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// What it holds, while a container uses it.
    pub fn stats(&self) -> Result<Value> {
        let output = run(Command::new("kata-ctl")
            .args(["direct-volume", "stats", "--volume-path"])
            .arg(&self.path))?;
        serde_json::from_str(&output).with_context(|| output.clone())
    }

    /// Has its file system take so much of its disk.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        run(Command::new("kata-ctl")
            .args(["direct-volume", "resize", "--volume-path"])
            .arg(&self.path)
            .args(["--size", &bytes.to_string()]))
        .map(drop)
    }
}

impl Drop for Assigned {
    fn drop(&mut self) {
        let removed = run(Command::new("kata-ctl")
            .args(["direct-volume", "remove", "--volume-path"])
            .arg(&self.path));
        if let Err(error) = removed {
            eprintln!("{error:#}");
        }
        // The parents stay where others are told.
        let _ = fs::remove_dir("/run/kata-containers/shared/direct-volumes");
    }
}

/// A container that has a block device of the host; `permissions` are of `r`, `w` and `m`.
#[must_use]
pub fn with_device(
    mut config: ContainerConfig,
    host: &Path,
    path: &str,
    permissions: &str,
) -> ContainerConfig {
    config.devices.push(Device {
        container_path: path.to_owned(),
        host_path: host.display().to_string(),
        permissions: permissions.to_owned(),
        ..Default::default()
    });
    config
}

/// What a program prints, without space around it.
///
/// # Errors
/// It can't be started or fails.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
