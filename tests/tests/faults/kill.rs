// SPDX-License-Identifier: Apache-2.0
//! kill -9 of every process behind a container, and of the guest itself, at several moments.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::bundle::Bundle;
use tests::containerd::{Containerd, Options};
use tests::ctr::{Ctr, LIMIT};
use tests::process::Running;
use tests::procs;
use tests::scenario::{Outcome, scenario, vm_scenario};
use tests::slow_fs::SlowFs;
use tests::wait::until;

/// Where containerd keeps the bundles of running containers.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/default";

/// A container that was up, in the foreground, with an exec beside it.
struct Victim {
    container: Running,
    exec: Running,
}

impl Victim {
    fn start(ctr: &Ctr, id: &str) -> Result<Self> {
        let up = ["sh", "-c", "echo up; exec sleep 1000"];
        let container = ctr.start_run(&[], id, &up)?;
        container.wait_for_stdout("up", LIMIT)?;
        let exec = ctr.start_exec(&[], id, "beside", &up)?;
        exec.wait_for_stdout("up", LIMIT)?;
        Ok(Self { container, exec })
    }

    /// Both clients learn of the end, and the same name runs again.
    fn has_ended(self, ctr: &Ctr, id: &str) -> Result<()> {
        let output = self
            .container
            .finish(LIMIT)
            .context("`ctr run` of the killed")?;
        ensure!(output.code != Some(0), "{output}\nexpected a failure");
        let output = self
            .exec
            .finish(LIMIT)
            .context("`ctr task exec` beside the killed")?;
        ensure!(output.code != Some(0), "{output}\nexpected a failure");
        works_again(ctr, id)
    }
}

fn works_again(ctr: &Ctr, id: &str) -> Result<()> {
    // containerd forgets a task whose shim died a moment after it has told of its end.
    let output = until("the name to be free", LIMIT, || {
        let output = ctr.run_script(&[], id, "echo again")?;
        let taken = String::from_utf8_lossy(&output.stderr).contains("already exists");
        Ok((!taken).then_some(output))
    })?;
    let output = output.quietly().context("the next `ctr run`")?;
    ensure!(output.text() == "again", "{output}");
    Ok(())
}

#[test]
fn the_shim() -> Outcome {
    scenario(|ctr| {
        let id = "kill-shim";
        let victim = Victim::start(ctr, id)?;
        procs::shim(id)?.kill()?;
        victim.has_ended(ctr, id)
    })
}

#[test]
fn the_vmm() -> Outcome {
    vm_scenario("the_vmm", |ctr| {
        let id = "kill-vmm";
        let victim = Victim::start(ctr, id)?;
        procs::vmm(id)?.kill()?;
        victim.has_ended(ctr, id)
    })
}

#[test]
fn a_guest_that_hangs() -> Outcome {
    vm_scenario("a_guest_that_hangs", |ctr| {
        let id = "kill-hung";
        let victim = Victim::start(ctr, id)?;
        procs::vmm(id)?.stop()?;
        // The guest is asked first, and has half a minute to answer.
        ctr.call(&["task", "kill", "-s", "SIGKILL", id])?;
        victim.has_ended(ctr, id)
    })
}

#[test]
fn the_shim_and_the_vmm_of_a_detached_container() -> Outcome {
    vm_scenario("the_shim_and_the_vmm_of_a_detached_container", |ctr| {
        let kill_vmm: fn(&str) -> Result<procs::Process> = procs::vmm;
        // The same name again and again: what one leaves is in the way of the next. containerd runs
        // `delete` while the killed are still being reaped, so one try would prove little.
        let id = "killed";
        for victim in [kill_vmm, procs::shim, procs::shim, procs::shim, procs::shim] {
            ctr.run_detached(&[], id, &["sleep", "1000"])?;
            victim(id)?.kill()?;
            // A dead shim takes the task with it, once containerd has cleaned up after it and its
            // bundle is gone; a dead VMM leaves a stopped one to delete.
            let bundle = Path::new(BUNDLES).join(id);
            until("containerd to learn of the end", LIMIT, || {
                let ended = match ctr.task(id)? {
                    Some(task) => task.status == "STOPPED",
                    None => !bundle.exists(),
                };
                Ok(ended.then_some(()))
            })?;
            ctr.call(&["task", "delete", id])?;
            ctr.call(&["container", "delete", id])?.quietly()?;
        }
        works_again(ctr, id)
    })
}

