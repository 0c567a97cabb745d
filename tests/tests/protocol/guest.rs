// SPDX-License-Identifier: Apache-2.0
//! Calls about the guest's machine.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use protocols::agent::agent::{
    AddSwapPathRequest, AddSwapRequest, GetMetricsRequest, GuestDetailsRequest,
    MemAgentCompactConfig, MemAgentMemcgConfig, MemHotplugByProbeRequest, OnlineCPUMemRequest,
    ReseedRandomDevRequest, SetGuestDateTimeRequest, SetPolicyRequest,
};
use tests::machine::MEMORY;
use vmm::control::{Request, Size};

use crate::client::{INVALID, UNIMPLEMENTED, call, eventually, refused};
use crate::host::{GUEST, Host, MOST_MEMORY, MOST_VCPUS};

const HOUR: i64 = 3600;

/// The handlers are those whose devices this guest's kernel knows.
pub(crate) async fn details(host: &Host) -> Result<()> {
    let answer = call!(
        host.client.agent,
        get_guest_details,
        GuestDetailsRequest {
            mem_block_size: true,
            mem_hotplug_probe: true,
        }
    )?;
    let size = host
        .look("cat /sys/devices/system/memory/block_size_bytes")
        .await?;
    ensure!(
        answer.mem_block_size_bytes == u64::from_str_radix(&size, 16)?,
        "{size}: {answer:?}"
    );
    ensure!(!answer.support_mem_hotplug_probe, "{answer:?}");
    let details = answer.agent_details.into_option().context("no details")?;
    ensure!(
        details.init_daemon && details.supports_seccomp && !details.version.is_empty(),
        "{details:?}"
    );
    let storages = &details.storage_handlers;
    for driver in [
        "virtio-fs",
        "blk",
        "mmioblk",
        "ephemeral",
        "local",
        "overlayfs",
        "watchable-bind",
        "erofs.multi-layer",
    ] {
        ensure!(
            storages.iter().any(|one| one == driver),
            "{driver}: {storages:?}"
        );
    }
    for (driver, place) in [("scsi", "/sys/bus/scsi/devices"), ("nvdimm", "/sys/bus/nd")] {
        let there = host
            .look(&format!("[ -e {place} ] && echo yes || echo no"))
            .await?;
        for handlers in [storages, &details.device_handlers] {
            ensure!(
                handlers.iter().any(|one| one == driver) == (there == "yes"),
                "{driver} ({there}): {handlers:?}"
            );
        }
    }
    Ok(())
}

/// What the machine is given is brought up.
pub(crate) async fn cpus_and_memory_come(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    ensure!(host.look("cat /sys/devices/system/cpu/online").await? == "0");
    let late = call!(
        agent,
        online_cpu_mem,
        OnlineCPUMemRequest {
            wait: false,
            nb_cpus: 1_u32,
            cpu_only: true,
        }
    );
    late.context("nothing to bring up")?;
    let count = MOST_VCPUS;
    host.machine
        .borrow()
        .ask(&Request::ResizeVcpus { count }, &[])?;
    call!(
        agent,
        online_cpu_mem,
        OnlineCPUMemRequest {
            wait: true,
            nb_cpus: 1_u32,
            cpu_only: true,
        }
    )?;
    ensure!(host.look("cat /sys/devices/system/cpu/online").await? == "0-1");

    let total = "awk '/^MemTotal/ { print $2 }' /proc/meminfo";
    let before: u64 = host.look(total).await?.parse()?;
    {
        let machine = host.machine.borrow();
        machine.ask(&Request::ResizeMemory { mib: MOST_MEMORY }, &[])?;
        machine.await_size(Size {
            vcpus: MOST_VCPUS,
            memory_mib: MOST_MEMORY,
        })?;
    }
    call!(agent, online_cpu_mem, OnlineCPUMemRequest {})?;
    let more = u64::from(MOST_MEMORY.saturating_sub(MEMORY)) << 10;
    eventually("the memory to be there", async || {
        let now: u64 = host.look(total).await?.parse()?;
        Ok(now >= before.saturating_add(more))
    })
    .await
}

/// It is set to the second, and the random numbers of a clone are another's no more.
pub(crate) async fn clock_is_set(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    let wrong = call!(
        agent,
        set_guest_date_time,
        SetGuestDateTimeRequest {
            Sec: 1_i64,
            Usec: 1_000_000_i64,
        }
    );
    refused(INVALID, "1000000", wrong)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let now = i64::try_from(now.as_secs())?;
    for later in [HOUR, 0] {
        let set = now.saturating_add(later);
        call!(
            agent,
            set_guest_date_time,
            SetGuestDateTimeRequest {
                Sec: set,
                Usec: 999_999_i64,
            }
        )?;
        let is: i64 = host.look("date +%s").await?.parse()?;
        let passed = is.saturating_sub(set);
        ensure!((0..60).contains(&passed), "{is}, set to {set}");
    }
    call!(
        agent,
        reseed_random_dev,
        ReseedRandomDevRequest { data: vec![7; 512] }
    )?;
    Ok(())
}

/// The agent's own figures are those of its process, and the guest's those of its kernel.
pub(crate) async fn metrics(host: &Host) -> Result<()> {
    let metrics = call!(host.client.agent, get_metrics, GetMetricsRequest {})?.metrics;
    let figure = |name: &str| -> Result<f64> {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        let figure = line.with_context(|| format!("no {name:?}"))?;
        Ok(figure.trim().parse()?)
    };
    let resident: f64 = host
        .look(&format!(
            "awk '/^VmRSS/ {{ print $2 }}' {GUEST}/proc/1/status"
        ))
        .await?
        .parse()?;
    let ratio = figure("kata_agent_total_rss ")? / (resident * 1024.0);
    ensure!((0.5..2.0).contains(&ratio), "{ratio} of {resident} KiB");
    let total: f64 = host
        .look("awk '/^MemTotal/ { print $2 }' /proc/meminfo")
        .await?
        .parse()?;
    let told = figure("kata_guest_meminfo{item=\"mem_total\"} ")?;
    ensure!((told / (total * 1024.0) - 1.0).abs() < 0.1, "{told}");
    Ok(())
}

/// With the reason.
pub(crate) async fn what_makes_no_sense(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    let none = UNIMPLEMENTED;
    let swap = call!(agent, add_swap, AddSwapRequest { PCIPath: vec![1] });
    refused(none, "no swap", swap)?;
    let swap = call!(
        agent,
        add_swap_path,
        AddSwapPathRequest { path: "/dev/vdb" }
    );
    refused(none, "no swap", swap)?;
    let policy = call!(agent, set_policy, SetPolicyRequest { policy: "x" });
    refused(none, "policy", policy)?;
    let memcg = call!(agent, mem_agent_memcg_set, MemAgentMemcgConfig {});
    refused(none, "mem-agent", memcg)?;
    let compact = call!(agent, mem_agent_compact_set, MemAgentCompactConfig {});
    refused(none, "mem-agent", compact)?;
    let probe = call!(agent, mem_hotplug_by_probe, MemHotplugByProbeRequest {});
    refused(none, "probing", probe)
}
