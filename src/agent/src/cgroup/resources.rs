// SPDX-License-Identifier: Apache-2.0
//! Limits of the OCI spec, in the words of cgroup v2. On the wire 0 means "not given".

use std::fs;
use std::path::Path;

use protocols::agent::oci::{
    LinuxBlockIO, LinuxCPU, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources,
    LinuxThrottleDevice,
};

use super::{Cgroup, cpuset};
use crate::error::{AgentError, Result};

/// Applies what is given.
///
/// # Errors
///
/// A limit that does not exist here, by its name in the spec, or the kernel's reason.
pub(super) fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    if let Some(network) = resources.Network.as_ref()
        && (network.ClassID != 0 || !network.Priorities.is_empty())
    {
        return Err(absent("network"));
    }
    for (file, value) in settings(cgroup, resources)? {
        if !cgroup.has(&file) {
            return Err(AgentError::unsupported(format!(
                "linux.resources: the guest kernel has no {file}"
            )));
        }
        cgroup.write(&file, &value)?;
    }
    Ok(())
}

/// With less, the pages of a small program push each other out for ever: the kernel counts that
/// as progress and kills nothing.
const LEAST_MEMORY: i64 = 1 << 20;

type Settings = Vec<(String, String)>;

fn settings(cgroup: &Cgroup, resources: &LinuxResources) -> Result<Settings> {
    let mut settings = Settings::new();
    if let Some(memory) = resources.Memory.as_ref() {
        memory_settings(memory, cgroup.has("memory.swap.max"), &mut settings)?;
    }
    if let Some(cpu) = resources.CPU.as_ref() {
        cpu_settings(cpu, &mut settings)?;
        cpuset_settings(cpu, cgroup, &mut settings)?;
    }
    if let Some(pids) = resources.Pids.as_ref() {
        pids_settings(pids, &mut settings);
    }
    if let Some(io) = resources.BlockIO.as_ref() {
        io_settings(io, cgroup.has("io.bfq.weight"), &mut settings)?;
    }
    hugepage_settings(
        &resources.HugepageLimits,
        |file| cgroup.has(file),
        &mut settings,
    )?;
    Ok(settings)
}

fn absent(what: &str) -> AgentError {
    AgentError::unsupported(format!(
        "linux.resources.{what}: cgroup v2 has no such limit"
    ))
}

fn add(settings: &mut Settings, file: &str, value: &(impl ToString + ?Sized)) {
    settings.push((file.to_owned(), value.to_string()));
}

