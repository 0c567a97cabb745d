// SPDX-License-Identifier: Apache-2.0
//! Machines of every size, every way in which a guest can end, disks that the guest may change and
//! some that come and go, and machines whose size changes, under a real guest kernel.
//!
//! One static binary in three roles, as the suite `vsock`: the suite, the VMM process of its
//! machines, and the guest's init.

mod disk;
mod generation;
mod guest;
mod hotplug;
mod size;

use std::io::Write;
use std::process::{self, ExitCode};

use anyhow::{Result, ensure};
use tests::harness::{self, Suite};
use tests::machine::{Machine, Setup};
use tests::pattern::read_line;
use vmm::control::ExitReason;

/// The guest's vsock port for one line: what it is to tell, or how to end.
const CONTROL: u32 = 100;
/// Tells the CPUs that a thread of the guest ran on.
const CPUS: &str = "cpus";
/// Has the guest use its second disk and tell how it went.
const DISK: &str = "disk";
/// Has the guest bring up CPUs, until there are as many as follow; then as `CPUS`.
const ONLINE: &str = "online";
/// Has the guest tell when it draws new random numbers.
const GENERATION: &str = "generation";
/// Has the guest look after disks that come and go.
const HOTPLUG: &str = "hotplug";
const POWER_OFF: &str = "power off";
const RESTART: &str = "restart";
/// The guest's kernel has no use for a system without an init.
const EXIT: &str = "exit";

/// A machine, and its end.
struct Case {
    name: &'static str,
    vcpus: u8,
    parameters: &'static str,
    command: &'static str,
    reason: ExitReason,
    /// What the guest's console must show in the end.
    last_words: &'static str,
}

const CASES: [Case; 6] = [
    Case {
        name: "one_cpu_powered_off",
        vcpus: 1,
        parameters: "",
        command: POWER_OFF,
        reason: ExitReason::Shutdown,
        last_words: "",
    },
    Case {
        name: "one_cpu_restarted",
        vcpus: 1,
        parameters: "",
        command: RESTART,
        reason: ExitReason::Reboot,
        last_words: "",
    },
    Case {
        name: "two_cpus_in_a_panic",
        vcpus: 2,
        parameters: "",
        command: EXIT,
        reason: ExitReason::Panic,
        last_words: "Kernel panic - not syncing: Attempted to kill init!",
    },
    Case {
        name: "one_cpu_in_a_triple_fault",
        vcpus: 1,
        // The kernel then restarts by a fault for which it has removed all handlers.
        parameters: "reboot=triple",
        command: RESTART,
        reason: ExitReason::TripleFault,
        last_words: "",
    },
    Case {
        name: "four_cpus_powered_off",
        vcpus: 4,
        parameters: "",
        command: POWER_OFF,
        reason: ExitReason::Shutdown,
        last_words: "",
    },
    Case {
        name: "thirty_two_cpus_powered_off",
        vcpus: 32,
        parameters: "",
        command: POWER_OFF,
        reason: ExitReason::Shutdown,
        last_words: "",
    },
];

fn main() -> ExitCode {
    if process::id() == 1 {
        // It returns only where its end is wanted.
        guest::run();
        return ExitCode::FAILURE;
    }
    harness::main("machine", run)
}

fn run(suite: &mut Suite) -> Result<()> {
    for case in CASES {
        suite.run(case.name, || boot_and_end(&case));
    }
    suite.run(disk::NAME, disk::run);
    suite.run(generation::NAME, generation::run);
    suite.run("cpus_come_and_go_under_load", size::vcpus);
    suite.run("memory_comes_and_goes", size::memory);
    suite.run(hotplug::COME_AND_GO, hotplug::come_and_go);
    suite.run(hotplug::IN_USE, hotplug::in_use);
    Ok(())
}

fn boot_and_end(case: &Case) -> Result<()> {
    let mut machine = Machine::start(Setup {
        vcpus: case.vcpus,
        parameters: case.parameters,
        ..Setup::default()
    })?;
    let mut control = machine.connect(CONTROL)?;
    writeln!(control, "{CPUS}")?;
    let cpus = read_line(&mut control)?;
    let expected: Vec<_> = (0..case.vcpus).map(|cpu| cpu.to_string()).collect();
    let expected = expected.join(" ");
    ensure!(
        cpus.trim() == expected,
        "the guest has CPUs {cpus:?}, not {expected}"
    );

    writeln!(machine.connect(CONTROL)?, "{}", case.command)?;
    let ended = machine.ended()?;
    ensure!(ended.reason == case.reason, "{ended}");
    ensure!(ended.console.contains(case.last_words), "{ended}");
    Ok(())
}
