// SPDX-License-Identifier: Apache-2.0
//! What can't be had: one clear error, and nothing left.

use anyhow::{Context, Result, ensure};
use tests::cni::Network;
use tests::cri::Status;
use tests::handlers::by_sandbox_api;
use tests::node::Node;
use tests::pod::{Pod, Spec};
use tests::scenario::{Outcome, leave_out, pod_scenario, pod_vm_scenario};

/// A pod that is refused in one line with these words; no address stays with it.
fn refused(node: &Node, spec: Spec, words: &[&str]) -> Result<()> {
    let error = spec.run(node).err().context("the pod runs")?;
    let status = error
        .downcast_ref::<Status>()
        .with_context(|| format!("{error:#}"))?;
    status.one_line(words)?;
    let leases = node.networks().leases()?;
    ensure!(leases.is_empty(), "addresses still given: {leases:?}");
    Ok(())
}

#[test]
fn a_network_that_fails_in_the_middle() -> Outcome {
    pod_scenario(|node| {
        let spec = Spec::new("failing").on(Network::Failing);
        refused(node, spec, &["the test network is out of order"])?;
        Pod::run(node, "failing")?.remove()
    })
}

#[test]
fn a_network_namespace_that_vanishes() -> Outcome {
    pod_scenario(|node| {
        let spec = Spec::new("vanishing").on(Network::Vanishing);
        refused(node, spec, &["netns"])?;
        Pod::run(node, "vanishing")?.remove()
    })
}

#[test]
fn an_image_without_the_command() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "command")?;
        let container = pod.create(&pod.container_of("main", &["no-such-command"]));
        // The command is missed at the latest at the start.
        let error = match container {
            Ok(container) => container.start().err().context("the container runs")?,
            Err(error) => error,
        };
        let status = error
            .downcast_ref::<Status>()
            .with_context(|| format!("{error:#}"))?;
        status.one_line(&["no-such-command", "not found"])?;
        let well = pod.start_script("well", "exec sleep 1000")?;
        well.shell("true")?;
        pod.remove()
    })
}

#[test]
fn configurations_that_cannot_be_honoured() -> Outcome {
    let name = "configurations_that_cannot_be_honoured";
    if by_sandbox_api() {
        return leave_out(name, "a handler by the sandbox API has no options");
    }
    pod_vm_scenario(name, |node| {
        let spec = Spec::new("unknown").handled_by("kata-unknown-key");
        refused(node, spec, &["no_such_key"])?;
        let spec = Spec::new("unfit").handled_by("kata-unfit-key");
        refused(node, spec, &["enable_iommu"])?;
        Pod::run(node, "well")?.remove()
    })
}

#[test]
fn an_annotation_that_is_not_allowed() -> Outcome {
    pod_vm_scenario("an_annotation_that_is_not_allowed", |node| {
        let key = "io.katacontainers.config.hypervisor.default_memory";
        let spec = Spec::new("annotated").with_annotation(key, "512");
        refused(node, spec, &[key])?;
        Pod::run(node, "annotated")?.remove()
    })
}
