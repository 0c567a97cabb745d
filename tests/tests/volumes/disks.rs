// SPDX-License-Identifier: Apache-2.0
//! Block devices of the host in containers, and file systems on them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{OFlags, major, minor};
use serde_json::json;
use tests::bundle::Bundle;
use tests::configured::Configured;
use tests::cri::LIMIT;
use tests::cri::messages::{CreateTaskRequest, Empty, TaskMount, TaskRequest};
use tests::disk::{Assigned, Image, Loop, with_device};
use tests::pod::{Pod, Spec};
use tests::procs::{self, OpenFile};
use tests::scenario::{Outcome, pod_vm_scenario};
use tests::volume::{Access, Volumes, privileged, with_mount};
use tests::wait::until;

use crate::{MIB, WAITS, started};

/// How many disks of the machine are on this node or file.
fn open_disks(id: &str, path: &Path) -> Result<usize> {
    let files = procs::vmm(id)?.files()?;
    let path = path.display().to_string();
    Ok(files.iter().filter(|file| file.target == path).count())
}

#[test]
fn a_block_volume_is_the_same_for_two_containers_and_the_host() -> Outcome {
    pod_vm_scenario(
        "a_block_volume_is_the_same_for_two_containers_and_the_host",
        |node| {
            let image = Image::new(16 * MIB)?;
            let device = Loop::new(&image)?;
            let pod = Pod::run(node, "block-volume")?;
            let config = |name: &str, path: &str| {
                with_device(pod.container(name, WAITS), device.path(), path, "rwm")
            };
            let bystander = started(&pod, &pod.container("bystander", WAITS))?;
            let first = started(&pod, &config("first", "/dev/xvda"))?;
            let second = started(&pod, &config("second", "/dev/disks/mine"))?;
            ensure!(open_disks(&pod.id, device.path())? == 1, "it is two disks");
            first.shell(
                "test -b /dev/xvda; echo from-first | dd of=/dev/xvda conv=fsync 2>/dev/null",
            )?;
            ensure!(second.shell("head -c 10 /dev/disks/mine")? == "from-first");
            ensure!(device.start(10)? == "from-first", "{}", device.start(10)?);
            ensure!(
                first.shell("dd if=/dev/xvda bs=1M 2>/dev/null | wc -c")? == (16 * MIB).to_string()
            );
            // Its number is no secret, and does not help who was not given it.
            let number = first.shell("stat -c '0x%t 0x%T' /dev/xvda")?;
            let attempt = format!("mknod /tmp/disk b {number} && head -c 10 /tmp/disk");
            let answer = bystander.exec(&["sh", "-c", &attempt])?;
            ensure!(answer.exit_code != 0, "somebody else read it");

            first.stop(30)?;
            first.remove()?;
            ensure!(second.shell("head -c 10 /dev/disks/mine")? == "from-first");
            second.stop(30)?;
            second.remove()?;
            ensure!(
                open_disks(&pod.id, device.path())? == 0,
                "it is still there"
            );
            for round in ["again", "and again"] {
                let third = started(&pod, &config(round, "/dev/xvda"))?;
                ensure!(third.shell("head -c 10 /dev/xvda")? == "from-first");
                third.stop(30)?;
                third.remove()?;
            }
            pod.remove()
        },
    )
}

#[test]
fn a_read_only_block_volume_is_kept_from_root_with_every_capability() -> Outcome {
    let name = "a_read_only_block_volume_is_kept_from_root_with_every_capability";
    pod_vm_scenario(name, |node| {
        let image = Image::new(MIB)?;
        fs::write(image.path(), [b'k'; 1 << 20])?;
        let device = Loop::new(&image)?;
        let pod = Spec::new("block-read-only").privileged().run(node)?;
        let config = |name: &str, permissions: &str| {
            let config = pod.container(name, WAITS);
            privileged(with_device(config, device.path(), "/dev/xvda", permissions))
        };
        let reader = started(&pod, &config("reader", "r"))?;
        // Another one of the pod may write; that is no way in for the first.
        let writer = started(&pod, &config("writer", "rw"))?;
        ensure!(reader.shell("head -c 4 /dev/xvda")? == "kkkk");
        for before in [":", "blockdev --setrw /dev/xvda", "chmod 777 /dev/xvda"] {
            let attempt = format!("{before}; echo x | dd of=/dev/xvda conv=fsync");
            let answer = reader.exec(&["sh", "-c", &attempt])?;
            ensure!(answer.exit_code != 0, "after `{before}` it wrote");
        }
        ensure!(device.start(4)? == "kkkk");
        writer.shell("echo -n w | dd of=/dev/xvda conv=fsync 2>/dev/null")?;
        ensure!(device.start(4)? == "wkkk");
        pod.remove()
    })
}

