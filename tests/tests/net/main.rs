// SPDX-License-Identifier: Apache-2.0
//! The virtio-net device under a real guest kernel.
//!
//! One static binary in three roles, as the suite `vsock`: the suite, the VMM process, and the
//! guest's init. The taps are in a network namespace that the suite makes for itself.

mod guest;
mod scenarios;
mod wire;

use std::process::ExitCode;
use std::time::Instant;
use std::{env, process};

use anyhow::{Context, Result};
use tests::sys;

use wire::{Plan, Wire};

/// What a run is asked for; other arguments of test programs are of no use here.
#[derive(Debug, Default)]
struct Arguments {
    /// Run only scenarios with this in their full names (`machine::scenario`).
    filter: Option<String>,
    /// Show the guest's console.
    console: bool,
}

fn main() -> ExitCode {
    if process::id() == 1 {
        guest::run();
    }
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = if arguments.first().is_some_and(|role| role == "vmm") {
        vmm::process::run().context("vmm").map(|()| true)
    } else {
        suite(&parse(arguments))
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("net: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: Vec<String>) -> Arguments {
    let mut parsed = Arguments::default();
    for argument in arguments {
        if argument == "--console" {
            parsed.console = true;
        } else if !argument.starts_with('-') {
            parsed.filter = Some(argument);
        }
    }
    parsed
}

/// Whether all scenarios on all machines passed.
fn suite(arguments: &Arguments) -> Result<bool> {
    sys::leave_network().context("can't leave the host's network")?;
    let mut failed = Vec::new();
    let mut count = 0_usize;
    for plan in scenarios::PLANS {
        let chosen: Vec<_> = plan
            .scenarios
            .iter()
            .copied()
            .flatten()
            .map(|(name, scenario)| (format!("{}::{name}", plan.name), scenario))
            .filter(|(name, _)| {
                let filter = arguments.filter.as_deref();
                filter.is_none_or(|filter| name.contains(filter))
            })
            .collect();
        if chosen.is_empty() {
            continue;
        }
        count = count.saturating_add(chosen.len());
        if let Err(error) = machine(plan, &chosen, arguments.console, &mut failed) {
            println!("test {} ... FAILED\n    {error:#}", plan.name);
            failed.push(plan.name.to_owned());
        }
    }
    println!("{count} scenarios, failed: {failed:?}");
    Ok(count > 0 && failed.is_empty())
}

/// Runs the scenarios of one machine.
fn machine(
    plan: &Plan,
    chosen: &[(String, &wire::Scenario)],
    console: bool,
    failed: &mut Vec<String>,
) -> Result<()> {
    let begin = Instant::now();
    let mut wire = Wire::new(plan, console)?;
    let seconds = begin.elapsed().as_secs_f64();
    println!("machine {} ready after {seconds:.1} s", plan.name);
    for (name, scenario) in chosen {
        let begin = Instant::now();
        let result = scenario(&mut wire);
        let seconds = begin.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("test {name} ... ok ({seconds:.2} s)"),
            Err(error) => {
                println!("test {name} ... FAILED\n    {error:#}");
                failed.push(name.clone());
            }
        }
    }
    wire.machine.power_off().context("powering off")
}
