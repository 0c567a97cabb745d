// SPDX-License-Identifier: Apache-2.0
//! What a pod stores on, and how it grows and shrinks: volumes, devices and size, over the
//! container runtime interface and by `ctr`.
//!
//! `NUTSHELL_TEST_RUNTIME=io.containerd.runc.v2` runs the same against runc, the yardstick.

#![expect(
    clippy::tests_outside_test_module,
    reason = "this whole program is tests"
)]

mod configuration;
mod direct;
mod disks;
mod exercisers;
mod files;
mod full;
mod layers;
mod memory;
mod size;
mod trees;

use std::path::Path;

use anyhow::{Context, Result};
use tests::cri::LIMIT;
use tests::cri::messages::ContainerConfig;
use tests::pod::{Container, Pod};
use tests::volume::{Access, with_mount};

const MIB: u64 = 1 << 20;

/// Runs until it is told to end.
const WAITS: &str = "trap 'exit 0' TERM; echo up; sleep 1000 & wait";

/// Where a container finds our own program.
const PROGRAM: &str = "/in-container";

/// A container that runs our own program: static, for an image has no libraries for it.
fn in_container(pod: &Pod, name: &str, arguments: &[&str]) -> ContainerConfig {
    let argv: Vec<_> = [PROGRAM]
        .into_iter()
        .chain(arguments.iter().copied())
        .collect();
    let program = Path::new(env!("CARGO_BIN_EXE_in-container"));
    with_mount(
        pod.container_of(name, &argv),
        program,
        PROGRAM,
        Access::Read,
    )
}

/// Starts a container, and waits until it says that it is up.
fn started(pod: &Pod, config: &ContainerConfig) -> Result<Container> {
    let container = pod.start(config)?;
    container.wait_for_log("up\n", LIMIT)?;
    Ok(container)
}

/// What is said of a container that is not to be.
fn refused(pod: &Pod, config: &ContainerConfig) -> Result<String> {
    let taken = pod.create(config).and_then(|container| container.start());
    let error = taken.err().context("the container was taken")?;
    Ok(format!("{error:#}"))
}
