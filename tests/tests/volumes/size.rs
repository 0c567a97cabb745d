// SPDX-License-Identifier: Apache-2.0
//! How a pod grows and shrinks, and the limits within it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::cri::LIMIT;
use tests::cri::messages::{
    ContainerConfig, ContainerRequest, ContainerStats, ContainerStatsResponse, Empty,
    LinuxContainerResources, UpdateContainerResourcesRequest,
};
use tests::node::Node;
use tests::pod::{Container, Pod, Spec};
use tests::procs;
use tests::scenario::{Outcome, pod_scenario, pod_vm_scenario};
use tests::volume::privileged;
use tests::wait::until;

/// A handler whose machines grow: from 256 MiB and one CPU to 2304 MiB and four.
const GROWING: &str = "kata-growing";
const FIRST_MIB: u64 = 256;
const MOST_CPUS: &str = "4";

const MIB: i64 = 1 << 20;
const PERIOD: i64 = 100_000;
const NONE: i64 = -1;

/// What the guest's kernel keeps of its memory for itself.
const KERNEL_MIB: u64 = 64;

/// MiB that are filled of 2048, and what the host may hold once they are free, and when.
const FILLED: u64 = 1600;
const FREED: u64 = 400;
const SOON: Duration = Duration::from_secs(10);

const SLEEPS: &str = "exec sleep 1000";

fn limits(memory: i64, quota: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_quota: quota,
        cpu_period: PERIOD,
        ..Default::default()
    }
}

fn limited(mut config: ContainerConfig, memory: i64, quota: i64) -> ContainerConfig {
    let linux = config.linux.mut_or_insert_default();
    linux.resources = Some(limits(memory, quota)).into();
    config
}

fn update(node: &Node, container: &Container, memory: i64, quota: i64) -> Result<()> {
    let request = UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(limits(memory, quota)).into(),
        ..Default::default()
    };
    let _: Empty = node.cri().runtime("UpdateContainerResources", &request)?;
    Ok(())
}

/// The guest's memory in MiB, as a container sees it.
fn memory(container: &Container) -> Result<u64> {
    let line = container.shell("grep MemTotal: /proc/meminfo")?;
    let number = line.split_whitespace().nth(1).context("no number")?;
    Ok(number.parse::<u64>()? >> 10)
}

fn expect_memory(container: &Container, mib: u64) -> Result<()> {
    let has = memory(container)?;
    ensure!(
        (mib.saturating_sub(KERNEL_MIB)..=mib).contains(&has),
        "the guest has {has} MiB, not {mib}"
    );
    Ok(())
}

/// MiB that the monitor of a pod holds on the host.
fn held(pod: &Pod) -> Result<u64> {
    Ok(procs::vmm(&pod.id)?.kilobytes("status", "VmRSS")? >> 10)
}

#[test]
fn memory_is_raised_filled_freed_and_given_back() -> Outcome {
    pod_vm_scenario("memory_is_raised_filled_freed_and_given_back", |node| {
        let spec = Spec::new("swells").privileged();
        let pod = spec.handled_by(GROWING).run(node)?;
        let container = pod.start(&privileged(pod.container("main", SLEEPS)))?;
        expect_memory(&container, FIRST_MIB)?;
        // What this costs is counted where the pod's is.
        let [shim, vmm] = [
            procs::shim(&pod.id)?.cgroup()?,
            procs::vmm(&pod.id)?.cgroup()?,
        ];
        let counted = shim == vmm && vmm.starts_with("/kubepods/") && vmm.ends_with(&pod.id);
        ensure!(counted, "{shim}, {vmm}");
        update(node, &container, 1792 * MIB, 0)?;
        expect_memory(&container, 2048)?;
        let script = format!(
            "mkdir /fill && mount -t tmpfs -o size=1700m tmpfs /fill &&
             dd if=/dev/zero of=/fill/x bs=1M count={FILLED} 2>/dev/null && echo full"
        );
        ensure!(container.shell(&script)? == "full");
        let full = held(&pod)?;
        ensure!(full >= FILLED, "filled: the monitor holds {full} MiB");
        container.shell("rm /fill/x")?;
        let begin = Instant::now();
        until("freed memory to be the host's", SOON, || {
            Ok((held(&pod)? < FREED).then_some(()))
        })
        .with_context(|| format!("held: {:?} MiB", held(&pod)))?;
        println!("{full} MiB fell below {FREED} in {:.1?}", begin.elapsed());
        update(node, &container, NONE, 0)?;
        expect_memory(&container, FIRST_MIB)?;
        ensure!(held(&pod)? < FREED);
        // Nobody was killed for want of memory.
        ensure!(container.shell("grep oom_kill /proc/vmstat")? == "oom_kill 0");
        pod.remove()
    })
}

