// SPDX-License-Identifier: Apache-2.0
//! Containers: two of them, one in each layout of the shared folder.

use std::fs;

use anyhow::{Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    CreateContainerRequest, ExecProcessRequest, GetDiagnosticDataRequest, PauseContainerRequest,
    RemoveContainerRequest, ResumeContainerRequest, SignalProcessRequest, StartContainerRequest,
    StatsContainerRequest, UpdateContainerRequest, WaitProcessRequest,
};
use protocols::agent::oci;

use crate::client::{EXISTS, INVALID, NOT_FOUND, WRONG_STATE, call, eventually, refused};
use crate::host::{GUEST, Host, SHARED};
use crate::spec;

pub(crate) const FIRST: &str = "first";
const SECOND: &str = "second";
const NONE: &str = "third";

/// Each container, its folder in the shared one, and the name of its first process when it is created:
/// none, as Kata's runtime in Rust has it, or the container's, as that in Go.
const CONTAINERS: [(&str, &str, &str); 2] = [
    (FIRST, "passthrough/first/rootfs", ""),
    (SECOND, "second/rootfs", SECOND),
];

const LIMIT: i64 = 64 << 20;

pub(crate) async fn create(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    fs::write(host.shared("last-words"), "x".repeat(5000) + "why")?;
    for (id, place, exec_id) in CONTAINERS {
        let script = "echo up > /tmp/up; trap 'exit 7' TERM; while :; do sleep 0.1; done";
        let mut spec = spec::of(&host.rootfs(place)?, &["sh", "-c", script]);
        spec.Mounts.push(spec::mount(
            "/dev/termination-log",
            "bind",
            &format!("{SHARED}/last-words"),
            &["rbind"],
        ));
        call!(
            agent,
            create_container,
            CreateContainerRequest {
                container_id: id,
                exec_id: exec_id,
                OCI: MessageField::some(spec),
            }
        )?;
        ensure!(!host.shared(place).join("tmp/up").exists(), "{id} runs");
    }
    let root = format!("{SHARED}/passthrough/first/rootfs");
    let twice = host.create(FIRST, spec::of(&root, &["true"])).await;
    refused(EXISTS, "\"first\" exists", twice)?;
    refused(WRONG_STATE, "not started", exec(host).await)?;
    for (id, place, _) in CONTAINERS {
        host.start(id).await?;
        // Through the guest's root and the host's: one file.
        let up = host.shared(place).join("tmp/up");
        eventually("the container to run", async || Ok(up.exists())).await?;
    }
    refused(WRONG_STATE, "started already", host.start(FIRST).await)?;
    let none = call!(
        agent,
        start_container,
        StartContainerRequest { container_id: NONE }
    );
    refused(NOT_FOUND, "\"third\" does not exist", none)
}

async fn exec(host: &Host) -> ttrpc::Result<()> {
    call!(
        host.client.agent,
        exec_process,
        ExecProcessRequest {
            container_id: FIRST,
            exec_id: "early",
            process: MessageField::some(spec::process(&["true"])),
        }
    )
    .map(drop)
}

/// Of the first container's cgroup, in the guest.
async fn cgroup(host: &Host, file: &str) -> Result<String> {
    host.look(&format!("cat {GUEST}/sys/fs/cgroup/{FIRST}/{file}"))
        .await
}

pub(crate) async fn resources(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    let stats = call!(
        agent,
        stats_container,
        StatsContainerRequest {
            container_id: FIRST
        }
    )?;
    ensure!(
        stats.cgroup_stats.memory_stats.usage.usage > 0
            && stats.cgroup_stats.cpu_stats.cpu_usage.total_usage > 0
            && stats.cgroup_stats.pids_stats.current > 0,
        "{stats:?}"
    );
    let none = call!(
        agent,
        stats_container,
        StatsContainerRequest { container_id: NONE }
    );
    refused(NOT_FOUND, NONE, none)?;
    let resources = oci::LinuxResources {
        Memory: MessageField::some(oci::LinuxMemory {
            Limit: LIMIT,
            ..oci::LinuxMemory::default()
        }),
        ..oci::LinuxResources::default()
    };
    call!(
        agent,
        update_container,
        UpdateContainerRequest {
            container_id: FIRST,
            resources: MessageField::some(resources),
        }
    )?;
    ensure!(cgroup(host, "memory.max").await? == LIMIT.to_string());
    let none = call!(
        agent,
        update_container,
        UpdateContainerRequest { container_id: NONE }
    );
    refused(NOT_FOUND, NONE, none)
}

pub(crate) async fn pause(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    call!(
        agent,
        pause_container,
        PauseContainerRequest {
            container_id: FIRST
        }
    )?;
    ensure!(cgroup(host, "cgroup.events").await?.contains("frozen 1"));
    refused(WRONG_STATE, "paused", exec(host).await)?;
    call!(
        agent,
        resume_container,
        ResumeContainerRequest {
            container_id: FIRST
        }
    )?;
    ensure!(cgroup(host, "cgroup.events").await?.contains("frozen 0"));
    let none = call!(
        agent,
        pause_container,
        PauseContainerRequest { container_id: NONE }
    );
    refused(NOT_FOUND, NONE, none)?;
    let none = call!(
        agent,
        resume_container,
        ResumeContainerRequest { container_id: NONE }
    );
    refused(NOT_FOUND, NONE, none)
}

/// The end of what a container wrote for its termination message.
pub(crate) async fn last_words(host: &Host) -> Result<()> {
    let ask = async |log_type: &str, id: &str| {
        call!(
            host.client.agent,
            get_diagnostic_data,
            GetDiagnosticDataRequest {
                log_type: log_type,
                container_id: id,
            }
        )
    };
    let words = ask("termination_log", FIRST).await?.data;
    ensure!(
        words.len() == 4096 && words.ends_with("xwhy"),
        "{} bytes",
        words.len()
    );
    refused(INVALID, "core", ask("core", FIRST).await)?;
    refused(NOT_FOUND, NONE, ask("termination_log", NONE).await)
}

/// The first process goes by each of its names, and nothing of its container stays in the guest.
pub(crate) async fn end_by_either_name(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    for (id, place, exec_id) in CONTAINERS {
        let signal = async |signal: u32| {
            call!(
                agent,
                signal_process,
                SignalProcessRequest {
                    container_id: id,
                    exec_id: exec_id,
                    signal: signal,
                }
            )
        };
        refused(INVALID, "1000", signal(1000).await)?;
        signal(15).await?;
        let end = call!(
            agent,
            wait_process,
            WaitProcessRequest {
                container_id: id,
                exec_id: exec_id,
            }
        )?;
        ensure!(end.status == 7, "{id}: {end:?}");
        let remove = async || {
            call!(
                agent,
                remove_container,
                RemoveContainerRequest {
                    container_id: id,
                    timeout: 9_u32,
                }
            )
        };
        remove().await?;
        refused(NOT_FOUND, id, remove().await)?;
        let folder = format!("{GUEST}/sys/fs/cgroup/{id}");
        let left = host
            .look(&format!("[ ! -e {folder} ] || find {folder}"))
            .await?;
        ensure!(left.is_empty(), "{left}");
        // Its files are its owner's.
        ensure!(host.shared(place).join("tmp/up").exists(), "{id}");
    }
    let mounts = host.look(&format!("cat {GUEST}/proc/1/mounts")).await?;
    for (_, place, _) in CONTAINERS {
        ensure!(!mounts.contains(place), "{place}: {mounts}");
    }
    Ok(())
}
