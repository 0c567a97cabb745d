// SPDX-License-Identifier: Apache-2.0
//! Pods and their containers from creation to removal.

use std::time::Duration;

use anyhow::ensure;
use tests::cri::LIMIT;
use tests::cri::messages::{ContainerState, PodSandboxState};
use tests::pod::{Pod, Spec};
use tests::procs;
use tests::scenario::{Outcome, pod_scenario};
use tests::wait::until;

/// Runs until it is told to end, which it does with 3.
const WAITS: &str = "trap 'exit 3' TERM; echo up; sleep 1000 & wait";

#[test]
fn a_pod_of_one_container() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "one")?;
        let container = pod.start_script("main", &format!("echo on $(hostname); {WAITS}"))?;
        container.wait_for_log("on one\nup\n", LIMIT)?;
        let answer = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 5"])?;
        ensure!(
            (answer.exit_code, &*answer.stdout, &*answer.stderr) == (5, b"out\n", b"err\n"),
            "{:?} {:?} {:?}",
            answer.exit_code,
            answer.stdout,
            answer.stderr
        );
        container.stop(30)?;
        let code = container.wait(LIMIT)?;
        ensure!(code == 3, "exit code {code}");
        container.remove()?;
        pod.remove()
    })
}

#[test]
fn pods_of_three_and_ten_containers() -> Outcome {
    pod_scenario(|node| {
        for count in [3, 10] {
            let pod = Pod::run(node, &format!("of-{count}"))?;
            let mut containers = Vec::new();
            for number in 0..count {
                let script = format!("echo I am {number}; {WAITS}");
                containers.push(pod.start_script(&format!("c{number}"), &script)?);
            }
            for (number, container) in containers.iter().enumerate() {
                // A signal before its trap would be nothing to PID 1.
                container.wait_for_log(&format!("I am {number}\nup\n"), LIMIT)?;
            }
            // One that ends leaves the others alone.
            let (last, others) = containers
                .split_last()
                .ok_or_else(|| anyhow::anyhow!("none"))?;
            last.stop(30)?;
            let code = last.wait(LIMIT)?;
            ensure!(code == 3, "exit code {code}");
            for container in others {
                let words = container.shell("echo still here")?;
                ensure!(words == "still here", "{words}");
            }
            pod.remove()?;
        }
        Ok(())
    })
}

#[test]
fn init_containers_come_before_the_others() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "init")?;
        // What a kubelet does: one after the other, each to its end.
        for (name, script, code) in [
            ("first", "echo first > /dev/shm/order", 0),
            ("second", "echo second >> /dev/shm/order; exit 6", 6),
            ("again", "echo again >> /dev/shm/order", 0),
        ] {
            let container = pod.start_script(name, script)?;
            let ended = container.wait(LIMIT)?;
            ensure!(ended == code, "{name}: exit code {ended}");
            container.remove()?;
        }
        // Shared memory is the pod's: it outlives its containers.
        let main = pod.start_script("main", "cat /dev/shm/order")?;
        ensure!(main.wait(LIMIT)? == 0, "exit code");
        let log = main.log("stdout")?;
        ensure!(log == "first\nsecond\nagain\n", "{log}");
        pod.remove()
    })
}

#[test]
fn a_sidecar_restarts_beside_the_main_container() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "sidecar")?;
        let main = pod.start_script("main", "exec sleep 1000")?;
        let began = main.status()?.started_at;
        let mut config = pod.container("side", "echo up; read line; exit 1");
        for attempt in 0..3 {
            config.metadata.mut_or_insert_default().attempt = attempt;
            config.log_path = format!("side-{attempt}.log");
            let side = pod.start(&config)?;
            let code = side.wait(LIMIT)?;
            ensure!(code == 1, "attempt {attempt}: exit code {code}");
            let log = side.log("stdout")?;
            ensure!(log == "up\n", "attempt {attempt}: {log:?}");
            side.remove()?;
        }
        let status = main.status()?;
        ensure!(
            status.state == ContainerState::CONTAINER_RUNNING.into() && status.started_at == began,
            "the main container: {:?}",
            status.state
        );
        pod.remove()
    })
}