#[test]
fn cpus_come_and_go_under_load() -> Outcome {
    pod_vm_scenario("cpus_come_and_go_under_load", |node| {
        let pod = Spec::new("spins").handled_by(GROWING).run(node)?;
        let busy = "for i in 1 2 3 4; do (while :; do :; done) & done; echo up; wait";
        let container = pod.start(&pod.container("main", busy))?;
        container.wait_for_log("up\n", LIMIT)?;
        ensure!(container.shell("nproc")? == "1");
        for _ in 0..3 {
            update(node, &container, 0, 3 * PERIOD)?;
            ensure!(container.shell("nproc")? == MOST_CPUS);
            update(node, &container, 0, NONE)?;
            ensure!(container.shell("nproc")? == "1");
        }
        pod.remove()
    })
}

#[test]
fn a_machine_follows_the_sum_of_its_containers() -> Outcome {
    pod_vm_scenario("a_machine_follows_the_sum_of_its_containers", |node| {
        let pod = Spec::new("follows").handled_by(GROWING).run(node)?;
        let start =
            |name, memory, quota| pod.start(&limited(pod.container(name, SLEEPS), memory, quota));
        let first = start("first", 128 * MIB, PERIOD / 2)?;
        expect_memory(&first, 384)?;
        // A fraction is rounded up, once for all.
        ensure!(first.shell("nproc")? == "2");
        let second = start("second", 256 * MIB, PERIOD / 2)?;
        expect_memory(&first, 640)?;
        ensure!(first.shell("nproc")? == "2");
        // More than the machine may have: it has what it may.
        let third = start("third", 512 << 30, 900 * PERIOD)?;
        expect_memory(&first, 2304)?;
        ensure!(first.shell("nproc")? == MOST_CPUS);
        third.remove()?;
        second.remove()?;
        until("a smaller machine", LIMIT, || {
            let small = memory(&first)? <= 384 && first.shell("nproc")? == "2";
            Ok(small.then_some(()))
        })?;
        pod.remove()
    })
}

/// CPU time of a container, in nanoseconds.
fn used(node: &Node, container: &Container) -> Result<u64> {
    let request = ContainerRequest {
        container_id: container.id.clone(),
        ..Default::default()
    };
    let answer: ContainerStatsResponse = node.cri().runtime("ContainerStats", &request)?;
    let stats: ContainerStats = answer.stats.into_option().context("no statistics")?;
    Ok(stats.cpu.usage_core_nano_seconds.value)
}

#[test]
fn a_cpu_limit_holds() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "throttled")?;
        let busy = pod.container("main", "echo up; while :; do :; done");
        let container = pod.start(&limited(busy, 0, PERIOD / 4))?;
        container.wait_for_log("up\n", LIMIT)?;
        let share = || -> Result<f64> {
            let (begin, before) = (Instant::now(), used(node, &container)?);
            std::thread::sleep(Duration::from_secs(4));
            let spent = used(node, &container)?.saturating_sub(before);
            Ok(Duration::from_nanos(spent).as_secs_f64() / begin.elapsed().as_secs_f64())
        };
        let quarter = share()?;
        ensure!(
            (0.1..0.4).contains(&quarter),
            "a quarter of a CPU: {quarter}"
        );
        update(node, &container, 0, NONE)?;
        let all = share()?;
        ensure!(all > 0.5, "no limit: {all}");
        pod.remove()
    })
}

#[test]
fn limits_that_no_machine_has_are_none() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "wide")?;
        for (name, memory, quota) in [
            ("none", NONE, NONE),
            ("huge", i64::MAX & !4095, 0),
            ("large", 1 << 42, 10_000 * PERIOD),
        ] {
            let container = pod.start(&limited(pod.container(name, SLEEPS), memory, quota))?;
            ensure!(container.shell("echo fine")? == "fine");
            container.remove()?;
        }
        pod.remove()
    })
}