#[test]
fn the_guest_s_kernel() -> Outcome {
    vm_scenario("the_guest_s_kernel", |ctr| {
        // A panic, without a debugging kernel: running out of the container's memory is made one.
        let id = "kill-guest";
        let script = "echo 2 > /proc/sys/vm/panic_on_oom && echo up && exec tail /dev/zero";
        let bundle = Bundle::new(ctr, script)?
            .privileged(&[])
            .with(json!({ "linux": {
                "cgroupsPath": format!("/default/{id}"),
                "resources": { "memory": { "limit": 32 << 20 } },
            }}));
        let running = ctr.start_config(&bundle.write()?, id)?;
        running.wait_for_stdout("up", LIMIT)?;
        let output = running.finish(LIMIT)?;
        ensure!(output.code != Some(0), "{output}\nexpected a failure");
        works_again(ctr, id)
    })
}

/// A volume that hangs takes nothing else along: the other files go on, and a guest that dies has
/// ended, though its device still waits for the host.
#[test]
fn the_guest_s_kernel_while_a_volume_hangs() -> Outcome {
    vm_scenario("the_guest_s_kernel_while_a_volume_hangs", |ctr| {
        const HANG: usize = 10;
        let id = "kill-hung-volume";
        let folder = tempfile::tempdir_in("/run")?;
        let slow = SlowFs::mount(&folder.path().join("volume"))?;
        let script = format!(
            "echo 2 > /proc/sys/vm/panic_on_oom; for n in $(seq 50); do ls / & done > /dev/null; wait; \
             for n in $(seq {HANG}); do ls /volume/slow$n & done; \
             until test -e /now; do sleep 0.1; done; echo served; \
             until test -e /end; do sleep 0.1; done; exec tail /dev/zero"
        );
        let bundle = Bundle::new(ctr, &script)?
            .privileged(&[])
            .with_mount(json!({
                "destination": "/volume", "type": "bind", "source": folder.path().join("volume"),
                "options": ["rbind", "rw"],
            }))
            .with(json!({ "linux": {
                "cgroupsPath": format!("/default/{id}"),
                "resources": { "memory": { "limit": 32 << 20 } },
            }}));
        let running = ctr.start_config(&bundle.write()?, id)?;
        until("all that shall hang", LIMIT, || {
            Ok((slow.waiting() == HANG).then_some(()))
        })?;
        fs::write(bundle.root().join("now"), "")?;
        running.wait_for_stdout("served", LIMIT)?;
        fs::write(bundle.root().join("end"), "")?;
        let output = running.finish(LIMIT)?;
        ensure!(output.code != Some(0), "{output}\nexpected a failure");
        slow.release();
        works_again(ctr, id)
    })
}

#[test]
fn the_shim_while_it_starts() -> Outcome {
    scenario(|ctr| {
        let id = "kill-early-shim";
        let running = ctr.start_run(&[], id, &["sleep", "1000"])?;
        let shim = until("a shim", LIMIT, || Ok(procs::shim(id).ok()))?;
        shim.kill()?;
        let output = running.finish(LIMIT)?;
        ensure!(output.code != Some(0), "{output}\nexpected a failure");
        ctr.sweep()?;
        works_again(ctr, id)
    })
}

#[test]
fn the_vmm_while_it_boots() -> Outcome {
    vm_scenario("the_vmm_while_it_boots", |ctr| {
        let id = "kill-early-vmm";
        let running = ctr.start_run(&[], id, &["sleep", "1000"])?;
        let vmm = until("a VMM", LIMIT, || Ok(procs::vmm(id).ok()))?;
        vmm.kill()?;
        let output = running.finish(LIMIT)?;
        output.one_line(&["virtual machine monitor"])?;
        ensure!(
            output.elapsed < Duration::from_secs(15),
            "{output}\nexpected at once"
        );
        works_again(ctr, id)
    })
}

#[test]
fn the_client() -> Outcome {
    scenario(|ctr| {
        let id = "kill-client";
        let script = "echo up; while :; do echo output; sleep 0.1; done";
        let running = ctr.start_run(&[], id, &["sh", "-c", script])?;
        running.wait_for_stdout("up", LIMIT)?;
        drop(running); // Kills `ctr`, the reader of the output.
        ensure!(
            ctr.task(id)?.is_some_and(|task| task.status == "RUNNING"),
            "died with its client"
        );
        ctr.exec(&[], id, "alive", &["true"])?.quietly()?;
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ensure!(ctr.delete(id)? == 137, "exit code of the killed");
        works_again(ctr, id)
    })
}

#[test]
fn containerd_comes_back_to_its_containers() -> Outcome {
    scenario(|ctr| {
        let mut containerd = Containerd::start(ctr, &Options::default())?;
        let ctr = containerd.ctr().clone();
        let id = "kill-containerd";
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        let before = ctr.task(id)?;
        containerd.kill()?;
        containerd.restart()?;
        ensure!(
            ctr.task(id)? == before,
            "{:?}, before {before:?}",
            ctr.task(id)?
        );
        ctr.exec(&[], id, "alive", &["true"])?.quietly()?;
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ensure!(ctr.delete(id)? == 137, "exit code of the killed");
        Ok(())
    })
}
