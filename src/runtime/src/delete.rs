// SPDX-License-Identifier: Apache-2.0
//! `delete`: removes what a dead shim left on the host, whatever the moment of its death.
//!
//! containerd runs this when a shim doesn't answer any more, and takes the exit status from what
//! it prints. The shim's mounts are gone with its mount namespace; the rest is in the journal.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use protobuf::{Message, MessageField};
use protocols::containerd::shim::DeleteResponse;

use crate::bundle::{Bundle, Membership};
use crate::cli::Arguments;
use crate::error::{Context, Result};
use crate::paths;
use crate::process::ProcessId;
use crate::sandbox::journal::Journal;

/// Killed: what containerd itself records for a task whose shim is gone.
const EXIT_STATUS: u32 = 137;

/// Cleans up and prints the exit status.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let bundle = Bundle::open(arguments.bundle.as_deref())?;
    // A bundle that can't be read any more must not keep its sandbox from being removed.
    let sandbox = bundle
        .sandbox(&arguments.id)
        .unwrap_or_else(|_| Membership::Single(arguments.id.clone()));
    let socket = paths::shim_socket(&arguments.address, &arguments.namespace, sandbox.id());
    // A pod's shim outlives a container that failed; only the sandbox's own end is its end.
    let in_use = sandbox.is_member() && UnixStream::connect(&socket).is_ok();
    if !in_use {
        if !sandbox.is_member() {
            kill_shim(&bundle, &arguments.id)?;
        }
        let name = paths::sandbox_name(&arguments.namespace, sandbox.id());
        if let Some(journal) = Journal::open(paths::journal(&name))? {
            journal.remove_all()?;
        }
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).internal(|| format!("remove {}", socket.display()));
            }
            _ => {}
        }
    }
    let mut response = DeleteResponse::new();
    response.exit_status = EXIT_STATUS;
    response.exited_at = MessageField::some(SystemTime::now().into());
    let bytes = response
        .write_to_bytes()
        .internal(|| "encode the answer".to_owned())?;
    let mut output = io::stdout();
    output
        .write_all(&bytes)
        .and_then(|()| output.flush())
        .internal(|| "print the answer".to_owned())
}

/// Kills the shim of this bundle, should it still run: one that hangs, or has no sandbox yet. Its
/// number may be somebody else's by now, so what runs there must have been started for this id.
fn kill_shim(bundle: &Bundle, id: &str) -> Result<()> {
    let shim = fs::read_to_string(bundle.path().join("shim.pid"))
        .ok()
        .and_then(|pid| pid.trim().parse().ok())
        .and_then(|pid: u32| ProcessId::of(pid).ok());
    match shim {
        Some(shim) if shim.was_started_with(&["-id", id]) => shim
            .kill(Duration::from_secs(10))
            .internal(|| "kill the shim".to_owned()),
        _ => Ok(()),
    }
}
