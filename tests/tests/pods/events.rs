// SPDX-License-Identifier: Apache-2.0
//! containerd's events: each once and in order, as runc's shim sends them.

use anyhow::{Result, ensure};
use tests::cri::LIMIT;
use tests::cri::messages::LinuxContainerResources;
use tests::handlers::by_sandbox_api;
use tests::node::Node;
use tests::pod::{Pod, Spec};
use tests::scenario::{Outcome, pod_scenario};
use tests::wait::until;

/// Whether a pod is a task as its containers are. By the sandbox API it isn't, and what is told of it
/// is containerd's own: that a shim has gone.
fn is_task(handler: &str) -> bool {
    handler == "runc" || !by_sandbox_api()
}

/// A life of a pod with two containers; answers what containerd said of each.
fn scripted_life(node: &Node, handler: &str) -> Result<[Vec<String>; 3]> {
    let events = node.events()?;
    let pod = Spec::new("told").handled_by(handler).run(node)?;
    let first = pod.start_script("first", "trap 'exit 3' TERM; echo up; sleep 1000 & wait")?;
    let second = pod.start_script("second", "exit 4")?;
    first.wait_for_log("up\n", LIMIT)?;
    second.wait(LIMIT)?;
    let ctr = node.ctr();
    for (exec, argv) in [
        ("good", ["sh", "-c", "exit 5"]),
        ("bad", ["/no/such", "", ""]),
    ] {
        let output = ctr.exec(&[], &first.id, exec, &argv)?;
        ensure!(output.code != Some(0), "{output}");
    }
    ctr.call(&["task", "pause", &first.id])?.quietly()?;
    ctr.call(&["task", "resume", &first.id])?.quietly()?;
    first.stop(30)?;
    first.remove()?;
    second.remove()?;
    pod.remove()?;
    let last = if is_task(handler) {
        &pod.id
    } else {
        &second.id
    };
    events.wait_for("the last delete", |event| {
        event.topic == "delete" && event.text("container_id") == last
    })?;
    let all = events.tasks()?;
    Ok([&pod.id, &first.id, &second.id].map(|id| {
        all.iter()
            .filter(|event| event.text("container_id") == id)
            .map(|event| {
                let exec = match (event.text("exec_id"), event.text("id")) {
                    ("", other) if other == id => "",
                    ("", other) => other,
                    (exec, _) => exec,
                };
                let code = event.body.get("exit_status").map(ToString::to_string);
                let words = [&event.topic, exec, code.as_deref().unwrap_or("")];
                let words = words.into_iter().filter(|word| !word.is_empty());
                words.collect::<Vec<_>>().join(" ")
            })
            .collect()
    }))
}

#[test]
fn every_event_comes_once_and_in_order() -> Outcome {
    pod_scenario(|node| {
        let reference = scripted_life(node, "runc")?;
        if !node.ctr().has_vm() {
            let expected = [
                "create",
                "start",
                "exec-added good",
                "exec-started good",
                "exit good 5",
                "exec-added bad",
                "paused",
                "resumed",
                "exit 3",
                "delete 3",
            ];
            ensure!(reference[1] == expected, "{reference:#?}");
            return Ok(());
        }
        let ours = scripted_life(node, "kata")?;
        for (name, theirs, ours) in [
            ("pod", &reference[0], &ours[0]),
            ("first", &reference[1], &ours[1]),
            ("second", &reference[2], &ours[2]),
        ] {
            if name != "pod" || is_task("kata") {
                ensure!(theirs == ours, "{name}: runc's {theirs:#?}, ours {ours:#?}");
            }
        }
        Ok(())
    })
}

#[test]
fn memory_that_runs_out_is_told() -> Outcome {
    pod_scenario(|node| {
        let events = node.events()?;
        let pod = Pod::run(node, "oom")?;
        let neighbour = pod.start_script("neighbour", "exec sleep 1000")?;
        let mut config = pod.container("main", "exec tail /dev/zero");
        config.linux.mut_or_insert_default().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            ..Default::default()
        })
        .into();
        let main = pod.start(&config)?;
        let code = main.wait(LIMIT)?;
        ensure!(code == 137, "exit code {code}");
        events.wait_for("oom", |event| {
            event.topic == "oom" && event.text("container_id") == main.id
        })?;
        until("OOMKilled", LIMIT, || {
            Ok((main.status()?.reason == "OOMKilled").then_some(()))
        })?;
        ensure!(
            neighbour.status()?.reason.is_empty(),
            "the neighbour's reason"
        );
        neighbour.shell("true")?;
        pod.remove()
    })
}
