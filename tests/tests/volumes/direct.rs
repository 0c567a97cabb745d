// SPDX-License-Identifier: Apache-2.0
//! What a storage driver asks of direct-assigned volumes that are in use: what they hold, and that
//! they grow.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::cri::LIMIT;
use tests::disk::{Assigned, Image, Loop};
use tests::pod::Pod;
use tests::procs;
use tests::scenario::{Outcome, pod_vm_scenario};
use tests::volume::{Access, Volumes, with_mount};
use tests::wait::until;

use crate::{MIB, WAITS, started};

/// Total, used and available, in bytes (unit 1) or inodes (unit 2).
fn usage(stats: &Value, unit: u64) -> Result<(u64, u64, u64)> {
    let all = stats["usage"].as_array().context("no usage")?;
    let usage = all.iter().find(|usage| usage["unit"] == unit);
    let usage = usage.with_context(|| format!("no unit {unit} in {stats}"))?;
    let number = |name: &str| usage[name].as_u64().with_context(|| format!("{usage}"));
    Ok((number("total")?, number("used")?, number("available")?))
}

#[test]
fn a_direct_assigned_volume_tells_what_it_holds_and_grows_in_use() -> Outcome {
    let name = "a_direct_assigned_volume_tells_what_it_holds_and_grows_in_use";
    pod_vm_scenario(name, |node| {
        // The least that mkfs.xfs takes is 300 MiB.
        for (kind, size, larger) in [("ext4", 32, 96), ("xfs", 320, 448)] {
            let image = Image::with_filesystem(kind, size * MIB)?;
            let device = Loop::new(&image)?;
            let volumes = Volumes::new()?;
            let volume = volumes.volume("csi", kind)?;
            let info = json!({ "volume-type": "block", "device": device.path(), "fstype": kind });
            let assigned = Assigned::add(&volume, &info)?;
            let text = format!("{:#}", assigned.stats().err().context("nobody has it")?);
            ensure!(text.contains("no running sandbox"), "{text}");

            // Who does not have it is asked as well.
            let bystander = Pod::run(node, &format!("grow-bystander-{kind}"))?;
            let pod = Pod::run(node, &format!("grow-{kind}"))?;
            let config =
                |name| with_mount(pod.container(name, WAITS), &volume, "/data", Access::Write);
            let user = started(&pod, &config("user"))?;
            user.shell("echo before > /data/before; sync /data/before")?;
            let before = assigned.stats()?;
            let (total, used, available) = usage(&before, 1)?;
            ensure!(total > size / 2 * MIB && total <= size * MIB, "{before}");
            ensure!(total >= used + available, "{before}");
            user.shell("dd if=/dev/zero of=/data/fill bs=1M count=8 conv=fsync 2>/dev/null")?;
            let now = assigned.stats()?;
            ensure!(usage(&now, 1)?.1 >= used + 8 * MIB, "{before}\n{now}");
            ensure!(
                usage(&now, 2)?.1 == usage(&before, 2)?.1 + 1,
                "{before}\n{now}"
            );

            // The disk must have grown first, and nothing shrinks.
            for (wanted, words) in [
                (larger * MIB, format!("its disk has {} bytes", size * MIB)),
                (size / 2 * MIB, "can't have".to_owned()),
            ] {
                let error = assigned.resize(wanted).err().context("it was resized")?;
                let text = format!("{error:#}");
                ensure!(text.contains(&words), "{text}");
            }
            device.grow(&image, larger * MIB)?;
            assigned.resize(larger * MIB)?;
            // Once more is no error: a driver may not have heard the first answer.
            assigned.resize(larger * MIB)?;
            let now = assigned.stats()?;
            let grown = usage(&now, 1)?.0.saturating_sub(total);
            ensure!(grown > (larger - size) * MIB / 4 * 3, "{before}\n{now}");
            let script = format!(
                "dd if=/dev/urandom of=/data/more bs=1M count={} conv=fsync 2>/dev/null; \
                 md5sum < /data/more; cat /data/before",
                size + 16
            );
            let written = user.shell(&script)?;
            ensure!(written.ends_with("before"), "{written}");

            user.stop(30)?;
            user.remove()?;
            let again = started(&pod, &config("again"))?;
            let read = again.shell("md5sum < /data/more; cat /data/before")?;
            ensure!(read == written, "{read}\nis not\n{written}");
            pod.remove()?;
            bystander.remove()?;
            until("the disk to be closed", LIMIT, || {
                Ok(procs::vmm(&pod.id).is_err().then_some(()))
            })?;
            drop(device);
            image.check_with(kind)?;
        }
        Ok(())
    })
}
