// SPDX-License-Identifier: Apache-2.0
//! The virtio-vsock device under a real guest kernel.
//!
//! One static binary in three roles: the suite; the VMM process of its machine (argument `vmm`);
//! and, as the only program of that machine's image, the guest's init with services to talk to.
//! The scenarios share one machine, in order, as a pod's life would have them.

mod guest;
mod scenarios;
mod stream;

use std::process::{self, ExitCode};
use std::time::Instant;

use anyhow::Result;
use tests::harness::{self, Suite};
use tests::machine::{Machine, Setup};

fn main() -> ExitCode {
    if process::id() == 1 {
        guest::run();
    }
    harness::main("vsock", run)
}

fn run(suite: &mut Suite) -> Result<()> {
    let begin = Instant::now();
    let mut machine = Machine::start(Setup {
        console: suite.console,
        ..Setup::default()
    })?;
    println!("guest ready after {:.1} s", begin.elapsed().as_secs_f64());
    for (name, scenario) in scenarios::ALL {
        suite.run(name, || scenario(&machine));
    }
    suite.run("the_guest_powers_off", || machine.power_off());
    Ok(())
}