/// -1 means no limit.
fn amount(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

fn memory_settings(memory: &LinuxMemory, has_swap: bool, settings: &mut Settings) -> Result<()> {
    if memory.Kernel > 0 {
        return Err(absent("memory.kernel"));
    }
    if memory.KernelTCP > 0 {
        return Err(absent("memory.kernelTCP"));
    }
    if memory.Swappiness != 0 {
        return Err(absent("memory.swappiness"));
    }
    if memory.DisableOOMKiller {
        return Err(absent("memory.disableOOMKiller"));
    }
    if (1..LEAST_MEMORY).contains(&memory.Limit) {
        return Err(AgentError::invalid(format!(
            "linux.resources.memory.limit: {} bytes of memory are too little for a process; the \
             least is {LEAST_MEMORY}",
            memory.Limit
        )));
    }
    if memory.Limit != 0 {
        add(settings, "memory.max", &amount(memory.Limit));
    }
    match swap(memory)? {
        // The most that may be used: a kernel without swap keeps that by itself.
        Some(_) if !has_swap => {}
        Some(swap) => add(settings, "memory.swap.max", &swap),
        None => {}
    }
    if memory.Reservation != 0 {
        add(settings, "memory.low", &amount(memory.Reservation));
    }
    Ok(())
}

/// The spec's swap limit counts memory too, that of cgroup v2 does not.
fn swap(memory: &LinuxMemory) -> Result<Option<String>> {
    let wrong = |what| AgentError::invalid(format!("linux.resources.memory.swap: {what}"));
    match (memory.Swap, memory.Limit) {
        (0, _) => Ok(None),
        (..0, _) => Ok(Some("max".to_owned())),
        (_, ..=0) => Err(wrong("needs a memory limit")),
        (swap, limit) => swap
            .checked_sub(limit)
            .filter(|swap| *swap >= 0)
            .map(|swap| Some(swap.to_string()))
            .ok_or_else(|| wrong("is less than the memory limit")),
    }
}

fn cpu_settings(cpu: &LinuxCPU, settings: &mut Settings) -> Result<()> {
    if cpu.RealtimeRuntime != 0 {
        return Err(absent("cpu.realtimeRuntime"));
    }
    if cpu.RealtimePeriod != 0 {
        return Err(absent("cpu.realtimePeriod"));
    }
    if cpu.Shares != 0 {
        add(settings, "cpu.weight", &weight(cpu.Shares));
    }
    if cpu.Quota != 0 || cpu.Period != 0 {
        let quota = if cpu.Quota > 0 {
            cpu.Quota.to_string()
        } else {
            "max".to_owned()
        };
        let period = if cpu.Period == 0 { 100_000 } else { cpu.Period };
        add(settings, "cpu.max", &format!("{quota} {period}"));
    }
    Ok(())
}

/// Sets of CPUs and memory nodes are numbered as on the host. The guest keeps what it has of them;
/// with none of them, all that it has will do.
fn cpuset_settings(cpu: &LinuxCPU, cgroup: &Cgroup, settings: &mut Settings) -> Result<()> {
    for (wanted, field, file) in [
        (&cpu.Cpus, "cpu.cpus", "cpuset.cpus"),
        (&cpu.Mems, "cpu.mems", "cpuset.mems"),
    ] {
        if wanted.is_empty() {
            continue;
        }
        let wrong = || AgentError::invalid(format!("linux.resources.{field}: {wanted:?}"));
        let wanted = cpuset::parse(wanted).ok_or_else(wrong)?;
        let file_of_guest = Path::new(super::ROOT).join(format!("{file}.effective"));
        let guest = fs::read_to_string(&file_of_guest)
            .ok()
            .and_then(|text| cpuset::parse(text.trim()))
            .unwrap_or_default();
        let both = cpuset::within(&wanted, &guest);
        if !both.is_empty() {
            add(settings, file, &cpuset::words(&both));
        } else if cgroup.read(file).is_ok_and(|set| !set.trim().is_empty()) {
            // A set that has processes can't be made empty again.
            add(settings, file, &cpuset::words(&guest));
        }
    }
    Ok(())
}

/// Shares of 2 to 262144 become weights of 1 to 10000, as all runtimes convert them.
fn weight(shares: u64) -> u64 {
    scale(shares.clamp(2, 262_144), 2, 262_144)
}

/// Maps `from..=to` to 1 to 10000.
fn scale(value: u64, from: u64, to: u64) -> u64 {
    value
        .saturating_sub(from)
        .saturating_mul(9999)
        .checked_div(to.saturating_sub(from))
        .unwrap_or(0)
        .saturating_add(1)
}

fn pids_settings(pids: &LinuxPids, settings: &mut Settings) {
    if pids.Limit != 0 {
        add(settings, "pids.max", &amount(pids.Limit));
    }
}

fn io_settings(io: &LinuxBlockIO, has_bfq: bool, settings: &mut Settings) -> Result<()> {
    // BFQ takes the spec's own range of 10 to 1000, the other controller 1 to 10000.
    let (file, weight): (_, fn(u32) -> u64) = if has_bfq {
        ("io.bfq.weight", u64::from)
    } else {
        ("io.weight", |weight| {
            scale(u64::from(weight.clamp(10, 1000)), 10, 1000)
        })
    };
    if io.LeafWeight != 0 {
        return Err(absent("blockIO.leafWeight"));
    }
    if io.Weight != 0 {
        add(settings, file, &format!("default {}", weight(io.Weight)));
    }
    for device in &io.WeightDevice {
        if device.LeafWeight != 0 {
            return Err(absent("blockIO.weightDevice.leafWeight"));
        }
        let weight = weight(device.Weight);
        add(
            settings,
            file,
            &format!("{}:{} {weight}", device.Major, device.Minor),
        );
    }
    let limits: [(&[LinuxThrottleDevice], &str); 4] = [
        (&io.ThrottleReadBpsDevice, "rbps"),
        (&io.ThrottleWriteBpsDevice, "wbps"),
        (&io.ThrottleReadIOPSDevice, "riops"),
        (&io.ThrottleWriteIOPSDevice, "wiops"),
    ];
    for (devices, key) in limits {
        for device in devices {
            let rate = match device.Rate {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            add(
                settings,
                "io.max",
                &format!("{}:{} {key}={rate}", device.Major, device.Minor),
            );
        }
    }
    Ok(())
}

fn hugepage_settings(
    limits: &[LinuxHugepageLimit],
    has: impl Fn(&str) -> bool,
    settings: &mut Settings,
) -> Result<()> {
    for limit in limits {
        // Part of a file's name: "2MB", "1GB".
        let plain = |letter: char| letter.is_ascii_alphanumeric();
        if limit.Pagesize.is_empty() || !limit.Pagesize.chars().all(plain) {
            return Err(AgentError::invalid(format!(
                "linux.resources.hugepageLimits: page size {:?}",
                limit.Pagesize
            )));
        }
        let file = format!("hugetlb.{}.max", limit.Pagesize);
        // The kubelet forbids all sizes of the host. Those that the guest lacks nobody can use.
        if limit.Limit == 0 && !has(&file) {
            continue;
        }
        add(settings, &file, &limit.Limit);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(limit: i64, swap: i64) -> Result<Settings> {
        memory_on(true, limit, swap)
    }

    fn memory_on(has_swap: bool, limit: i64, swap: i64) -> Result<Settings> {
        let mut settings = Settings::new();
        let memory = LinuxMemory {
            Limit: limit,
            Swap: swap,
            ..LinuxMemory::default()
        };
        memory_settings(&memory, has_swap, &mut settings).map(|()| settings)
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn swap_is_counted_apart() {
        assert_eq!(
            memory(100 << 20, 150 << 20).unwrap(),
            [
                pair("memory.max", "104857600"),
                pair("memory.swap.max", "52428800")
            ]
        );
        assert_eq!(memory(-1, 0).unwrap(), [pair("memory.max", "max")]);
        assert_eq!(memory(0, 0).unwrap(), []);
        // What nerdctl and Docker send with each memory limit.
        let limit = [pair("memory.max", "104857600")];
        assert_eq!(memory_on(false, 100 << 20, 200 << 20).unwrap(), limit);
        memory_on(false, 100 << 20, 50 << 20).unwrap_err();
        memory(100 << 20, 50 << 20).unwrap_err();
        memory(4096, 0).unwrap_err();
        memory(0, 50).unwrap_err();
    }

    #[test]
    fn shares_become_weights() {
        assert_eq!([2, 1024, 262_144].map(weight), [1, 39, 10_000]);
        assert_eq!(weight(u64::MAX), 10_000);
    }

    #[test]
    fn quota_and_period_go_together() {
        let settings = |quota, period| {
            let mut settings = Settings::new();
            let cpu = LinuxCPU {
                Quota: quota,
                Period: period,
                ..LinuxCPU::default()
            };
            cpu_settings(&cpu, &mut settings).unwrap();
            settings
        };
        assert_eq!(settings(50_000, 0), [pair("cpu.max", "50000 100000")]);
        assert_eq!(settings(-1, 200_000), [pair("cpu.max", "max 200000")]);
        assert_eq!(settings(0, 0), []);
    }

    #[test]
    fn limits_of_cgroup_v1_are_refused_by_name() {
        let mut settings = Settings::new();
        let memory = LinuxMemory {
            Swappiness: 10,
            ..LinuxMemory::default()
        };
        let error = memory_settings(&memory, true, &mut settings).unwrap_err();
        assert!(error.line().contains("memory.swappiness"));
        let cpu = LinuxCPU {
            RealtimeRuntime: 1,
            ..LinuxCPU::default()
        };
        let error = cpu_settings(&cpu, &mut settings).unwrap_err();
        assert!(error.line().contains("cpu.realtimeRuntime"));
    }

    #[test]
    fn a_page_size_is_no_path() {
        let limit = LinuxHugepageLimit {
            Pagesize: "../x".to_owned(),
            ..LinuxHugepageLimit::default()
        };
        hugepage_settings(&[limit], |_| true, &mut Settings::new()).unwrap_err();
    }

    #[test]
    fn a_page_size_that_is_not_there_may_be_forbidden() {
        let limits =
            [("1GB", 0), ("2MB", 0), ("16GB", 5)].map(|(size, limit)| LinuxHugepageLimit {
                Pagesize: size.to_owned(),
                Limit: limit,
                ..LinuxHugepageLimit::default()
            });
        let mut settings = Settings::new();
        hugepage_settings(&limits, |file| file == "hugetlb.2MB.max", &mut settings).unwrap();
        assert_eq!(
            settings,
            [pair("hugetlb.2MB.max", "0"), pair("hugetlb.16GB.max", "5")]
        );
    }
}
