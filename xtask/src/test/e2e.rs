// SPDX-License-Identifier: Apache-2.0
//! Suites that need root and a machine of their own: test binaries built here, run in one dev VM.

use crate::build::Profile;
use crate::vm::{Contents, Options, Vm};
use anyhow::{Result, bail};

/// The dev VM of a test run, started when the first suite needs it.
#[derive(Debug, Default)]
pub(crate) struct Session {
    vm: Option<Vm>,
}

impl Session {
    /// Runs a test binary: its command with the arguments.
    pub(crate) fn run(&mut self, command: &[String]) -> Result<()> {
        let vm = match self.vm.take() {
            Some(vm) => vm,
            None => Vm::start(&Options::default(), Contents::Containerd(Profile::Quick))?,
        };
        // A VM that died takes no further suite down with it.
        let code = vm.execute(command.to_vec())?;
        self.vm = Some(vm);
        if code != 0 {
            bail!("exit code {code}");
        }
        Ok(())
    }

    /// Powers the VM off.
    pub(crate) fn stop(self) -> Result<()> {
        self.vm.map_or(Ok(()), Vm::stop)
    }
}