#[test]
fn containers_and_pods_go_in_any_order() -> Outcome {
    pod_scenario(|node| {
        // All at once, with containers in every state.
        let pod = Pod::run(node, "at-once")?;
        pod.create(&pod.container("created", "true"))?;
        let ended = pod.start_script("ended", "exit 2")?;
        ended.wait(LIMIT)?;
        let running = pod.start_script("running", "sleep 1000")?;
        pod.stop()?;
        let state = pod.status()?.state;
        ensure!(
            state == PodSandboxState::SANDBOX_NOTREADY.into(),
            "after its stop: {state:?}"
        );
        let code = running.wait(LIMIT)?;
        ensure!(code == 137, "exit code {code}");
        // Twice does no harm.
        pod.stop()?;
        pod.remove()?;

        // By force, without a stop of anything.
        let pod = Pod::run(node, "by-force")?;
        let running = pod.start_script("running", "sleep 1000")?;
        running.remove()?;
        pod.remove()?;

        // The name is free again, for a pod without containers.
        Pod::run(node, "by-force")?.remove()
    })
}

#[test]
fn the_host_has_back_what_a_removed_container_used() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "gone")?;
        let keeper = pod.start_script("keeper", "exec sleep 1000")?;
        keeper.shell("ls -lR /etc > /dev/null")?;
        let open = || anyhow::Ok(procs::vmm(&pod.id)?.files()?.len());
        let before = open()?;
        // A container that ends and comes again, as one that crashes does.
        for attempt in 0..3 {
            let script = "mkdir /d; cd /d; seq 500 | xargs touch; echo made; sleep 1000";
            let mut config = pod.container("main", script);
            config.metadata.mut_or_insert_default().attempt = attempt;
            config.log_path = format!("main-{attempt}.log");
            let main = pod.start(&config)?;
            main.wait_for_log("made\n", LIMIT)?;
            let used = open()?;
            ensure!(used > before + 500, "{used} open, {before} before");
            main.stop(0)?;
            main.remove()?;
            // An open file keeps its mount and, if it is removed, its space on the disk.
            until("files closed", Duration::from_secs(20), || {
                Ok((open()? <= before + 20).then_some(()))
            })?;
        }
        pod.remove()
    })
}

#[test]
fn a_container_without_limits_has_those_of_a_node() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "limits")?;
        let container = pod.start_script("main", "exec sleep 1000")?;
        // As where containerd runs without limits of its own.
        for (line, limits) in [
            ("Max open files", ["1048576", "1048576"]),
            ("Max processes", ["unlimited", "unlimited"]),
        ] {
            let told = container.shell(&format!("grep '^{line}' /proc/self/limits"))?;
            let words: Vec<_> = told.split_whitespace().collect();
            ensure!(words.windows(2).any(|pair| pair == limits), "{told}");
        }
        pod.remove()
    })
}

#[test]
fn containers_of_a_pod_may_share_their_processes() -> Outcome {
    pod_scenario(|node| {
        let pod = Spec::new("together").with_shared_processes().run(node)?;
        let one = pod.start_script("one", "exec sleep 12345")?;
        let two = pod.start_script("two", "exec sleep 54321")?;
        let seen = two.shell("ps -o pid,args")?;
        ensure!(
            seen.contains("sleep 12345") && seen.contains("sleep 54321"),
            "{seen}"
        );
        two.shell("kill -9 $(ps -o pid,args | awk '/[s]leep 12345/ { print $1 }')")?;
        let code = one.wait(LIMIT)?;
        ensure!(code == 137, "exit code {code}");
        pod.remove()?;

        let pod = Pod::run(node, "apart")?;
        pod.start_script("one", "exec sleep 12345")?;
        let two = pod.start_script("two", "exec sleep 54321")?;
        let seen = two.shell("ps -o pid,args")?;
        ensure!(!seen.contains("sleep 12345"), "{seen}");
        let first = two.shell("cat /proc/1/cmdline | tr '\\0' ' '")?;
        ensure!(first.starts_with("sleep 54321"), "{first}");
        pod.remove()
    })
}
