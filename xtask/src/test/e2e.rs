// SPDX-License-Identifier: Apache-2.0
//! Suites against a real containerd: test binaries built here, run in one dev VM.

use crate::build::{self, Linkage, Profile};
use crate::vm::{Contents, Options, Vm};
use anyhow::{Result, bail};

/// The dev VM of a test run, started when the first suite needs it.
#[derive(Debug, Default)]
pub(crate) struct Session {
    vm: Option<Vm>,
}

impl Session {
    /// Runs the test binary of this name with the arguments.
    pub(crate) fn run(&mut self, name: &str, linkage: Linkage, arguments: &[String]) -> Result<()> {
        let binary = build::test_binary(Profile::Quick, linkage, name)?;
        let vm = match self.vm.take() {
            Some(vm) => vm,
            None => Vm::start(&Options::default(), Contents::Containerd(Profile::Quick))?,
        };
        let mut argv = vec![binary.to_string_lossy().into_owned()];
        argv.extend_from_slice(arguments);
        // A VM that died takes no further suite down with it.
        let code = vm.execute(argv)?;
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
