// SPDX-License-Identifier: Apache-2.0
//! Many pods, and a slow one.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tests::cri::LIMIT;
use tests::cri::messages::Mount;
use tests::node::Node;
use tests::pod::{Container, Pod};
use tests::procs::Process;
use tests::scenario::{Outcome, pod_scenario, pod_vm_scenario};
use tests::slow_fs::SlowFs;
use tests::wait::until;

/// Workers, and pods of each.
const WORKERS: usize = 4;
const EACH: usize = 25;

/// How long a create is held up.
const SLOW: Duration = Duration::from_secs(10);
/// How much longer a neighbour may wait for an answer meanwhile.
const MORE: Duration = Duration::from_millis(50);
const SAMPLES: usize = 15;
/// A machine that others use as well may stumble once; a shim that waits for a guest does so always.
const ROUNDS: usize = 3;

#[test]
fn a_hundred_pods_leave_nothing() -> Outcome {
    pod_scenario(|node| {
        // What containerd opens for the first ones, it keeps.
        live_and_die(node, "warm", 1)?;
        let containerd = Process::read(node.containerd().pid()).context("no containerd")?;
        let before = containerd.files()?.len();
        live_and_die(node, "pod", EACH)?;
        let mut after = Vec::new();
        until("containerd's files", LIMIT, || {
            after = containerd.files()?;
            Ok((after.len() <= before).then_some(()))
        })
        .with_context(|| format!("{before} were open, now {}: {after:#?}", after.len()))?;
        let leases = node.networks().leases()?;
        ensure!(leases.is_empty(), "addresses still given: {leases:?}");
        Ok(())
    })
}

/// `each` pods one after the other, by several workers at once.
fn live_and_die(node: &Node, name: &str, each: usize) -> Result<()> {
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                scope.spawn(move || {
                    for number in 0..each {
                        let name = format!("{name}-{worker}-{number}");
                        one_life(node, &name).with_context(|| name)?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| anyhow::anyhow!("panicked"))?)
    })
}

fn one_life(node: &Node, name: &str) -> Result<()> {
    let pod = Pod::run(node, name)?;
    let container = pod.start_script("main", "ip -4 addr show dev eth0")?;
    let code = container.wait(LIMIT)?;
    let log = container.log("stdout")?;
    let [address, _] = pod.addresses()?;
    ensure!(
        code == 0 && log.contains(&address),
        "exit code {code}: {log}"
    );
    pod.remove()
}

#[test]
fn a_slow_create_delays_nobody_else() -> Outcome {
    // Beside a create of runc's shim, the statistics of its other containers wait for it.
    pod_vm_scenario("a_slow_create_delays_nobody_else", |node| {
        let point = node.containerd().folder().join("slow");
        let slow = SlowFs::mount(&point)?;
        let pod = Pod::run(node, "slow")?;
        let neighbour = pod.start_script("neighbour", "exec sleep 1000")?;
        let mut usual = answers(node, &neighbour)?;

        let mut config = pod.container("slow", "ls /slow");
        config.mounts.push(Mount {
            container_path: "/slow".to_owned(),
            host_path: slow.folder().display().to_string(),
            ..Default::default()
        });
        let (meanwhile, created) = thread::scope(|scope| -> Result<_> {
            // A task is created when its container is started.
            let creating = scope.spawn(|| pod.start(&config));
            let measured = (|| {
                slow.wait_for_a_runtime(LIMIT, || creating.is_finished())?;
                let begin = Instant::now();
                let mut meanwhile = answers(node, &neighbour)?;
                for _ in 1..ROUNDS {
                    if slower(&meanwhile, &usual).is_none() {
                        break;
                    }
                    meanwhile = answers(node, &neighbour)?;
                }
                neighbour.shell("true").context("an exec meanwhile")?;
                neighbour.stop(0).context("a kill meanwhile")?;
                ensure!(neighbour.wait(LIMIT)? == 137, "the neighbour's exit code");
                until("the end of a slow time", LIMIT, || {
                    Ok((begin.elapsed() >= SLOW).then_some(()))
                })?;
                ensure!(!creating.is_finished(), "the slow create was not slow");
                Ok(meanwhile)
            })();
            slow.release();
            let created = creating.join().map_err(|_| anyhow::anyhow!("panicked"))?;
            match (measured, created) {
                (Ok(measured), Ok(created)) => Ok((measured, created)),
                (Err(error), Ok(_)) => Err(error),
                (Ok(_), Err(error)) => Err(error),
                (Err(error), Err(cause)) => Err(error.context(format!("{cause:#}"))),
            }
        })?;
        let code = created.wait(LIMIT)?;
        ensure!(code == 0, "the slow container's exit code is {code}");

        // The machine may be busier now than it was before.
        let again = pod.start_script("again", "exec sleep 1000")?;
        let after = answers(node, &again)?;
        for (usual, after) in usual.iter_mut().zip(after) {
            *usual = after.max(*usual);
        }
        if let Some(words) = slower(&meanwhile, &usual) {
            bail!("{words}");
        }
        pod.remove()
    })
}

/// What takes longer than it may beside a slow create, in words.
fn slower(meanwhile: &Answers, usual: &Answers) -> Option<String> {
    let names = ["state", "stats", "kill"].into_iter();
    let mut all = names.zip(meanwhile.iter().zip(usual));
    all.find_map(|(name, (meanwhile, usual))| {
        println!("{name}: {meanwhile:.1?} beside a slow create, {usual:.1?} without");
        (meanwhile.saturating_sub(*usual) > MORE)
            .then(|| format!("{name}: {meanwhile:.1?} beside a slow create, {usual:.1?} without"))
    })
}

/// Of state, statistics and a signal.
type Answers = [Duration; 3];

/// How long a shim takes to tell a state, statistics, and to send a signal: medians.
fn answers(node: &Node, container: &Container) -> Result<Answers> {
    let id = container.id.as_str();
    let calls: [&dyn Fn() -> Result<()>; 3] =
        [&|| node.state(id), &|| node.metrics(id).map(drop), &|| {
            node.nudge(id)
        }];
    let mut times: [Vec<Duration>; 3] = Default::default();
    for _ in 0..SAMPLES {
        for (call, times) in calls.iter().zip(&mut times) {
            let begin = Instant::now();
            call()?;
            times.push(begin.elapsed());
        }
    }
    Ok(times.map(|mut times| {
        times.sort();
        times.get(SAMPLES / 2).copied().unwrap_or_default()
    }))
}
