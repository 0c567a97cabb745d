// SPDX-License-Identifier: Apache-2.0
//! The frame of each end-to-end test: alone on the machine, and nothing left behind.

use std::fmt;
use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result, bail};

use crate::autopsy;
use crate::ctr::Ctr;
use crate::leaks::Snapshot;
use crate::node::Node;

/// Held while a scenario runs: in one process by its tests' threads, and between processes.
const LOCK: &str = "/run/lock/nutshell-tests";

/// Runs `body`, then checks that the host holds nothing that it didn't hold before.
pub fn scenario(body: impl FnOnce(&Ctr) -> Result<()>) -> Outcome {
    let run = || {
        let _alone = alone()?;
        let ctr = Ctr::from_env();
        framed(&ctr, || body(&ctr), || ctr.sweep())
    };
    run().map_err(Failure)
}

/// The same for pods: on a node, with its CRI.
pub fn pod_scenario(body: impl FnOnce(&Node) -> Result<()>) -> Outcome {
    let run = || {
        // Before the lock: one node serves the tests that wait for it as well.
        let node = Node::shared()?;
        let _alone = alone()?;
        framed(node.ctr(), || body(&node), || node.sweep()).with_context(|| autopsy::report(&node))
    };
    run().map_err(Failure)
}

fn alone() -> Result<File> {
    let lock = File::create(LOCK).with_context(|| format!("opening {LOCK}"))?;
    lock.lock()?;
    Ok(lock)
}

fn framed(
    ctr: &Ctr,
    body: impl FnOnce() -> Result<()>,
    sweep: impl FnOnce() -> Result<Vec<String>>,
) -> Result<()> {
    let before = Snapshot::take(ctr)?;
    let outcome = body();
    // The next test starts clean, whatever this one did.
    let left = sweep().context("removing the scenario's containers")?;
    let clean = before.expect_nothing_new(ctr);
    match (outcome, clean) {
        (Ok(()), Ok(())) if left.is_empty() => Ok(()),
        (Ok(()), Ok(())) => bail!("containers left behind: {left:?}"),
        (Ok(()), Err(leak)) => Err(leak),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(leak)) => Err(error.context(format!("and then {leak:#}"))),
    }
}

/// A scenario about the virtual machine; where the runtime has none it is left out, by name, for
/// all to see.
pub fn vm_scenario(name: &str, body: impl FnOnce(&Ctr) -> Result<()>) -> Outcome {
    let ctr = Ctr::from_env();
    if ctr.has_vm() {
        return scenario(body);
    }
    leave_out(name, &format!("{} has no VM", ctr.runtime()))
}

/// The same on a node.
pub fn pod_vm_scenario(name: &str, body: impl FnOnce(&Node) -> Result<()>) -> Outcome {
    let ctr = Ctr::from_env();
    if ctr.has_vm() {
        return pod_scenario(body);
    }
    leave_out(name, &format!("{} has no VM", ctr.runtime()))
}

/// Leaves a test out, by name and with the reason, for all to see.
pub fn leave_out(name: &str, reason: &str) -> Outcome {
    say_aloud(&format!("left out: {name} ({reason})")).map_err(Failure)
}

/// Says a line for all to see, past the harness's capture of what a passing test prints.
pub fn say_aloud(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stderr(), "{line}")?)
}

/// What a test returns.
pub type Outcome = Result<(), Failure>;

/// An error that the test harness prints as words: the whole chain, no backtrace.
pub struct Failure(anyhow::Error);

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, cause) in self.0.chain().enumerate() {
            if depth > 0 {
                f.write_str("\nbecause ")?;
            }
            write!(f, "{cause}")?;
        }
        Ok(())
    }
}
