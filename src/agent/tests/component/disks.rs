// SPDX-License-Identifier: Apache-2.0
//! Disks of the guest: file systems on them, and device nodes.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    CreateContainerRequest, Device, FSGroup, GuestDetailsRequest, ResizeVolumeRequest, Storage,
    VolumeStatsRequest,
};
use protocols::agent::oci;
use rustix::fs::{major, minor};
use tempfile::TempDir;
use tokio::time::sleep;

use crate::rig::{Rig, ctx, mount, refusal, texts};

/// A loop device with an ext4 file system, detached with this value.
struct Disk {
    node: PathBuf,
    folder: TempDir,
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
            folder,
        })
    }

    fn name(&self) -> String {
        self.node.display().to_string()
    }

    fn grow(&self, bytes: u64) -> Result<()> {
        let image = self.folder.path().join("image");
        File::options().write(true).open(image)?.set_len(bytes)?;
        run(Command::new("losetup")
            .arg("--set-capacity")
            .arg(&self.node))
        .map(drop)
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
    assert_eq!(
        details.agent_details.device_handlers[..2],
        ["blk", "mmioblk"]
    );
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

#[tokio::test]
async fn read_only_layers_and_a_writable_one_are_one_root() -> Result<()> {
    let rig = Rig::new().await?;
    let (upper, below, above) = (Disk::new()?, Disk::new()?, Disk::new()?);
    for (disk, files) in [(&below, ["a", "b"]), (&above, ["b", "c"])] {
        let point = tempfile::tempdir()?;
        run(Command::new("mount").arg(&disk.node).arg(point.path()))?;
        for file in files {
            fs::write(point.path().join(file), disk.name())?;
        }
        run(Command::new("umount").arg(point.path()))?;
    }
    let root = "/run/kata-containers/shared/containers/passthrough/layered/rootfs";
    let layer = |disk: &Disk, options: &[&str]| Storage {
        driver: "erofs.multi-layer".to_owned(),
        source: disk.name(),
        fstype: "ext4".to_owned(),
        options: texts(options),
        mount_point: root.to_owned(),
        ..Storage::default()
    };
    let layers = vec![
        layer(
            &upper,
            &[
                "X-kata.overlay-upper",
                "X-kata.multi-layer=true",
                "X-kata.mkdir.path={{ mount 0 }}/upper/made",
            ],
        ),
        layer(&above, &["X-kata.overlay-lower", "ro"]),
        layer(&below, &["X-kata.overlay-lower", "ro"]),
    ];
    let script = "cat /data/a /data/b; ls /data; echo new > /data/a; cat /data/a";
    let mut spec = rig.spec("layered", &["sh", "-c", script])?;
    spec.Mounts.push(mount("/data", "bind", root, &["rbind"]));
    let mut wanted = request("layered", spec.clone());
    wanted.storages = layers.clone();
    rig.agent.create_container(ctx(), &wanted).await?;
    rig.start("layered").await?;
    let outcome = rig.outcome("layered", "").await?;
    let expected = format!(
        "{}{}a\nb\nc\nlost+found\nmade\nnew\n",
        below.name(),
        above.name()
    );
    assert_eq!(outcome.stdout, expected, "{outcome:?}");
    // Another container has the same layers below one of its own, and keeps them.
    let own = Disk::new()?;
    let mut second = request("second", rig.spec("second", &["true"])?);
    second.storages = layers.clone();
    second.storages[0].source = own.name();
    for layer in &mut second.storages {
        layer.mount_point = root.replace("layered", "second");
    }
    rig.agent.create_container(ctx(), &second).await?;
    let begin = Instant::now();
    rig.remove("layered").await?;
    assert!(!upper.is_in_use() && own.is_in_use() && above.is_in_use() && below.is_in_use());
    // Nobody waited for what does not end.
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    rig.remove("second").await?;
    for disk in [&upper, &own, &below, &above] {
        assert!(!disk.is_in_use(), "{}", disk.name());
    }
    // One that can't be mounted takes the others with it.
    let mut wanted = request("broken", spec);
    wanted.storages = layers;
    wanted.storages[2].fstype = "xfs".to_owned();
    let (_, message) = refusal(rig.agent.create_container(ctx(), &wanted).await);
    assert!(message.contains(&below.name()), "{message}");
    assert!(!upper.is_in_use() && !above.is_in_use());
    Ok(())
}

#[tokio::test]
async fn a_blank_disk_is_formatted_where_that_is_asked_for_and_no_other() -> Result<()> {
    let rig = Rig::new().await?;
    let disk = Disk::new()?;
    let blank = vec![0; 1 << 20];
    fs::write(&disk.node, &blank)?;
    let mut storage = storage(&disk.name(), &[]);
    storage.driver_options = texts(&["create_filesystem"]);
    for (id, script) in [("one", "echo kept > /data/file"), ("two", "cat /data/file")] {
        let mut spec = rig.spec(id, &["sh", "-c", script])?;
        spec.Mounts
            .push(mount("/data", "bind", &storage.mount_point, &["rbind"]));
        let mut wanted = request(id, spec);
        wanted.storages = vec![storage.clone()];
        rig.agent.create_container(ctx(), &wanted).await?;
        rig.start(id).await?;
        let outcome = rig.outcome(id, "").await?;
        assert_eq!(outcome.status, 0, "{outcome:?}");
        assert_eq!(outcome.stdout == "kept\n", id == "two", "{outcome:?}");
        rig.remove(id).await?;
    }
    fs::write(&disk.node, &blank)?;
    storage.fstype = "minix".to_owned();
    let mut wanted = request("three", rig.spec("three", &["true"])?);
    wanted.storages = vec![storage];
    let (code, message) = refusal(rig.agent.create_container(ctx(), &wanted).await);
    assert_eq!((code, message.contains("minix")), (12, true), "{message}");
    Ok(())
}

#[tokio::test]
async fn devices_of_other_kinds_are_refused_with_the_reason() -> Result<()> {
    let rig = Rig::new().await?;
    for (type_, code, word) in [
        ("vfio-pci", 12, "VFIO"),
        ("blk-ccw", 12, "this machine"),
        ("vfio-ap", 12, "this machine"),
        ("floppy", 12, "floppy"),
        ("vfio-pci-gk", 3, "PCI path"),
        ("mmioblk", 3, "/dev"),
    ] {
        let mut wanted = request("a", rig.spec("a", &["true"])?);
        wanted.devices = vec![Device {
            id: "x".to_owned(),
            type_: type_.to_owned(),
            container_path: "/dev/x".to_owned(),
            ..Device::default()
        }];
        let (is, message) = refusal(rig.agent.create_container(ctx(), &wanted).await);
        assert!(message.contains(word), "{type_}: {message}");
        assert_eq!(is, code, "{message}");
    }
    Ok(())
}

#[tokio::test]
async fn a_file_system_takes_what_its_disk_has_got() -> Result<()> {
    let rig = Rig::new().await?;
    let disk = Disk::new()?;
    let storage = storage(&disk.name(), &[]);
    let mut wanted = request("one", rig.spec("one", &["true"])?);
    wanted.storages = vec![storage.clone()];
    rig.agent.create_container(ctx(), &wanted).await?;
    let resize = |size| ResizeVolumeRequest {
        volume_guest_path: storage.mount_point.clone(),
        size,
        ..ResizeVolumeRequest::default()
    };
    let larger = 48 << 20;
    let (code, message) = refusal(rig.agent.resize_volume(ctx(), &resize(larger)).await);
    assert_eq!(code, 9, "{message}");
    assert!(message.contains("its disk has 16777216 bytes"), "{message}");
    // It grows while the agent waits for that.
    let grow = async {
        sleep(Duration::from_millis(100)).await;
        disk.grow(larger)
    };
    let request = resize(larger);
    let (resized, grown) = tokio::join!(rig.agent.resize_volume(ctx(), &request), grow);
    grown?;
    resized?;
    let request = VolumeStatsRequest {
        volume_guest_path: storage.mount_point.clone(),
        ..VolumeStatsRequest::default()
    };
    let stats = rig.agent.get_volume_stats(ctx(), &request).await?;
    assert!(stats.usage[0].total > 32 << 20, "{stats:?}");
    let (_, message) = refusal(rig.agent.resize_volume(ctx(), &resize(16 << 20)).await);
    assert!(message.contains("can't have 16777216"), "{message}");
    rig.remove("one").await?;
    assert!(!disk.is_in_use());
    Ok(())
}
