// SPDX-License-Identifier: Apache-2.0
//! Disks of the guest: file systems on them, and device nodes.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    CreateContainerRequest, Device, FSGroup, GuestDetailsRequest, Storage,
};
use protocols::agent::oci;
use rustix::fs::{major, minor};
use tempfile::TempDir;

use crate::rig::{Rig, ctx, mount, refusal, texts};

/// A loop device with an ext4 file system, detached with this value.
struct Disk {
    node: PathBuf,
    _folder: TempDir,
}

impl Disk {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let image = folder.path().join("image");
        File::create(&image)?.set_len(16 << 20)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        let node = run(Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&image))?;
        Ok(Self {
            node: node.into(),
            _folder: folder,
        })
    }

    fn name(&self) -> String {
        self.node.display().to_string()
    }

    /// Whether a file system is mounted from it.
    fn is_in_use(&self) -> bool {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL;
        rustix::fs::open(&self.node, flags, rustix::fs::Mode::empty()).is_err()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.node));
    }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn storage(source: &str, options: &[&str]) -> Storage {
    Storage {
        driver: "blk".to_owned(),
        source: source.to_owned(),
        fstype: "ext4".to_owned(),
        options: texts(options),
        mount_point: "/run/kata-containers/sandbox/storage/disk".to_owned(),
        ..Storage::default()
    }
}

fn request(id: &str, spec: oci::Spec) -> CreateContainerRequest {
    CreateContainerRequest {
        container_id: id.to_owned(),
        OCI: MessageField::some(spec),
        ..CreateContainerRequest::default()
    }
}

#[tokio::test]
async fn a_file_system_on_a_disk_is_mounted_while_a_container_uses_it() -> Result<()> {
    let rig = Rig::new().await?;
    let disk = Disk::new()?;
    let mut storage = storage(&disk.name(), &["nodev"]);
    storage.fs_group = MessageField::some(FSGroup {
        group_id: 3000,
        ..FSGroup::default()
    });
    let script = "stat -c '%g %a' /data; echo kept > /data/file; cat /data/file";
    for (id, options, output) in [
        ("one", ["rbind", "rw"], "3000 2775\nkept\n"),
        ("two", ["rbind", "ro"], "3000 2775\nkept\n"),
    ] {
        let mut spec = rig.spec(id, &["sh", "-c", script])?;
        spec.Mounts
            .push(mount("/data", "bind", &storage.mount_point, &options));
        let mut request = request(id, spec);
        request.storages = vec![storage.clone()];
        rig.agent.create_container(ctx(), &request).await?;
        assert!(disk.is_in_use());
        rig.start(id).await?;
        let outcome = rig.outcome(id, "").await?;
        assert_eq!(outcome.stdout, output, "{outcome:?}");
        assert_eq!(outcome.stderr.is_empty(), id == "one", "{outcome:?}");
        rig.remove(id).await?;
        assert!(!disk.is_in_use(), "after {id}");
    }
    // Not even its own kernel writes to it then.
    let before = fs::read(&disk.node)?;
    let spec = rig.spec("three", &["true"])?;
    let mut request = request("three", spec);
    request.storages = vec![Storage {
        options: texts(&["ro"]),
        ..storage
    }];
    rig.agent.create_container(ctx(), &request).await?;
    rig.remove("three").await?;
    assert!(fs::read(&disk.node)? == before, "the disk has changed");
    Ok(())
}

#[tokio::test]
async fn a_disk_is_a_device_node_with_the_guest_s_number() -> Result<()> {
    let rig = Rig::new().await?;
    let disk = Disk::new()?;
    let number = fs::metadata(&disk.node)?.rdev();
    let script = "stat -c '%t:%T' /dev/xvda; dd if=/dev/xvda bs=1k count=1 2>/dev/null | wc -c";
    let mut spec = rig.spec("node", &["sh", "-c", script])?;
    // As the host numbers it.
    let linux = spec.Linux.mut_or_insert_default();
    linux.Devices.push(oci::LinuxDevice {
        Path: "/dev/xvda".to_owned(),
        Type: "b".to_owned(),
        Major: 4000,
        Minor: 1,
        ..oci::LinuxDevice::default()
    });
    let mut request = request("node", spec);
    request.devices = vec![Device {
        id: disk.name(),
        type_: "blk".to_owned(),
        container_path: "/dev/xvda".to_owned(),
        ..Device::default()
    }];
    rig.agent.create_container(ctx(), &request).await?;
    rig.start("node").await?;
    let outcome = rig.outcome("node", "").await?;
    let expected = format!("{:x}:{:x}\n1024\n", major(number), minor(number));
    assert_eq!(outcome.stdout, expected, "{outcome:?}");
    rig.remove("node").await?;

    let details = GuestDetailsRequest::default();
    let details = rig.agent.get_guest_details(ctx(), &details).await?;
    assert_eq!(details.agent_details.device_handlers, ["blk"]);
    assert!(
        details
            .agent_details
            .storage_handlers
            .contains(&"blk".to_owned())
    );
    Ok(())
}

#[tokio::test]
async fn a_disk_that_is_wrong_is_refused_by_name() -> Result<()> {
    let rig = Rig::new().await?;
    let disk = Disk::new()?;
    let mut wrong_kind = storage(&disk.name(), &[]);
    wrong_kind.fstype = "xfs".to_owned();
    let mut without_kind = storage(&disk.name(), &[]);
    without_kind.fstype.clear();
    let mut encrypted = storage(&disk.name(), &[]);
    encrypted.driver_options = texts(&["encryption_key=ephemeral"]);
    for (storage, word) in [
        // No slot of a PCI bus that this machine may have.
        (storage("1f.7/1f", &[]), "1f.7/1f"),
        (storage("nonsense", &[]), "nonsense"),
        (storage(&disk.name(), &["data=nonsense"]), "data"),
        (wrong_kind, "xfs"),
        (without_kind, "type of file system"),
        (encrypted, "encryption_key"),
    ] {
        let spec = rig.spec("wrong", &["true"])?;
        let mut request = request("wrong", spec);
        request.storages = vec![storage];
        let refused = rig.agent.create_container(ctx(), &request).await;
        let (_, message) = refusal(refused);
        assert!(message.contains(word), "{word}: {message}");
        assert!(!disk.is_in_use(), "after {word}");
    }
    assert!(Path::new(&disk.node).exists());
    Ok(())
}
