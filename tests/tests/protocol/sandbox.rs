// SPDX-License-Identifier: Apache-2.0
//! The sandbox as a whole, from its creation to the end of its guest.

use anyhow::{Result, ensure};
use protocols::agent::agent::{
    CreateSandboxRequest, DestroySandboxRequest, GetOOMEventRequest, KernelModule,
    RemoveStaleVirtiofsShareMountsRequest, Storage,
};
use protocols::agent::health::CheckRequest;

use crate::client::{EXISTS, UNIMPLEMENTED, call, refused};
use crate::host::{GUEST, Host, SHARED};
use crate::spec::texts;

/// What the pod's containers share as `/dev/shm`.
pub(crate) const SHM: &str = "/run/kata-containers/sandbox/shm";

pub(crate) async fn health(host: &Host) -> Result<()> {
    let health = &host.client.health;
    let answer = call!(health, check, CheckRequest {})?;
    ensure!(answer.status.value() == 1, "{answer:?}");
    let version = call!(health, version, CheckRequest {})?;
    ensure!(
        version.grpc_version == "0.0.1" && !version.agent_version.is_empty(),
        "{version:?}"
    );
    Ok(())
}

/// What can't be is refused, and leaves a guest that can still be one.
pub(crate) async fn create(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    let hooks = call!(
        agent,
        create_sandbox,
        CreateSandboxRequest {
            guest_hook_path: "/hooks",
        }
    );
    refused(UNIMPLEMENTED, "guest_hook_path", hooks)?;
    let module = KernelModule {
        name: "floppy".to_owned(),
        ..KernelModule::default()
    };
    let modules = call!(
        agent,
        create_sandbox,
        CreateSandboxRequest {
            kernel_modules: vec![module],
        }
    );
    refused(UNIMPLEMENTED, "floppy", modules)?;

    let shared = Storage {
        driver: "virtio-fs".to_owned(),
        source: "kataShared".to_owned(),
        fstype: "virtiofs".to_owned(),
        options: texts(&["nodev"]),
        mount_point: SHARED.to_owned(),
        ..Storage::default()
    };
    call!(
        agent,
        create_sandbox,
        CreateSandboxRequest {
            hostname: "pod",
            dns: texts(&["nameserver 10.9.0.1", "search example.org"]),
            storages: vec![shared, shm("size=1m")],
            sandbox_id: "sandbox",
        }
    )?;
    let again = call!(
        agent,
        create_sandbox,
        CreateSandboxRequest { hostname: "other" }
    );
    refused(EXISTS, "exists", again)?;

    host.start_probe().await?;
    let resolver = host
        .look(&format!(
            "cat {GUEST}/run/kata-containers/sandbox/resolv.conf"
        ))
        .await?;
    ensure!(
        resolver == "nameserver 10.9.0.1\nsearch example.org",
        "{resolver:?}"
    );
    let mounts = host.look(&format!("cat {GUEST}/proc/1/mounts")).await?;
    for mount in [
        format!("kataShared {SHARED} virtiofs rw,"),
        format!(" {SHM} tmpfs rw,"),
    ] {
        ensure!(mounts.contains(&mount), "{mount:?} is not in {mounts}");
    }
    let init = host.look(&format!("cat {GUEST}/proc/1/cmdline")).await?;
    ensure!(init.starts_with("/sbin/init"), "{init:?}");
    Ok(())
}

/// The pod's shared memory, with options of its own.
pub(crate) fn shm(size: &str) -> Storage {
    Storage {
        driver: "ephemeral".to_owned(),
        fstype: "tmpfs".to_owned(),
        source: "shm".to_owned(),
        options: texts(&[size, "mode=1777"]),
        mount_point: SHM.to_owned(),
        ..Storage::default()
    }
}

/// Nobody who waits holds the end up.
pub(crate) async fn destroy(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    call!(
        agent,
        remove_stale_virtiofs_share_mounts,
        RemoveStaleVirtiofsShareMountsRequest {}
    )?;
    let mounts = host.look(&format!("cat {GUEST}/proc/1/mounts")).await?;
    ensure!(mounts.contains(SHARED), "a live share is gone: {mounts}");
    let waiting = agent.clone();
    let asked =
        tokio::spawn(async move { call!(waiting, get_oom_event, GetOOMEventRequest {}).map(drop) });
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    ensure!(!asked.is_finished(), "an event of nothing");
    call!(agent, destroy_sandbox, DestroySandboxRequest {})?;
    host.powers_off()?;
    let answer = asked.await?;
    ensure!(answer.is_err(), "an event of a guest that is gone");
    Ok(())
}
