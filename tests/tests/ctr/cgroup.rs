// SPDX-License-Identifier: Apache-2.0
//! Where a sandbox's processes are counted on the host.

use std::path::Path;

use anyhow::{Result, ensure};
use tests::configured::Configured;
use tests::ctr::{Ctr, LIMIT};
use tests::procs;
use tests::scenario::{Outcome, vm_scenario};
use tests::wait::until;

/// Where shim and monitor of a container are.
fn places(id: &str) -> Result<[String; 2]> {
    Ok([procs::shim(id)?.cgroup()?, procs::vmm(id)?.cgroup()?])
}

fn end(ctr: &Ctr, id: &str) -> Result<()> {
    ctr.kill(id, "SIGKILL")?;
    ctr.wait_for_status(id, "STOPPED", LIMIT)?;
    ctr.delete(id)?;
    Ok(())
}

fn is_gone(cgroup: &str) -> Result<()> {
    let path = format!("/sys/fs/cgroup{cgroup}");
    ensure!(!Path::new(&path).exists(), "{path} is left");
    Ok(())
}

#[test]
fn a_container_s_machine_and_shim_are_in_its_cgroup() -> Outcome {
    vm_scenario("a_container_s_machine_and_shim_are_in_its_cgroup", |ctr| {
        let id = "counted";
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        let [shim, vmm] = places(id)?;
        ensure!(shim.ends_with("/counted") && shim == vmm, "{shim}, {vmm}");
        end(ctr, id)?;
        is_gone(&vmm)
    })
}

#[test]
fn the_shim_may_be_counted_apart() -> Outcome {
    vm_scenario("the_shim_may_be_counted_apart", |ctr| {
        let text = "[runtime]\nsandbox_cgroup_only = false\n";
        let configured = Configured::with(ctr, text)?;
        let (ctr, id) = (configured.ctr(), "apart");
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        let [shim, vmm] = places(id)?;
        ensure!(shim.starts_with("/kata_overhead/apart"), "{shim}");
        ensure!(vmm.ends_with("/apart") && vmm != shim, "{vmm}");
        // Neither stays when the shim can't see to it.
        procs::shim(id)?.kill()?;
        until("the end of both cgroups", LIMIT, || {
            Ok((is_gone(&shim).is_ok() && is_gone(&vmm).is_ok()).then_some(()))
        })?;
        // A dead shim takes the task with it.
        until("the end of the task", LIMIT, || {
            Ok(ctr.task(id)?.is_none().then_some(()))
        })?;
        ctr.call(&["container", "delete", id])?.quietly()?;
        Ok(())
    })
}
