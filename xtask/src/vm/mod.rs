// SPDX-License-Identifier: Apache-2.0
//! The dev VM: a Linux with a real `/dev/kvm`, containerd and our runtime, on any machine.

mod cpio;

mod linux;
mod machine;
mod pty;
mod qemu;
pub(crate) mod server;
mod session;
mod setup;
mod waiting;
mod wire;

pub(crate) use machine::Options;
pub(crate) use session::{Ended, Streams};

use crate::build::{self, Profile};
use crate::guest::kernel::Flavour;
use crate::packages::{self, any, newer};
use crate::{busybox, guest, install};
use anyhow::{Result, bail};
use linux::Linux;
use machine::Machine;
use std::path::Path;
use std::time::Duration;
use wire::Setup;

/// Prefix of the runtime in the VM: first in PATH.
pub(crate) const PREFIX: &str = "/usr/local";

/// What is ready in the VM when the command starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Linux with `/dev/kvm`.
    Bare,
    /// containerd with our runtime, of this profile, and the busybox image as well.
    Containerd(Profile),
}

/// What a dev VM is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    linux: Linux,
    setup: Option<Setup>,
}

impl Parts {
    /// Builds what is missing.
    pub(crate) fn build(contents: Contents) -> Result<Self> {
        packages::ensure(
            "the dev VM",
            &[
                newer("qemu-system-x86", 10),
                any("busybox-static"),
                any("kmod"),
                any("xz-utils"),
            ],
        )?;
        let setup = match contents {
            Contents::Bare => None,
            Contents::Containerd(profile) => Some(containerd_setup(profile)?),
        };
        Ok(Self {
            linux: linux::prepare()?,
            setup,
        })
    }
}

/// A dev VM that is up.
#[derive(Debug)]
pub(crate) struct Vm {
    machine: Machine,
}

impl Vm {
    /// Boots, and brings up the contents.
    pub(crate) fn start(options: &Options, parts: &Parts) -> Result<Self> {
        let machine = Machine::start(&parts.linux, options)?;
        if let Some(setup) = &parts.setup {
            session::set_up(&machine, setup)?;
        }
        Ok(Self { machine })
    }

    /// Runs one command and returns its exit code. Input of ours that it leaves is lost to the next one.
    pub(crate) fn execute(&self, argv: Vec<String>, streams: Streams<'_>) -> Result<u8> {
        match session::execute(&self.machine, argv, streams, None)? {
            Ended::Exited(code) => Ok(code),
            ended => bail!("{ended}"),
        }
    }

    /// The same, for at most `limit`.
    pub(crate) fn execute_within(
        &self,
        limit: Option<Duration>,
        argv: Vec<String>,
        streams: Streams<'_>,
    ) -> Result<Ended> {
        session::execute(&self.machine, argv, streams, limit)
    }

    /// Powers off.
    pub(crate) fn stop(self) -> Result<()> {
        self.machine.stop()
    }
}

/// Runs `argv` (a shell if empty) in a fresh dev VM and returns its exit code.
pub(crate) fn run(options: &Options, contents: Contents, mut argv: Vec<String>) -> Result<u8> {
    if argv.is_empty() {
        argv.extend(["bash".to_owned(), "-l".to_owned()]);
    }
    let vm = Vm::start(options, &Parts::build(contents)?)?;
    let code = vm.execute(argv, Streams::Ours)?;
    vm.stop()?;
    Ok(code)
}

/// Builds what the VM gets.
fn containerd_setup(profile: Profile) -> Result<Setup> {
    packages::ensure(
        "containerd in the dev VM",
        &[
            any("containerd"),
            any("containernetworking-plugins"),
            any("iproute2"),
            any("runc"),
        ],
    )?;
    let shim = build::runtime(profile)?;
    let guest = guest::build(profile, Flavour::Release, None)?;
    let files = install::files(&shim, &guest)
        .into_iter()
        .map(|file| {
            let place = file.place(Path::new(PREFIX));
            (file.from, place)
        })
        .collect();
    Ok(Setup {
        files,
        images: vec![busybox::archive()?],
    })
}
