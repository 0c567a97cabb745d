// SPDX-License-Identifier: Apache-2.0
//! What a kubelet measures of pods and containers.

use anyhow::{Context, Result, bail, ensure};
use tests::cri::LIMIT;
use tests::cri::messages::{
    ContainerRequest, ContainerStats, ContainerStatsResponse, LinuxPodSandboxStats,
    PodSandboxStatsRequest, PodSandboxStatsResponse,
};
use tests::handlers::by_sandbox_api;
use tests::node::Node;
use tests::pod::Pod;
use tests::scenario::{Outcome, pod_scenario, pod_vm_scenario};
use tests::wait::until;

const MIB: u64 = 1 << 20;

fn container(node: &Node, id: &str) -> Result<ContainerStats> {
    let request = ContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    let answer: ContainerStatsResponse = node.cri().runtime("ContainerStats", &request)?;
    answer.stats.into_option().context("no statistics")
}

#[test]
fn a_container_s_cpu_and_memory_are_its_own() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "stats")?;
        let idle = pod.start_script("idle", "exec sleep 1000")?;
        // A shell's variable is memory that can't be given back.
        let script = "x=$(head -c 33554432 /dev/zero | tr '\\0' x); echo up;
            while :; do :; done";
        let busy = pod.start_script("busy", script)?;
        busy.wait_for_log("up\n", LIMIT)?;
        let before = container(node, &busy.id)?;
        let used = until("CPU time of a busy container", LIMIT, || {
            let now = container(node, &busy.id)?;
            let more = now
                .cpu
                .usage_core_nano_seconds
                .value
                .saturating_sub(before.cpu.usage_core_nano_seconds.value);
            Ok((more > 500_000_000).then_some(now))
        })?;
        ensure!(
            used.memory.working_set_bytes.value > 32 * MIB,
            "the busy one's memory: {}",
            used.memory.working_set_bytes.value
        );
        let idle = container(node, &idle.id)?;
        ensure!(
            idle.memory.working_set_bytes.value < 16 * MIB
                && idle.memory.working_set_bytes.value > 0,
            "the idle one's memory: {}",
            idle.memory.working_set_bytes.value
        );
        ensure!(
            idle.cpu.usage_core_nano_seconds.value < used.cpu.usage_core_nano_seconds.value,
            "the idle one's CPU time: {}",
            idle.cpu.usage_core_nano_seconds.value
        );
        pod.remove()
    })
}

#[test]
fn a_pod_s_statistics_hold_its_network_and_its_containers() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "pod-stats")?;
        let main = pod.start_script("main", "exec sleep 1000")?;
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        let take = || -> Result<_> {
            let answer: PodSandboxStatsResponse =
                node.cri().runtime("PodSandboxStats", &request)?;
            let stats = answer.stats.into_option().context("no statistics")?;
            stats.linux.into_option().context("none of Linux")
        };
        let before = take()?;
        ensure!(
            before.containers.len() == 1,
            "{} containers",
            before.containers.len()
        );
        ensure!(before.cpu.usage_core_nano_seconds.value > 0, "no CPU time");
        ensure!(before.memory.usage_bytes.value > 0, "no memory");
        main.shell("ping -c 3 -s 1000 10.88.0.1 > /dev/null")?;
        let bytes = |stats: &LinuxPodSandboxStats| {
            let interface = &stats.network.default_interface;
            (interface.rx_bytes.value, interface.tx_bytes.value)
        };
        let ((rx, tx), (rx_now, tx_now)) = (bytes(&before), bytes(&take()?));
        ensure!(
            rx_now >= rx + 3000 && tx_now >= tx + 3000,
            "received {rx} then {rx_now}, sent {tx} then {tx_now}"
        );
        pod.remove()
    })
}

/// Where containerd passes on what the shim says of tasks.
#[test]
fn a_task_s_metrics_hold_its_network_and_a_pod_s_what_it_costs() -> Outcome {
    pod_vm_scenario(
        "a_task_s_metrics_hold_its_network_and_a_pod_s_what_it_costs",
        |node| {
            let pod = Pod::run(node, "task-stats")?;
            let main = pod.start_script("main", "exec sleep 1000")?;
            let mut tasks = vec![main.id.as_str()];
            if !by_sandbox_api() {
                // The task that stands for the pod.
                tasks.push(&pod.id);
            }
            let take = |id: &str| -> Result<(u64, u64)> {
                let metrics = node.metrics(id)?;
                ensure!(
                    metrics.cpu.usage_usec > 0 && metrics.memory.usage > 0,
                    "{id}: {metrics:?}"
                );
                let [eth0] = metrics.network.as_slice() else {
                    bail!("{id}: {metrics:?}");
                };
                ensure!(eth0.name == "eth0", "{id}: {metrics:?}");
                Ok((eth0.rx_bytes, eth0.tx_bytes))
            };
            let before = tasks
                .iter()
                .map(|id| take(id))
                .collect::<Result<Vec<_>>>()?;
            main.shell("ping -c 3 -s 1000 10.88.0.1 > /dev/null")?;
            for (id, (rx, tx)) in tasks.iter().zip(before) {
                let (rx_now, tx_now) = take(id)?;
                ensure!(
                    rx_now >= rx + 3000 && tx_now >= tx + 3000,
                    "{id}: received {rx} then {rx_now}, sent {tx} then {tx_now}"
                );
            }
            if let [main, pod] = tasks.as_slice() {
                let (main, pod) = (node.metrics(main)?, node.metrics(pod)?);
                ensure!(
                    pod.memory.usage > main.memory.usage + MIB,
                    "the pod uses {}, its container {}",
                    pod.memory.usage,
                    main.memory.usage
                );
            }
            pod.remove()
        },
    )
}
