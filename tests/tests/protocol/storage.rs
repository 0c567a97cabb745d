// SPDX-License-Identifier: Apache-2.0
//! What a sandbox stores on: its shared memory, and a disk that is plugged in.

use std::fs::{self, File};

use anyhow::{Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    CreateContainerRequest, RemoveContainerRequest, ResizeVolumeRequest, Storage,
    UpdateEphemeralMountsRequest, VolumeStatsRequest,
};
use tests::disk::Image;
use tests::machine::Disk;
use tests::volume::Mounted;
use vmm::control::Request;

use crate::client::{INTERNAL, NOT_FOUND, UNIMPLEMENTED, WRONG_STATE, call, eventually, refused};
use crate::host::{GUEST, Host};
use crate::sandbox::{SHM, shm};
use crate::spec::{self, texts};

const MIB: u64 = 1 << 20;
const ID: &str = "stored";
const POINT: &str = "/run/kata-containers/sandbox/storage/disk";
const SIZES: [u64; 2] = [16 * MIB, 48 * MIB];

/// Bytes and files that a volume has room for, as (unit, total).
async fn stats(host: &Host, path: &str) -> ttrpc::Result<Vec<(i32, u64)>> {
    let answer = call!(
        host.client.agent,
        get_volume_stats,
        VolumeStatsRequest {
            volume_guest_path: path,
        }
    )?;
    let usage = answer.usage.iter();
    Ok(usage.map(|one| (one.unit.value(), one.total)).collect())
}

async fn resize(host: &Host, path: &str, size: u64) -> ttrpc::Result<()> {
    call!(
        host.client.agent,
        resize_volume,
        ResizeVolumeRequest {
            volume_guest_path: path,
            size: size,
        }
    )
    .map(drop)
}

pub(crate) async fn tmpfs_grows(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    let update = async |storage: Storage| {
        call!(
            agent,
            update_ephemeral_mounts,
            UpdateEphemeralMountsRequest {
                storages: vec![storage],
            }
        )
    };
    let has = async || -> Result<Vec<(i32, u64)>> { Ok(stats(host, SHM).await?) };
    ensure!(
        has().await?.first() == Some(&(1, MIB)),
        "{:?}",
        has().await?
    );
    update(shm("size=2m")).await?;
    let now = has().await?;
    ensure!(
        now.first() == Some(&(1, 2 * MIB)) && now.get(1).is_some_and(|one| one.0 == 2),
        "{now:?}"
    );
    let seen = host
        .look(&format!("stat -f -c '%b %S' {GUEST}{SHM}"))
        .await?;
    ensure!(seen == "512 4096", "{seen}");
    let elsewhere = Storage {
        mount_point: "/nowhere".to_owned(),
        ..shm("size=2m")
    };
    refused(INTERNAL, "/nowhere", update(elsewhere).await)?;
    // What has no disk is as large as its options say.
    refused(UNIMPLEMENTED, "not resized", resize(host, SHM, MIB).await)?;
    refused(NOT_FOUND, "/nowhere", stats(host, "/nowhere").await)
}

/// By its PCI path; the file system takes what its disk has got.
pub(crate) async fn disk_grows(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    let [size, larger] = SIZES;
    let image = Image::ext4(size, None)?;
    let file = || File::options().read(true).write(true).open(image.path());
    let slot = host.machine.borrow().attach_disk(
        ID,
        Disk {
            file: file()?.into(),
            queues: 1,
            io_uring: false,
        },
    )?;
    let storage = Storage {
        driver: "blk".to_owned(),
        source: format!("{slot:02x}"),
        fstype: "ext4".to_owned(),
        options: texts(&["nodev"]),
        mount_point: POINT.to_owned(),
        ..Storage::default()
    };
    let script = "echo kept > /data/file; exec sleep 100000";
    let root = host.rootfs("passthrough/stored/rootfs")?;
    let mut spec = spec::of(&root, &["sh", "-c", script]);
    spec.Mounts
        .push(spec::mount("/data", "bind", POINT, &["rbind"]));
    call!(
        agent,
        create_container,
        CreateContainerRequest {
            container_id: ID,
            storages: vec![storage],
            OCI: MessageField::some(spec),
        }
    )?;
    host.start(ID).await?;
    eventually("the container to write", async || {
        let written = host
            .look(&format!("cat {GUEST}{POINT}/file 2>/dev/null || true"))
            .await?;
        Ok(written == "kept")
    })
    .await?;
    refused(
        WRONG_STATE,
        &format!("its disk has {size} bytes"),
        resize(host, POINT, larger).await,
    )?;
    file()?.set_len(larger)?;
    host.machine
        .borrow()
        .ask(&Request::GrowBlock { id: ID.to_owned() }, &[])?;
    resize(host, POINT, larger).await?;
    let now = stats(host, POINT).await?;
    ensure!(now.first().is_some_and(|one| one.1 > size), "{now:?}");
    call!(
        agent,
        remove_container,
        RemoveContainerRequest { container_id: ID }
    )?;
    host.machine.borrow().detach_disk(ID)?;
    image.check()?;
    let place = tempfile::tempdir()?;
    let mounted = Mounted::image(&image.path(), place.path())?;
    let kept = fs::read_to_string(place.path().join("file"))?;
    ensure!(kept == "kept\n", "{kept:?}");
    drop(mounted);
    Ok(())
}
