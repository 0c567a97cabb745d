// SPDX-License-Identifier: Apache-2.0
//! Brings up containerd with our runtime in the dev VM.

use super::wire::Setup;
use crate::progress;
use anyhow::{Context, Result, bail};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

const CONFIG: &str = "/etc/containerd/config.toml";
const SOCKET: &str = "/run/containerd/containerd.sock";
const LOG: &str = "/var/log/containerd.log";
const TIMEOUT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// The kubelet's plugin is left out: it costs start time, and `ctr` does without.
const CONFIG_TEXT: &str = "\
version = 2
disabled_plugins = [\"io.containerd.grpc.v1.cri\"]
";

/// Places the files, starts containerd and imports the images.
pub(crate) fn run(setup: &Setup) -> Result<()> {
    if setup.images.is_empty() {
        return place(setup);
    }
    write(CONFIG, CONFIG_TEXT)?;
    let log = File::create(LOG).with_context(|| format!("creating {LOG}"))?;
    let mut containerd = Command::new("containerd")
        .args(["--config", CONFIG])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting containerd")?;
    place(setup)?;
    let begin = Instant::now();
    while UnixStream::connect(SOCKET).is_err() {
        if let Some(status) = containerd.try_wait()? {
            bail!(
                "containerd ended: {status}\n{}",
                progress::tail(Path::new(LOG), 10)
            );
        }
        if begin.elapsed() > TIMEOUT {
            bail!(
                "containerd is not up after {} s\n{}",
                TIMEOUT.as_secs(),
                progress::tail(Path::new(LOG), 10)
            );
        }
        sleep(POLL);
    }
    for image in &setup.images {
        progress::output(Command::new("ctr").args(["images", "import"]).arg(image))?;
    }
    Ok(())
}

fn place(setup: &Setup) -> Result<()> {
    for (from, to) in &setup.files {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        // The machine may have an installed one; the overlay keeps its own copy of ours.
        let _ = fs::remove_file(to);
        fs::copy(from, to)
            .with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
        fs::set_permissions(to, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn write(path: &str, text: &str) -> Result<()> {
    if let Some(folder) = Path::new(path).parent() {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    fs::write(path, text).with_context(|| format!("writing {path}"))
}
