// SPDX-License-Identifier: Apache-2.0
//! The agent's statistics as containerd's cgroup v2 metrics.

use std::collections::HashMap;
use std::process;

use protobuf::Message;
use protobuf::well_known_types::any::Any;

use protocols::agent::agent::{BlkioStatsEntry, CgroupStats, NetworkStats, StatsContainerResponse};
use protocols::containerd::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};

use crate::error::{Context, Result};
use crate::network::Counters;
use crate::process::Usage;
use crate::sandbox::Sandbox;

/// Name of `Metrics` on the wire.
const METRICS: &str = "io.containerd.cgroups.v2.Metrics";

/// Nanoseconds in the agent's protocol, microseconds in cgroup v2.
const NANOSECONDS: u64 = 1000;

/// Metrics as containerd passes them on.
pub(super) fn encode(metrics: &Metrics) -> Result<Any> {
    Ok(Any {
        type_url: METRICS.to_owned(),
        value: metrics
            .write_to_bytes()
            .internal(|| "encode the metrics".to_owned())?,
        ..Default::default()
    })
}

/// What a sandbox costs its host: the guest with all that runs in it, the monitor around it, and
/// this shim.
pub(super) async fn of_machine(sandbox: &Sandbox) -> Result<Metrics> {
    let (mut cpu, mut memory) = (CPUStat::default(), MemoryStat::default());
    for pid in [sandbox.pid(), process::id()] {
        let usage = Usage::of(pid).internal(|| format!("figures of process {pid}"))?;
        cpu.user_usec = cpu.user_usec.saturating_add(usage.user);
        cpu.system_usec = cpu.system_usec.saturating_add(usage.system);
        memory.usage = memory.usage.saturating_add(usage.memory);
    }
    cpu.usage_usec = cpu.user_usec.saturating_add(cpu.system_usec);
    memory.anon = memory.usage;
    Ok(Metrics {
        cpu: Some(cpu).into(),
        memory: Some(memory).into(),
        network: sandbox.counters().await?.into_iter().map(counted).collect(),
        ..Default::default()
    })
}

fn counted(counters: Counters) -> NetworkStat {
    let stats = counters.stats;
    NetworkStat {
        name: counters.interface,
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
        ..Default::default()
    }
}

