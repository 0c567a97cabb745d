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

/// All of them, in the order in which they run.
const ALL: &[(&str, Scenario)] = &[
    ("health", |host| Box::pin(sandbox::health(host))),
    ("a_sandbox_is_created_once", |host| {
        Box::pin(sandbox::create(host))
    }),
    ("details_are_the_guest_s_own", |host| {
        Box::pin(guest::details(host))
    }),
    ("cpus_and_memory_come", |host| Box::pin(guest::online(host))),
    ("the_clock_is_set", |host| Box::pin(guest::clock(host))),
    ("the_guest_is_measured", |host| {
        Box::pin(guest::metrics(host))
    }),
    ("containers_of_both_layouts", |host| {
        Box::pin(container::create(host))
    }),
    ("a_container_is_measured_and_limited", |host| {
        Box::pin(container::resources(host))
    }),
    ("a_container_is_paused", |host| {
        Box::pin(container::pause(host))
    }),
    ("last_words", |host| Box::pin(container::last_words(host))),
    ("a_process_with_pipes", |host| {
        Box::pin(process::pipes(host))
    }),
    ("a_process_on_a_terminal", |host| {
        Box::pin(process::terminal(host))
    }),
    ("a_process_that_is_none", |host| {
        Box::pin(process::nobody(host))
    }),
    ("containers_end_by_either_name", |host| {
        Box::pin(container::end(host))
    }),
    ("memory_that_runs_out", |host| {
        Box::pin(oom::one_container(host))
    }),
    ("a_tmpfs_grows", |host| Box::pin(storage::tmpfs(host))),
    ("a_disk_grows", |host| Box::pin(storage::disk(host))),
    ("an_interface_with_routes_and_neighbours", |host| {
        Box::pin(network::card(host))
    }),
    ("packet_filters", |host| Box::pin(network::filters(host))),
    ("a_file_is_copied", |host| Box::pin(files::copy(host))),
    ("what_makes_no_sense_is_refused", |host| {
        Box::pin(guest::refused_here(host))
    }),
    ("the_sandbox_ends_and_its_guest", |host| {
        Box::pin(sandbox::destroy(host))
    }),
    ("every_method_was_driven", |host| {
        Box::pin(async { host.every_method_was_driven() })
    }),
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