#[test]
fn a_direct_assigned_volume_is_mounted_in_the_guest() -> Outcome {
    pod_vm_scenario("a_direct_assigned_volume_is_mounted_in_the_guest", |node| {
        let image = Image::ext4(32 * MIB, None)?;
        let device = Loop::new(&image)?;
        let volumes = Volumes::new()?;
        let volume = volumes.volume("csi", "direct")?;
        let assigned = Assigned::add(
            &volume,
            &json!({
                "volume-type": "block",
                "device": device.path(),
                "fstype": "ext4",
                "metadata": { "fsGroup": "3000" },
                "options": ["noatime"],
            }),
        )?;
        let pod = Pod::run(node, "direct")?;
        let config =
            |name: &str, access| with_mount(pod.container(name, WAITS), &volume, "/data", access);
        let first = started(&pod, &config("first", Access::Write))?;
        let second = started(&pod, &config("second", Access::Read))?;
        ensure!(open_disks(&pod.id, device.path())? == 1, "it is two disks");
        let mounted = first.shell("grep ' /data ext4 ' /proc/mounts")?;
        ensure!(mounted.contains("rw,noatime"), "{mounted}");
        ensure!(first.shell("stat -c '%g %a' /data")? == "3000 2775");
        first.shell("echo kept > /data/file; sync /data/file")?;
        ensure!(second.shell("cat /data/file")? == "kept");
        let answer = second.exec(&["sh", "-c", "echo x > /data/file"])?;
        ensure!(
            answer.exit_code != 0,
            "it was written where it is read-only"
        );
        // A second kernel would destroy it.
        let other = Pod::run(node, "direct-other")?;
        let late = with_mount(
            other.container("late", WAITS),
            &volume,
            "/data",
            Access::Write,
        );
        let refused = other.create(&late)?.start();
        let text = format!("{:#}", refused.err().context("it was mounted twice")?);
        ensure!(
            text.contains(&device.name()) && text.contains("busy"),
            "{text}"
        );
        other.remove()?;

        for container in [&first, &second] {
            container.stop(30)?;
            container.remove()?;
        }
        ensure!(
            open_disks(&pod.id, device.path())? == 0,
            "it is still there"
        );
        image.check()?;
        // Its users are gone, and with them its mount in the guest: one that comes back gets another.
        let again = started(&pod, &config("again", Access::Write))?;
        ensure!(again.shell("cat /data/file; echo more >> /data/file; sync /data/file")? == "kept");
        again.stop(30)?;
        again.remove()?;
        // Its path is only a folder now.
        drop(assigned);
        let third = started(&pod, &config("third", Access::Write))?;
        ensure!(third.shell("ls /data")? == "");
        pod.remove()
    })
}

#[test]
fn what_was_synced_survives_the_end_of_the_machine() -> Outcome {
    pod_vm_scenario("what_was_synced_survives_the_end_of_the_machine", |node| {
        let ctr = node.ctr();
        let image = Image::ext4(32 * MIB, None)?;
        let volume = Path::new("/run/nutshell-tests-volume");
        let _assigned = Assigned::add(
            volume,
            &json!({ "volume-type": "directvol", "device": image.path(), "fstype": "ext4" }),
        )?;
        let mount = format!(
            "type=bind,src={},dst=/data,options=rbind:rw",
            volume.display()
        );
        let id = "disk-kill";
        ctr.run_detached(&["--mount", &mount], id, &["sleep", "1000"])?;
        let script = "dd if=/dev/urandom of=/data/file bs=64k count=32 conv=fsync 2>/dev/null
            md5sum < /data/file; (while :; do echo more >> /data/more; done) & sleep 1";
        let output = ctr.exec(&[], id, "writer", &["sh", "-c", script])?;
        let sum = output.quietly()?.text();
        procs::vmm(id)?.kill()?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id)?;
        let output = ctr.run_script(&["--mount", &mount], id, "md5sum < /data/file")?;
        ensure!(output.text() == sum, "{output}\nexpected {sum}");
        output.quietly()?;
        image.check()
    })
}