pub(super) fn metrics(response: &StatsContainerResponse) -> Metrics {
    let stats = response.cgroup_stats.get_or_default();
    Metrics {
        pids: Some(PidsStat {
            current: stats.pids_stats.current,
            limit: stats.pids_stats.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(cpu(stats)).into(),
        memory: Some(memory(stats)).into(),
        io: Some(io(stats)).into(),
        hugetlb: stats
            .hugetlb_stats
            .iter()
            .map(|(size, usage)| HugeTlbStat {
                current: usage.usage,
                max: usage.max_usage,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        memory_events: Some(memory_events(stats)).into(),
        network: response.network_stats.iter().map(network).collect(),
        ..Default::default()
    }
}

fn network(stats: &NetworkStats) -> NetworkStat {
    NetworkStat {
        name: stats.name.clone(),
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
        ..Default::default()
    }
}

fn cpu(stats: &CgroupStats) -> CPUStat {
    let usage = &stats.cpu_stats.cpu_usage;
    let throttling = &stats.cpu_stats.throttling_data;
    CPUStat {
        usage_usec: usage.total_usage / NANOSECONDS,
        user_usec: usage.usage_in_usermode / NANOSECONDS,
        system_usec: usage.usage_in_kernelmode / NANOSECONDS,
        nr_periods: throttling.periods,
        nr_throttled: throttling.throttled_periods,
        throttled_usec: throttling.throttled_time / NANOSECONDS,
        ..Default::default()
    }
}

fn memory(stats: &CgroupStats) -> MemoryStat {
    let memory = &stats.memory_stats;
    // The keys of the guest's memory.stat.
    let stat = |key: &str| memory.stats.get(key).copied().unwrap_or_default();
    MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        workingset_refault: stat("workingset_refault"),
        workingset_activate: stat("workingset_activate"),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: memory.usage.usage,
        usage_limit: memory.usage.limit,
        max_usage: memory.usage.max_usage,
        swap_usage: memory.swap_usage.usage,
        swap_limit: memory.swap_usage.limit,
        swap_max_usage: memory.swap_usage.max_usage,
        ..Default::default()
    }
}

fn memory_events(stats: &CgroupStats) -> MemoryEvents {
    MemoryEvents {
        // How often the limit was hit.
        max: stats.memory_stats.usage.failcnt,
        oom_kill: stats
            .memory_stats
            .stats
            .get("oom_kill")
            .copied()
            .unwrap_or_default(),
        ..Default::default()
    }
}

/// One entry a device: bytes and operations, reads and writes.
fn io(stats: &CgroupStats) -> IOStat {
    let mut devices: HashMap<(u64, u64), IOEntry> = HashMap::new();
    let mut add = |entries: &[BlkioStatsEntry],
                   read: fn(&mut IOEntry) -> &mut u64,
                   write: fn(&mut IOEntry) -> &mut u64| {
        for entry in entries {
            let device = devices
                .entry((entry.major, entry.minor))
                .or_insert_with(|| IOEntry {
                    major: entry.major,
                    minor: entry.minor,
                    ..Default::default()
                });
            match entry.op.to_ascii_lowercase().as_str() {
                "read" => *read(device) = entry.value,
                "write" => *write(device) = entry.value,
                _ => {}
            }
        }
    };
    let block = &stats.blkio_stats;
    add(
        &block.io_service_bytes_recursive,
        |it| &mut it.rbytes,
        |it| &mut it.wbytes,
    );
    add(
        &block.io_serviced_recursive,
        |it| &mut it.rios,
        |it| &mut it.wios,
    );
    let mut usage: Vec<_> = devices.into_values().collect();
    usage.sort_by_key(|entry| (entry.major, entry.minor));
    IOStat {
        usage,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use protocols::agent::agent::{BlkioStats, CpuStats, CpuUsage, MemoryData, MemoryStats};

    use super::*;

    #[test]
    fn the_agent_s_figures_come_in_containerd_s_units() {
        let entry = |op: &str, value| BlkioStatsEntry {
            major: 254,
            op: op.to_owned(),
            value,
            ..Default::default()
        };
        let stats = CgroupStats {
            cpu_stats: Some(CpuStats {
                cpu_usage: Some(CpuUsage {
                    total_usage: 5_000_000,
                    usage_in_usermode: 3_000_000,
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            memory_stats: Some(MemoryStats {
                usage: Some(MemoryData {
                    usage: 4096,
                    limit: 1 << 26,
                    ..Default::default()
                })
                .into(),
                stats: [("anon".to_owned(), 1024), ("oom_kill".to_owned(), 2)].into(),
                ..Default::default()
            })
            .into(),
            blkio_stats: Some(BlkioStats {
                io_service_bytes_recursive: vec![entry("Read", 10), entry("Write", 20)],
                io_serviced_recursive: vec![entry("read", 1)],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let metrics = metrics(&StatsContainerResponse {
            cgroup_stats: Some(stats).into(),
            network_stats: vec![NetworkStats {
                name: "eth0".to_owned(),
                rx_bytes: 11,
                tx_dropped: 12,
                ..Default::default()
            }],
            ..Default::default()
        });
        assert_eq!(
            (metrics.cpu.usage_usec, metrics.cpu.user_usec),
            (5000, 3000)
        );
        assert_eq!((metrics.memory.usage, metrics.memory.anon), (4096, 1024));
        assert_eq!(metrics.memory_events.oom_kill, 2);
        let network = &metrics.network[0];
        assert_eq!(
            (network.name.as_str(), network.rx_bytes, network.tx_dropped),
            ("eth0", 11, 12)
        );
        let io = &metrics.io.usage[0];
        assert_eq!((io.major, io.rbytes, io.wbytes, io.rios), (254, 10, 20, 1));
    }
}
