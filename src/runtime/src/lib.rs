// SPDX-License-Identifier: Apache-2.0
//! The programs of the runtime: `containerd-shim-kata-v2`, a containerd runtime v2 shim whose
//! containers run in a virtual machine, and `kata-ctl`, the operator's view of it.
//!
//! The shim is one binary with three lives: the short-lived commands that containerd runs (`start`,
//! `delete`), the shim that serves a sandbox's containers, and, as the shim's child, the virtual
//! machine monitor. The serving shim speaks ttrpc with containerd on one side and with the guest's agent on the other, and
//! typed control messages with its monitor.

mod agent;
mod bundle;
mod cli;
mod config;
mod container;
mod delete;
mod disk;
mod error;
mod events;
mod hooks;
mod kata_ctl;
mod logging;
mod management;
mod mount;
mod network;
mod paths;
mod process;
mod raw;
mod sandbox;
mod serve;
mod service;
mod spec;
mod start;
mod template;
mod volume;

use std::env;
use std::io::{self, Write};
use std::panic;
use std::process::{ExitCode, abort};

use protobuf::{Message, MessageField};
use protocols::containerd::runtime_info::{RuntimeInfo, RuntimeVersion};
use rustix::thread::set_name;

use crate::cli::{Action, Arguments};
use crate::error::{Context, Result};

/// `containerd-shim-kata-v2`, with the process's arguments.
pub fn shim() -> ExitCode {
    abort_on_panic();
    let arguments = match cli::parse(env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => return fail(&error.chain()),
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.chain()),
    }
}

/// `kata-ctl`, with the process's arguments.
pub fn kata_ctl() -> ExitCode {
    match kata_ctl::run(env::args_os().skip(1)) {
        Ok((text, well)) => {
            // Whoever reads may have seen enough.
            let _ = io::stdout().write_all(text.as_bytes());
            if well {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => fail(&format!("kata-ctl: {}", error.chain())),
    }
}

/// A thread or task that is gone would leave those waiting that count on it. Release builds abort by
/// their profile.
fn abort_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        abort();
    }));
}

fn run(arguments: &Arguments) -> Result<()> {
    // What `ps` and `pgrep` show; without it, a process started from /proc/self/exe is "exe".
    let name = match arguments.action {
        Action::Vmm => c"vmm",
        _ => c"containerd-shim",
    };
    set_name(name).internal(|| "name the process".to_owned())?;
    match arguments.action {
        Action::Start => start::run(arguments)?,
        Action::Delete => delete::run(arguments)?,
        Action::Serve => serve::run(arguments)?,
        Action::Vmm => {
            logging::start(arguments.log_level);
            vmm::process::run().internal(|| "virtual machine monitor".to_owned())?;
        }
        Action::Info => info()?,
        Action::Version => version(),
    }
    Ok(())
}

/// What containerd from 2.2 on reads: the mounts of a root file system that it leaves to the runtime, with
/// commas between them. Others read no annotation.
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";
/// `mkfs` is not among them: containerd makes the file of the writable layer.
const ALLOWED_MOUNTS: &str = "mkdir/*,format/*,erofs";

/// For containerd from 2.0 on, which asks before it lists a runtime.
fn info() -> Result<()> {
    let bytes = information()
        .write_to_bytes()
        .internal(|| "encode the information".to_owned())?;
    io::stdout()
        .write_all(&bytes)
        .internal(|| "print the information".to_owned())
}

fn information() -> RuntimeInfo {
    RuntimeInfo {
        name: "io.containerd.kata.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        annotations: [(ALLOW_MOUNTS.to_owned(), ALLOWED_MOUNTS.to_owned())].into(),
        ..RuntimeInfo::default()
    }
}

fn version() {
    let _ = writeln!(
        io::stdout(),
        "containerd-shim-kata-v2 (Nutshell) {}",
        env!("CARGO_PKG_VERSION")
    );
}

/// containerd shows what a failed command printed, so it is the reason and nothing else.
fn fail(reason: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "{reason}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_is_told_which_mounts_it_may_leave_to_the_runtime() {
        let bytes = information().write_to_bytes().unwrap();
        let info = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(info.name, "io.containerd.kata.v2");
        let allowed = info.annotations.get("containerd.io/runtime-allow-mounts");
        assert_eq!(allowed.unwrap(), "mkdir/*,format/*,erofs");
    }
}
