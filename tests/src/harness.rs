// SPDX-License-Identifier: Apache-2.0
//! What suites have in common that are programs of more than one role: the suite, the VMM process of its
//! machines and, in some, the guest's init.

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// The suite as a program, named in what it says. As a machine's VMM it is called with the argument `vmm`.
pub fn main(name: &str, suite: impl FnOnce(&mut Suite) -> Result<()>) -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = if arguments.first().is_some_and(|role| role == "vmm") {
        vmm::process::run().context("vmm").map(|()| true)
    } else {
        let mut chosen = Suite::new(arguments);
        suite(&mut chosen).and_then(|()| chosen.verdict())
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A run: what is asked for, and how it went.
#[derive(Debug, Default)]
pub struct Suite {
    /// Run only scenarios with this in their names.
    filter: Option<String>,
    /// Show the guests' consoles.
    pub console: bool,
    passed: usize,
    failed: Vec<String>,
}

impl Suite {
    /// Arguments of other test programs are of no use here.
    fn new(arguments: Vec<String>) -> Self {
        let mut suite = Self::default();
        for argument in arguments {
            if argument == "--console" {
                suite.console = true;
            } else if !argument.starts_with('-') {
                suite.filter = Some(argument);
            }
        }
        suite
    }

    /// Whether a scenario of this name is to run.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        let filter = self.filter.as_deref();
        filter.is_none_or(|filter| name.contains(filter))
    }

    /// Runs a scenario if it is wanted, and tells how it went.
    pub fn run(&mut self, name: &str, scenario: impl FnOnce() -> Result<()>) {
        if self.wants(name) {
            let begin = Instant::now();
            let result = scenario();
            self.record(name, begin, result);
        }
    }

    /// Tells how a scenario went that began then.
    pub fn record(&mut self, name: &str, begin: Instant, result: Result<()>) {
        let seconds = begin.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                self.passed = self.passed.saturating_add(1);
                println!("test {name} ... ok ({seconds:.2} s)");
            }
            Err(error) => {
                println!("test {name} ... FAILED\n    {error:#}");
                self.failed.push(name.to_owned());
            }
        }
    }

    /// The closing line, and whether all passed.
    fn verdict(&self) -> Result<bool> {
        let (passed, failed) = (self.passed, self.failed.len());
        ensure!(
            passed > 0 || failed > 0,
            "no scenario has {:?} in its name",
            self.filter
        );
        if failed > 0 {
            println!("failed: {}", self.failed.join(", "));
        }
        println!("{passed} passed, {failed} failed");
        Ok(failed == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn a_run_fails_by_what_failed_and_by_nothing_run() {
        let mut suite = Suite::new(vec!["--nocapture".to_owned(), "one".to_owned()]);
        suite.run("two", || bail!("not asked for"));
        assert!(suite.verdict().unwrap_err().to_string().contains("one"));
        suite.run("one", || Ok(()));
        assert!(suite.verdict().unwrap());
        suite.run("one_more", || bail!("wrong"));
        assert!(!suite.verdict().unwrap());
    }
}