#[test]
fn a_root_file_system_is_on_a_disk_where_its_snapshotter_has_it_there() -> Outcome {
    let name = "a_root_file_system_is_on_a_disk_where_its_snapshotter_has_it_there";
    pod_vm_scenario(name, |node| {
        let ctr = node.ctr();
        let bundle = Bundle::new(ctr, "echo here > /root/file; exec sleep 1000")?;
        let image = Image::ext4(64 * MIB, Some(&bundle.root()))?;
        // Nothing of it is left elsewhere.
        fs::remove_dir_all(bundle.root())?;
        let config = bundle.write()?.display().to_string();
        let id = "disk-rootfs";
        let create = [
            "container",
            "create",
            "--runtime",
            ctr.runtime(),
            "--config",
            &config,
            id,
        ];
        ctr.call(&create)?.quietly()?;
        // As containerd's blockfile snapshotter mounts it.
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: vec![TaskMount {
                type_: "ext4".to_owned(),
                source: image.path().display().to_string(),
                options: ["loop", "rw"].map(str::to_owned).to_vec(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let _: Empty = node.cri().task("Create", &request)?;
        let request = TaskRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let _: Empty = node.cri().task("Start", &request)?;
        ensure!(open_disks(id, &image.path())? == 1, "it is no disk");
        let shell = |script: &str| -> Result<String> {
            Ok(ctr
                .exec(&[], id, "looks", &["sh", "-c", script])?
                .quietly()?
                .text())
        };
        until("what the container wrote", LIMIT, || {
            Ok((shell("cat /root/file || :").ok().as_deref() == Some("here")).then_some(()))
        })?;
        let mounted = shell("grep ' / ' /proc/mounts")?;
        ensure!(mounted.contains(" / ext4 rw"), "{mounted}");
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id)?;
        image.check()
    })
}

#[test]
fn disks_are_what_the_configuration_says() -> Outcome {
    pod_vm_scenario("disks_are_what_the_configuration_says", |node| {
        let image = Image::new(4 * MIB)?;
        let device = Loop::new(&image)?;
        // A MiB in a second.
        let host = Configured::with(
            node.ctr(),
            "[hypervisor.dragonball]\nnum_queues = 2\nblock_device_cache_direct = true\n\
             disk_rate_limiter_bw_max_rate = 8388608\n",
        )?;
        let ctr = host.ctr();
        let id = "disk-config";
        let name = device.name();
        let flags = ["--cpus", "2", "--device", &name];
        ctr.run_detached(&flags, id, &["sleep", "1000"])?;
        let script = format!(
            "echo direct | dd of={name} conv=fsync 2>/dev/null; ls /sys/block/vdb/mq | wc -l"
        );
        let output = ctr
            .exec(&[], id, "looks", &["sh", "-c", &script])?
            .quietly()?;
        ensure!(output.text() == "2", "{output}");
        let files = procs::vmm(id)?.files()?;
        let disk = files
            .iter()
            .find(|file| file.target == name)
            .context("no disk")?;
        ensure!(disk.flags & OFlags::DIRECT.bits() != 0, "{disk:?}");
        // Of the queue that was used.
        let ring = |file: &OpenFile| file.target.ends_with("[io_uring]");
        ensure!(files.iter().any(ring), "no ring: {files:?}");
        ensure!(device.start(6)? == "direct");
        let script = format!("dd if=/dev/zero of={name} bs=64k count=64 conv=fsync 2>/dev/null");
        let output = ctr.exec(&[], id, "writes", &["sh", "-c", &script])?;
        let output = output.quietly()?;
        ensure!(
            output.elapsed >= Duration::from_secs(3),
            "{output}\ntoo fast"
        );
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id)?;
        Ok(())
    })
}

#[test]
fn a_disk_that_is_wrong_is_one_clear_error() -> Outcome {
    pod_vm_scenario("a_disk_that_is_wrong_is_one_clear_error", |node| {
        let ctr = node.ctr();
        let of_number = |major: u32, minor: u32| -> Result<Bundle> {
            Ok(
                Bundle::new(ctr, "true")?.with(json!({ "linux": { "devices": [
                    { "path": "/dev/xvda", "type": "b", "major": major, "minor": minor }
                ]}})),
            )
        };
        // A node whose device is gone, and one that never was.
        let image = Image::new(MIB)?;
        let device = Loop::new(&image)?;
        let number = fs::metadata(device.path())?.rdev();
        drop(device);
        let bundle = of_number(major(number), minor(number))?;
        let output = ctr.run_config(&bundle.write()?, "disk-gone")?;
        output.one_line(&["/dev/xvda", "is empty"])?;
        let bundle = of_number(7, 1 << 19)?;
        let output = ctr.run_config(&bundle.write()?, "disk-never")?;
        output.one_line(&["/dev/xvda", "7:524288", "no such device"])?;

        // A file system that is larger than its disk, none at all, and of an unknown kind.
        let volume = Path::new("/run/nutshell-tests-volume");
        let mount = format!(
            "type=bind,src={},dst=/data,options=rbind:rw",
            volume.display()
        );
        let cut = Image::ext4(32 * MIB, None)?;
        File::options()
            .write(true)
            .open(cut.path())?
            .set_len(16 * MIB)?;
        for (image, kind) in [(&cut, "ext4"), (&image, "ext4"), (&image, "btrfs")] {
            let info = json!({ "volume-type": "block", "device": image.path(), "fstype": kind });
            let _assigned = Assigned::add(volume, &info)?;
            let output = ctr.run_script(&["--mount", &mount], "disk-bad", "true")?;
            output.one_line(&["blk", kind])?;
        }
        Ok(())
    })
}
