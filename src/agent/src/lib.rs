// SPDX-License-Identifier: Apache-2.0
//! kata-agent: PID 1 of the guest. It serves Kata's agent protocol to the runtime on the host and
//! creates the containers of the pod.
//!
//! Two roles share the binary. The agent proper is an event loop that never forks itself; each
//! container process is started by a single-threaded helper, this binary executed again
//! (`engine`). The binary lies on a read-only file system, so a container that reaches
//! `/proc/PID/exe` of a helper can't overwrite it (CVE-2019-5736).

mod cgroup;
mod cmdline;
mod console;
mod container;
mod device;
mod disk;
mod engine;
mod error;
mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod init;
mod kernel_events;
mod log;
mod mount;
mod network;
mod passfd;
mod pci;
mod ports;
mod reaper;
mod rpc;
mod sandbox;
mod storage;
mod sys;
mod task;
mod tool;

use std::env;
use std::panic;
use std::process::{self, ExitCode};
use std::sync::Arc;

use tokio::runtime;

use crate::cmdline::Parameters;
use crate::error::{Context as _, Result};
use crate::init::kmsg;
use crate::passfd::Arrivals;
use crate::ports::Ports;
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;

/// The program, in the role that its first argument names.
#[must_use]
pub fn main() -> ExitCode {
    abort_on_panic();
    match env::args().nth(1).as_deref() {
        Some(engine::HELPER_ROLE) => {
            engine::helper_main();
            return ExitCode::SUCCESS;
        }
        Some(console::SHELL_ROLE) => return console::shell_main(),
        _ => {}
    }
    let is_init = rustix::process::getpid().is_init();
    match run(is_init) {
        Ok(()) if is_init => {
            init::power::off();
            ExitCode::FAILURE
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if is_init {
                let _ = init::mounts::devices();
            }
            kmsg::fatal(&error.line());
            // The end of PID 1 is a kernel panic, which the host sees with this line before it.
            ExitCode::FAILURE
        }
    }
}

/// A task that is gone would leave those waiting that count on it. Release builds abort by their profile.
fn abort_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::abort();
    }));
}

fn run(is_init: bool) -> Result<()> {
    let parameters = if is_init {
        init::begin()?
    } else {
        Parameters::default()
    };
    let parameters = parameters.with_environment(|key| env::var(key).ok());
    let listener = rpc::Listener::bind(&parameters.server)?;
    let announcement = parameters.ready_port.map(rpc::Announcement::send);
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "event loop")?;
    let served = runtime.block_on(async {
        if is_init {
            init::complete()?;
        } else {
            rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
                .context(|| "become a subreaper")?;
        }
        let ports = Ports::beside(&parameters.server);
        match parameters.log_port {
            Some(port) => log::start(ports.listen(port)?, parameters.log),
            None if is_init => kmsg::start(kmsg::Target::Kernel, parameters.log),
            None => kmsg::start(kmsg::Target::Stderr, parameters.log),
        }
        if let Some(announcement) = announcement {
            announcement.finish();
        }
        let reaper = Reaper::default();
        reaper.start()?;
        if let Some(port) = parameters.console_port() {
            console::start(ports.listen(port)?, reaper.clone());
        }
        let arrivals = match parameters.passfd_port {
            Some(port) => Some(Arrivals::start(ports.listen(port)?)),
            None => None,
        };
        let sandbox = Arc::new(Sandbox::new(&parameters, reaper, arrivals));
        if let Some(port) = parameters.forward_port {
            forward::start(port)?;
        }
        let server = listener.serve(Arc::clone(&sandbox)).await?;
        sandbox.destroyed().await;
        // Not shut down in order: that would wait for calls that wait for events.
        drop(server);
        Ok(())
    });
    // Work that still waits for a device must not keep the guest alive.
    runtime.shutdown_background();
    served
}
