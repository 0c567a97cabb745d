// SPDX-License-Identifier: Apache-2.0
//! The virtio-vsock device under a real guest kernel.
//!
//! One static binary in three roles: the suite; the VMM process of its machine (argument `vmm`);
//! and, as the only program of that machine's image, the guest's init with services to talk to.
//! The scenarios share one machine, in order, as a pod's life would have them.

mod guest;
mod scenarios;
mod stream;

use std::process::ExitCode;
use std::time::Instant;
use std::{env, process};

use anyhow::{Context, Result};
use tests::machine::{Machine, Setup};

/// What a run is asked for; other arguments of test programs are of no use here.
#[derive(Debug, Default)]
struct Arguments {
    /// Run only scenarios with this in their names.
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
            eprintln!("vsock: {error:#}");
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

/// Whether all scenarios passed.
fn suite(arguments: &Arguments) -> Result<bool> {
    let begin = Instant::now();
    let mut machine = Machine::start(Setup {
        console: arguments.console,
        ..Setup::default()
    })?;
    println!("guest ready after {:.1} s", begin.elapsed().as_secs_f64());
    let mut failed = Vec::new();
    let chosen = |name: &str| {
        let filter = arguments.filter.as_deref();
        filter.is_none_or(|filter| name.contains(filter))
    };
    for (name, scenario) in scenarios::ALL {
        if !chosen(name) {
            continue;
        }
        let begin = Instant::now();
        match scenario(&machine) {
            Ok(()) => println!(
                "test {name} ... ok ({:.2} s)",
                begin.elapsed().as_secs_f64()
            ),
            Err(error) => {
                failed.push(name);
                println!("test {name} ... FAILED\n    {error:#}");
            }
        }
    }
    if let Err(error) = machine.power_off() {
        println!("test the_guest_powers_off ... FAILED\n    {error:#}");
        failed.push("the_guest_powers_off");
    }
    println!("failed: {failed:?}");
    Ok(failed.is_empty())
}
