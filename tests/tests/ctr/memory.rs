// SPDX-License-Identifier: Apache-2.0
//! The memory that a machine holds on the host.

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::procs;
use tests::scenario::{Outcome, vm_scenario};
use tests::wait::until;

/// MiB that the container writes, and of them those that the host must see come and go: the
/// guest's free memory is reported by whole blocks of 2 MiB, and a page in use keeps its block: 4 to
/// 34 MiB were seen to stay.
const FILLED: u64 = 300;
const SEEN: u64 = 240;

/// Linux reports every 2 s, and what is freed meanwhile in the next round.
const REPORTED: Duration = Duration::from_secs(30);

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() -> Outcome {
    vm_scenario("memory_that_the_guest_frees_goes_back_to_the_host", |ctr| {
        let id = "frees";
        let mount = "type=tmpfs,src=tmpfs,dst=/fill,options=size=512m";
        ctr.run_detached(&["--mount", mount], id, &["sleep", "1000"])?;
        let vmm = procs::vmm(id)?;
        let held = || anyhow::Ok(vmm.kilobytes("status", "VmRSS")? >> 10);
        // More than once: the guest uses again what it gave away.
        for round in ["first", "second"] {
            let file = format!("/fill/{round}");
            let script = format!("dd if=/dev/zero of={file} bs=1M count={FILLED} 2>&1");
            let exec = ctr.exec(&[], id, &format!("fill-{round}"), &["sh", "-c", &script]);
            exec?.exits(0)?;
            let full = held()?;
            ensure!(
                full >= FILLED,
                "{round}: with {FILLED} MiB in use, the monitor holds {full} MiB"
            );
            let exec = ctr.exec(&[], id, &format!("free-{round}"), &["rm", &file]);
            exec?.quietly()?;
            let mut last = full;
            until("memory back from the guest", REPORTED, || {
                last = held()?;
                Ok((last.saturating_add(SEEN) <= full).then_some(()))
            })
            .with_context(|| format!("{round}: {full} MiB before, {last} MiB now"))?;
        }
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", tests::ctr::LIMIT)?;
        ctr.delete(id)?;
        Ok(())
    })
}
