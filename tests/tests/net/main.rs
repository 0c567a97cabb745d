// SPDX-License-Identifier: Apache-2.0
//! The virtio-net device under a real guest kernel.
//!
//! One static binary in three roles, as the suite `vsock`: the suite, the VMM process, and the
//! guest's init. The taps are in a network namespace that the suite makes for itself.

mod guest;
mod scenarios;
mod wire;

use std::process::{self, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use tests::harness::{self, Suite};
use tests::sys;

use wire::{Plan, Wire};

fn main() -> ExitCode {
    if process::id() == 1 {
        guest::run();
    }
    harness::main("net", run)
}

/// All scenarios on all machines.
fn run(suite: &mut Suite) -> Result<()> {
    sys::leave_network().context("can't leave the host's network")?;
    for plan in scenarios::PLANS {
        let all = plan.scenarios.iter().copied().flatten();
        let chosen: Vec<_> = all
            .map(|(name, scenario)| (format!("{}::{name}", plan.name), scenario))
            .filter(|(name, _)| suite.wants(name))
            .collect();
        if !chosen.is_empty() {
            let begin = Instant::now();
            let result = machine(plan, &chosen, suite);
            suite.record(plan.name, begin, result);
        }
    }
    Ok(())
}

/// Runs the scenarios of one machine.
fn machine(plan: &Plan, chosen: &[(String, &wire::Scenario)], suite: &mut Suite) -> Result<()> {
    let begin = Instant::now();
    let mut wire = Wire::new(plan, suite.console)?;
    let seconds = begin.elapsed().as_secs_f64();
    println!("machine {} ready after {seconds:.1} s", plan.name);
    for (name, scenario) in chosen {
        suite.run(name, || scenario(&mut wire));
    }
    wire.machine.power_off().context("powering off")
}
