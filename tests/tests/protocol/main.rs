// SPDX-License-Identifier: Apache-2.0
//! The agent's protocol against a booted guest, spoken by a client that is no runtime: every method, its
//! codes, and its effects as the host and a program inside the guest see them.
//!
//! One binary in two roles, as the suite `vsock`: the suite, and the VMM process of its machine. The guest
//! boots the image that the runtime has. The scenarios share it, in order, as a pod's life would have them.

mod client;
mod container;
mod files;
mod guest;
mod host;
mod network;
mod oom;
mod process;
mod sandbox;
mod spec;
mod storage;

use std::pin::Pin;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tests::harness::{self, Suite};
use tests::sys;
use tokio::runtime;

use host::Host;

/// A scenario on the suite's guest, as it stands.
type Scenario = for<'a> fn(&'a Host) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// Scenarios by the names of their functions.
macro_rules! scenarios {
    ($($scenario:path),* $(,)?) => {
        &[$((stringify!($scenario), |host| Box::pin($scenario(host)))),*]
    };
}

/// All of them, in the order in which they run.
const ALL: &[(&str, Scenario)] = scenarios![
    sandbox::health,
    sandbox::create,
    guest::details,
    guest::cpus_and_memory_come,
    guest::clock_is_set,
    guest::metrics,
    container::create,
    container::resources,
    container::pause,
    container::last_words,
    process::pipes,
    process::terminal,
    process::nobody,
    container::end_by_either_name,
    oom::one_container,
    storage::tmpfs_grows,
    storage::disk_grows,
    network::card,
    network::filters,
    files::copy,
    guest::what_makes_no_sense,
    sandbox::destroy,
    client::every_method_was_driven,
];

fn main() -> ExitCode {
    harness::main("protocol", run)
}

fn run(suite: &mut Suite) -> Result<()> {
    // Each step needs those before it.
    ensure!(
        ALL.iter().all(|(name, _)| suite.wants(name)),
        "the scenarios are one guest's life and run together"
    );
    sys::leave_network().context("can't leave the host's network")?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let begin = Instant::now();
        let host = Host::boot(suite.console).await?;
        println!("agent ready after {:.1} s", begin.elapsed().as_secs_f64());
        for (name, scenario) in ALL {
            let begin = Instant::now();
            let result = scenario(&host).await;
            let failed = result.is_err();
            suite.record(name, begin, result);
            if failed {
                break;
            }
        }
        Ok(())
    })
}
