// SPDX-License-Identifier: Apache-2.0
//! A private containerd on this machine: own root, state and socket, our runtime in its PATH.

use crate::guest::Guest;
use crate::packages::as_root;
use crate::progress;
use anyhow::{Context, Result, bail};
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// A running containerd; dropping it ends it and removes what it kept.
#[derive(Debug)]
pub(crate) struct Containerd {
    process: Child,
    folder: TempDir,
}

impl Containerd {
    /// Starts it and waits until it listens.
    pub(crate) fn start(shim: &Path, guest: &Guest) -> Result<Self> {
        let folder =
            TempDir::with_prefix("nutshell-run.").context("creating containerd's folder")?;
        let at = |name: &str| folder.path().join(name);
        let log = File::create(at("containerd.log"))?;
        fs::write(
            at("containerd.toml"),
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
        )?;
        fs::write(
            at("configuration.toml"),
            format!(
                "[hypervisor.dragonball]\nkernel = {:?}\nimage = {:?}\n",
                guest.kernel, guest.image
            ),
        )?;
        let mut path =
            env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>();
        path.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
        path.insert(
            0,
            shim.parent().context("the shim has no folder")?.to_owned(),
        );
        let process = as_root("env")
            .arg(assignment("PATH", env::join_paths(path)?))
            .arg(assignment("KATA_CONF_FILE", at("configuration.toml")))
            .args(["containerd", "--config"])
            .arg(at("containerd.toml"))
            .arg("--root")
            .arg(at("root"))
            .arg("--state")
            .arg(at("state"))
            .arg("--address")
            .arg(at("containerd.sock"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting containerd")?;
        let mut containerd = Self { process, folder };
        containerd.wait()?;
        Ok(containerd)
    }

    /// Imports an OCI archive.
    pub(crate) fn import(&self, archive: &Path) -> Result<()> {
        progress::output(self.client().args(["images", "import"]).arg(archive)).map(drop)
    }

    /// Runs `ctr` with our terminal and returns its exit code.
    pub(crate) fn ctr(&self, arguments: Vec<String>) -> Result<u8> {
        let status = self
            .client()
            .args(arguments)
            .status()
            .context("starting ctr")?;
        Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(u8::MAX))
    }

    fn client(&self) -> Command {
        let mut command = as_root("ctr");
        command
            .arg("--address")
            .arg(self.folder.path().join("containerd.sock"));
        command
    }

    fn wait(&mut self) -> Result<()> {
        let begin = Instant::now();
        let log = self.folder.path().join("containerd.log");
        // Only root may connect to the socket; that it is there is enough to start asking.
        while !self.folder.path().join("containerd.sock").exists() {
            if let Some(status) = self.process.try_wait()? {
                bail!("containerd ended: {status}\n{}", progress::tail(&log, 10));
            }
            if begin.elapsed() > TIMEOUT {
                bail!(
                    "containerd is not up after {} s\n{}",
                    TIMEOUT.as_secs(),
                    progress::tail(&log, 10)
                );
            }
            sleep(POLL);
        }
        progress::output(self.client().arg("version")).map(drop)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Through root's kill, since with sudo the process is not ours to signal.
        let pid = self.process.id().to_string();
        let _ = as_root("kill").arg(&pid).status();
        let _ = self.process.wait();
        for name in ["root", "state"] {
            let _ = as_root("rm")
                .args(["-rf", "--one-file-system"])
                .arg(self.folder.path().join(name))
                .status();
        }
    }
}

fn assignment(name: &str, value: impl AsRef<OsStr>) -> OsString {
    let mut text = OsString::from(name);
    text.push("=");
    text.push(value);
    text
}
