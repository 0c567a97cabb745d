// SPDX-License-Identifier: Apache-2.0
//! The main job: a container in a VM of its own, started by containerd through our runtime.

use crate::build::{self, Profile};
use crate::containerd::Containerd;
use crate::guest::{self, kernel::Flavour};
use crate::packages::{self, any};
use crate::vm::{self, Contents, Options};
use crate::{busybox, probe, progress};
use anyhow::Result;
use std::io::{IsTerminal, stdin, stdout};

/// Name of the runtime, from which containerd derives the binary's.
const RUNTIME: &str = "io.containerd.kata.v2";

/// What runs when the user names no command.
const GREETING: &str = "\
echo \"Hello from a container in its own virtual machine.\"
echo \"kernel  $(uname -sr)\"
echo \"CPUs    $(grep -c ^processor /proc/cpuinfo)\"
echo \"memory  $(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB\"
";

/// Runs the command in a container, here or in the dev VM, and returns its exit code.
pub(crate) fn run(mut command: Vec<String>) -> Result<u8> {
    let greeting = command.is_empty();
    if greeting {
        command.extend(["sh", "-c", GREETING].map(str::to_owned));
    }
    let mut argv: Vec<String> = ["run", "--rm", "--runtime", RUNTIME]
        .map(str::to_owned)
        .into();
    if !greeting && stdin().is_terminal() && stdout().is_terminal() {
        argv.push("--tty".to_owned());
    }
    argv.extend([busybox::NAME.to_owned(), "nutshell".to_owned()]);
    argv.append(&mut command);

    let kvm = probe::kvm();
    if kvm.is_ordinary() {
        progress::note(&format!("running on this machine: its {kvm}"));
        return on_host(argv);
    }
    progress::note(&format!("running in the dev VM: this machine's {kvm}"));
    argv.insert(0, "ctr".to_owned());
    vm::run(
        &Options::default(),
        Contents::Containerd(Profile::Quick),
        argv,
    )
}

fn on_host(argv: Vec<String>) -> Result<u8> {
    packages::ensure("running a container", &[any("containerd"), any("runc")])?;
    let shim = build::runtime(Profile::Quick)?;
    let guest = guest::build(Profile::Quick, Flavour::Release, None)?;
    let containerd = Containerd::start(&shim, &guest)?;
    containerd.import(&busybox::archive()?)?;
    containerd.ctr(argv)
}
