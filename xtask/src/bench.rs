// SPDX-License-Identifier: Apache-2.0
//! Benchmarks against the programs to be compared with, each pair in turn, in one dev VM.

use crate::build::{self, Profile};
use crate::guest::{self, agent};
use crate::vm::{self, Contents, Options, Parts, Streams, Vm};
use anyhow::Result;
use std::path::Path;

/// Builds what is measured as it is installed, runs the benchmark in the dev VM and returns its exit code.
pub(crate) fn run(arguments: Vec<String>) -> Result<u8> {
    let benchmark = build::executable(
        Profile::Release,
        &["--package", "tests", "--bin", "bench-boot"],
    )?;
    let boot = build::executable(Profile::Release, &["--package", "vmm", "--example", "boot"])?;
    let agent = agent::build(Profile::Release)?;
    // The engine beside runc: without a guest around it, as runc is.
    let figures = build::executable(
        Profile::Quick,
        &[
            "--package",
            "kata-agent",
            "--features",
            "component-tests",
            "--test",
            "figures",
        ],
    )?;
    let parts = Parts::build(Contents::Containerd(Profile::Release))?;
    let vm = Vm::start(&Options::default(), &parts)?;
    let place = |name: &str| Path::new(vm::PREFIX).join(name);
    let kernel = place(guest::KERNEL);
    let image = place(guest::IMAGE);
    let shim = place(build::SHIM);
    let mut argv = vec![benchmark.to_string_lossy().into_owned()];
    for (option, path) in [
        ("--boot", &boot),
        ("--agent", &agent),
        ("--kernel", &kernel),
        ("--image", &image),
        ("--shim", &shim),
    ] {
        argv.extend([option.to_owned(), path.to_string_lossy().into_owned()]);
    }
    argv.extend(arguments);
    let code = vm.execute(argv, Streams::Ours)?;
    let engine = vec![
        "env".to_owned(),
        format!("NUTSHELL_TEST_AGENT={}", agent.display()),
        figures.to_string_lossy().into_owned(),
    ];
    let engine = vm.execute(engine, Streams::Ours)?;
    vm.stop()?;
    Ok(code.max(engine))
}
