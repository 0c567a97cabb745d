// SPDX-License-Identifier: Apache-2.0
//! What a group has used, in the protocol's message, which has the shape of cgroup v1. What the
//! kernel does not count stays 0.

use std::collections::HashMap;
use std::fs;

use protocols::agent::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData,
    MemoryStats, PidsStats, ThrottlingData,
};

use super::Cgroup;

/// Reads everything that the group has.
pub(super) fn read(cgroup: &Cgroup) -> CgroupStats {
    CgroupStats {
        cpu_stats: Some(cpu(cgroup)).into(),
        memory_stats: Some(memory(cgroup)).into(),
        pids_stats: Some(PidsStats {
            current: number(cgroup, "pids.current").unwrap_or(0),
            limit: number(cgroup, "pids.max").unwrap_or(0),
            ..PidsStats::default()
        })
        .into(),
        blkio_stats: Some(io(&cgroup.read("io.stat").unwrap_or_default())).into(),
        hugetlb_stats: hugetlb(cgroup),
        ..CgroupStats::default()
    }
}

/// How many processes the kernel has killed for want of memory.
pub(super) fn memory_kills(cgroup: &Cgroup) -> u64 {
    let events = table(&cgroup.read("memory.events").unwrap_or_default());
    value(&events, "oom_kill")
}

fn cpu(cgroup: &Cgroup) -> CpuStats {
    let stat = table(&cgroup.read("cpu.stat").unwrap_or_default());
    let nanoseconds = |key: &str| value(&stat, key).saturating_mul(1000);
    CpuStats {
        cpu_usage: Some(CpuUsage {
            total_usage: nanoseconds("usage_usec"),
            usage_in_kernelmode: nanoseconds("system_usec"),
            usage_in_usermode: nanoseconds("user_usec"),
            ..CpuUsage::default()
        })
        .into(),
        throttling_data: Some(ThrottlingData {
            periods: value(&stat, "nr_periods"),
            throttled_periods: value(&stat, "nr_throttled"),
            throttled_time: nanoseconds("throttled_usec"),
            ..ThrottlingData::default()
        })
        .into(),
        ..CpuStats::default()
    }
}

fn memory(cgroup: &Cgroup) -> MemoryStats {
    let stats = table(&cgroup.read("memory.stat").unwrap_or_default());
    let events = table(&cgroup.read("memory.events").unwrap_or_default());
    let data = |kind: &str| MemoryData {
        usage: number(cgroup, &format!("{kind}.current")).unwrap_or(0),
        max_usage: number(cgroup, &format!("{kind}.peak")).unwrap_or(0),
        // "max", or no such file: no limit.
        limit: number(cgroup, &format!("{kind}.max")).unwrap_or(u64::MAX),
        ..MemoryData::default()
    };
    MemoryStats {
        cache: value(&stats, "file"),
        usage: Some(MemoryData {
            failcnt: value(&events, "max"),
            ..data("memory")
        })
        .into(),
        swap_usage: Some(data("memory.swap")).into(),
        kernel_usage: Some(MemoryData {
            usage: value(&stats, "kernel"),
            ..MemoryData::default()
        })
        .into(),
        // cgroup v2 always counts the groups below too.
        use_hierarchy: true,
        stats,
        ..MemoryStats::default()
    }
}

#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) {
    let _ = io(text);
    let _ = value(&table(text), "usage_usec");
}

/// Lines such as `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn io(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, operation) = match key {
                "rbytes" => (&mut stats.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.io_service_bytes_recursive, "Write"),
                "dbytes" => (&mut stats.io_service_bytes_recursive, "Discard"),
                "rios" => (&mut stats.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.io_serviced_recursive, "Write"),
                "dios" => (&mut stats.io_serviced_recursive, "Discard"),
                _ => continue,
            };
            list.push(BlkioStatsEntry {
                major,
                minor,
                op: operation.to_owned(),
                value: value.parse().unwrap_or(0),
                ..BlkioStatsEntry::default()
            });
        }
    }
    stats
}

fn hugetlb(cgroup: &Cgroup) -> HashMap<String, HugetlbStats> {
    let Ok(entries) = fs::read_dir(cgroup.file("")) else {
        return HashMap::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            (!size.contains('.')).then(|| size.to_owned())
        })
        .map(|size| {
            let events = cgroup.read(&format!("hugetlb.{size}.events"));
            let stats = HugetlbStats {
                usage: number(cgroup, &format!("hugetlb.{size}.current")).unwrap_or(0),
                failcnt: value(&table(&events.unwrap_or_default()), "max"),
                ..HugetlbStats::default()
            };
            (size, stats)
        })
        .collect()
}

/// `None` for "max" and for a file that is not there.
fn number(cgroup: &Cgroup, file: &str) -> Option<u64> {
    cgroup.read(file).ok()?.trim().parse().ok()
}

/// Lines of a word and a number.
fn table(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

fn value(table: &HashMap<String, u64>, key: &str) -> u64 {
    table.get(key).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_tables() {
        let stats = io("254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\nbad\n");
        let bytes: Vec<_> = stats
            .io_service_bytes_recursive
            .iter()
            .map(|entry| (entry.major, entry.op.as_str(), entry.value))
            .collect();
        assert_eq!(
            bytes,
            [(254, "Read", 10), (254, "Write", 20), (254, "Discard", 0)]
        );
        let table = table("usage_usec 5\nnr_periods 7\nodd\n");
        assert_eq!(value(&table, "usage_usec"), 5);
        assert_eq!(value(&table, "absent"), 0);
    }
}
