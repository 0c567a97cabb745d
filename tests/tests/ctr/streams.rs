// SPDX-License-Identifier: Apache-2.0
//! The streams of processes, moved by the monitor: what holds for `ctr run` and `ctr task exec` by
//! calls to the agent holds then, too.

use anyhow::{Context, Result, ensure};
use rustix::process::{Signal, kill_process};
use tests::configured::Configured;
use tests::ctr::{Ctr, LIMIT};
use tests::descriptors::{Descriptors, expect_no_more};
use tests::procs;
use tests::scenario::{Outcome, vm_scenario};

use crate::{exec, run};

const PASSED: &str = "[runtime]\nuse_passfd_io = true\n";

/// A scenario of another module.
type Body = fn(&Ctr) -> Result<()>;

const BODIES: &[(&str, Body)] = &[
    ("exit codes", run::exit_codes),
    ("a killed container", run::killed),
    ("input", run::input),
    ("two streams", run::two_streams),
    ("a terminal", run::terminal),
    ("an exec's basics", exec::basics),
    ("an exec's input", exec::input),
    ("an exec's terminal", exec::terminal),
    ("a missing command", exec::missing_command),
    ("a background child", exec::background_child),
    ("a signal to an exec", exec::signal),
];

#[test]
fn streams_that_are_passed_behave_as_those_by_calls() -> Outcome {
    let name = "streams_that_are_passed_behave_as_those_by_calls";
    vm_scenario(name, |ctr| {
        let host = Configured::with(ctr, PASSED)?;
        for (name, body) in BODIES {
            body(host.ctr()).with_context(|| format!("passed: {name}"))?;
        }
        Ok(())
    })
}

#[test]
fn what_a_client_leaves_holds_up_nobody_else() -> Outcome {
    vm_scenario("what_a_client_leaves_holds_up_nobody_else", |ctr| {
        let host = Configured::with(ctr, PASSED)?;
        let ctr = host.ctr();
        let id = "left";
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        // What is opened at first use stays: the programs, too.
        let script = "head -c 1 /dev/zero; echo end >&2";
        ctr.exec(&[], id, "first", &["sh", "-c", script])?;
        ctr.exec(&[], id, "second", &["echo"])?;
        let mut before = Vec::new();
        for process in [procs::shim(id)?, procs::vmm(id)?] {
            let descriptors = Descriptors::of(&process)?;
            before.push((process, descriptors));
        }
        // It says more than all pipes and windows on the way hold, and is not heard.
        let script = "head -c 4000000 /dev/zero; echo end >&2";
        let deaf = ctr.start_exec(&[], id, "deaf", &["sh", "-c", script])?;
        kill_process(deaf.pid(), Signal::STOP)?;
        let output = ctr.exec(&[], id, "other", &["echo", "heard"])?.quietly()?;
        ensure!(output.text() == "heard", "{output}");
        kill_process(deaf.pid(), Signal::CONT)?;
        let output = deaf.finish(LIMIT)?.exits(0)?;
        ensure!(output.stdout.len() == 4_000_000, "{}", output.stdout.len());
        expect_no_more(&before, LIMIT)?;
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id)?;
        Ok(())
    })
}
