// SPDX-License-Identifier: Apache-2.0
//! A disk of the host that is full: the container that writes is told, the operator as well, and
//! nothing else comes of it.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use tests::cri::LIMIT;
use tests::disk::{Assigned, Image};
use tests::node::Node;
use tests::pod::{Container, Pod};
use tests::scenario::{Outcome, pod_vm_scenario};
use tests::volume::{Access, Mounted, Volumes, with_mount};
use tests::wait::until;

use crate::{MIB, WAITS, started};

/// What the operator is told of `file`, once it is there.
fn warnings(node: &Node, file: &str) -> Result<Vec<String>> {
    until("a warning", LIMIT, || {
        let log = node.containerd().log();
        let lines = log
            .lines()
            .filter(|line| line.contains("level=warn") || line.contains("WARN"));
        let lines: Vec<_> = lines
            .filter(|line| line.contains(file))
            .map(str::to_owned)
            .collect();
        Ok((!lines.is_empty()).then_some(lines))
    })
}

/// Writes until that fails; what the program says of it.
fn overfill(container: &Container) -> Result<String> {
    let script = "dd if=/dev/zero of=/data/fill bs=64k count=512 conv=fsync";
    let answer = container.exec(&["sh", "-c", script])?;
    let text = String::from_utf8_lossy(&answer.stderr).into_owned();
    ensure!(answer.exit_code != 0, "all was written: {text}");
    Ok(text)
}

const FILLS: &str = "rm -f /data/fill; dd if=/dev/urandom of=/data/after bs=64k count=32 \
    conv=fsync 2>/dev/null; wc -c < /data/after";

#[test]
fn a_full_file_system_of_the_host_is_the_writer_s_error() -> Outcome {
    let name = "a_full_file_system_of_the_host_is_the_writer_s_error";
    pod_vm_scenario(name, |node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("csi", "small")?;
        let _mounted = Mounted::new("tmpfs", "size=8m", &folder)?;
        let pod = Pod::run(node, "full-shared")?;
        let config = with_mount(
            pod.container("user", WAITS),
            &folder,
            "/data",
            Access::Write,
        );
        let user = started(&pod, &config)?;
        let before =
            user.shell("head -c 2097152 /dev/urandom > /data/before; md5sum /data/before")?;
        for _ in 0..2 {
            let text = overfill(&user)?;
            ensure!(text.contains("No space left on device"), "{text}");
        }
        let told = warnings(node, "/fill")?;
        ensure!(told.len() == 1, "{told:#?}");
        ensure!(told[0].contains("No space left on device"), "{told:#?}");
        ensure!(user.shell("md5sum /data/before")? == before);
        ensure!(user.shell(FILLS)? == (2 * MIB).to_string());
        ensure!(user.shell("md5sum /data/before")? == before);
        pod.remove()
    })
}

#[test]
fn a_full_disk_below_an_image_is_the_writer_s_error() -> Outcome {
    let name = "a_full_disk_below_an_image_is_the_writer_s_error";
    pod_vm_scenario(name, |node| {
        let volumes = Volumes::new()?;
        let host = volumes.volume("csi", "host")?;
        let mounted = Mounted::new("tmpfs", "size=16m", &host)?;
        // Sparse but for what the file system describes itself by; all that is written would fit.
        let image = Image::ext4_in(&host, 64 * MIB)?;
        let volume = volumes.volume("csi", "image")?;
        let info = json!({ "volume-type": "block", "device": image.path(), "fstype": "ext4" });
        let assigned = Assigned::add(&volume, &info)?;
        let pod = Pod::run(node, "full-image")?;
        let config = |name| with_mount(pod.container(name, WAITS), &volume, "/data", Access::Write);
        let user = started(&pod, &config("user"))?;
        let before = user.shell(
            "head -c 2097152 /dev/urandom > /data/before; sync /data/before; md5sum /data/before",
        )?;
        let text = overfill(&user)?;
        ensure!(
            text.contains("/output error") || text.contains("I/O error"),
            "{text}"
        );
        let told = warnings(node, &image.path().display().to_string())?;
        ensure!(told.len() == 1, "{told:#?}");
        ensure!(told[0].contains("No space left on device"), "{told:#?}");
        ensure!(user.shell("md5sum /data/before")? == before);
        make_room(&host)?;
        ensure!(user.shell(FILLS)? == (2 * MIB).to_string());
        // Mounted anew: past what the guest remembers.
        user.stop(30)?;
        user.remove()?;
        let again = started(&pod, &config("again"))?;
        ensure!(again.shell("md5sum /data/before")? == before);
        ensure!(again.shell("wc -c < /data/after")? == (2 * MIB).to_string());
        pod.remove()?;
        drop(assigned);
        image.check()?;
        drop(image);
        drop(mounted);
        Ok(())
    })
}

fn make_room(host: &Path) -> Result<()> {
    let mut command = Command::new("mount");
    let status = command
        .args(["-o", "remount,size=64m"])
        .arg(host)
        .status()?;
    ensure!(status.success(), "{command:?}");
    Ok(())
}
