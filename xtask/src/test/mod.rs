// SPDX-License-Identifier: Apache-2.0
//! The test ladder: checks of the source, unit tests, then suites against a real containerd in the dev VM.

mod e2e;
mod invariants;
mod lint;
mod unit;

use crate::build::{self, Linkage, Profile};
use crate::packages::{self, any};
use crate::{archive, crates, progress};
use anyhow::{Result, bail};
use std::process::Command;
use std::time::{Duration, Instant};

/// A set of tests that is run and reported as one.
#[derive(Debug)]
struct Suite {
    name: &'static str,
    /// What it shows, for the listing.
    about: &'static str,
    /// Part of `--quick`: needs neither root nor a VM.
    quick: bool,
    place: Place,
    /// Tests that run where they are asked for by name: they would show no more than another suite
    /// does, or boot more guests than the emulated processor brings up.
    skip: &'static [&'static str],
}

/// Where a suite runs.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// On this machine.
    Here(fn() -> Result<()>),
    /// Test binary of the package `tests`, in the dev VM with containerd.
    DevVm,
    /// The same as a static binary, which can be a guest's init as well.
    DevVmStatic,
    /// The same, with static programs that containers run.
    Exercisers,
    /// Component tests of the agent, in the dev VM.
    Agent,
    /// The test binary `pods` with containerd 2, which asks for a sandbox in this way.
    Containerd2(&'static str),
}

impl Place {
    /// Builds the test binary of the suite `name`; answers the command that runs it.
    fn command(self, name: &str) -> Result<Vec<String>> {
        let mut command = Vec::new();
        let linkage = match self {
            Self::DevVmStatic | Self::Exercisers => Linkage::Static,
            _ => Linkage::Dynamic,
        };
        let target: &[&str] = match self {
            Self::Agent => {
                packages::ensure(
                    "the agent's tests",
                    &[
                        any("busybox-static"),
                        any("e2fsprogs"),
                        any("gcc"),
                        any("iproute2"),
                        any("libc6-dev"),
                        any("libseccomp-dev"),
                        any("mount"),
                        any("perl-base"),
                        any("runc"),
                    ],
                )?;
                &[
                    "--package",
                    "kata-agent",
                    "--features",
                    "component-tests",
                    "--test",
                    "component",
                ]
            }
            Self::Exercisers => {
                command = exercisers()?;
                &["--package", "tests", "--test", name]
            }
            Self::Containerd2(sandboxer) => {
                command = containerd_2(sandboxer)?;
                &["--package", "tests", "--test", "pods"]
            }
            _ => &["--package", "tests", "--test", name],
        };
        let binary = build::test_binary(Profile::Quick, linkage, target)?;
        command.push(binary.to_string_lossy().into_owned());
        Ok(command)
    }
}

const SUITES: &[Suite] = &[
    Suite {
        name: "lint",
        about: "format, clippy, licences, architecture",
        quick: true,
        place: Place::Here(lint::run),
        skip: &[],
    },
    Suite {
        name: "unit",
        about: "unit tests of all crates",
        quick: true,
        place: Place::Here(unit::run),
        skip: &[],
    },
    Suite {
        name: "agent",
        about: "the guest's agent, driven through its protocol",
        quick: false,
        place: Place::Agent,
        skip: &[],
    },
    Suite {
        name: "machine",
        about: "machines of every size and their ends, each told apart",
        quick: false,
        place: Place::DevVmStatic,
        skip: &[],
    },
    Suite {
        name: "vsock",
        about: "streams between host and guest, on a machine of its own",
        quick: false,
        place: Place::DevVmStatic,
        skip: &[],
    },
    Suite {
        name: "net",
        about: "packets between host and guest, on machines of its own",
        quick: false,
        place: Place::DevVmStatic,
        skip: &[],
    },
    Suite {
        name: "ctr",
        about: "containers through containerd's ctr",
        quick: false,
        place: Place::DevVm,
        skip: &[],
    },
    Suite {
        name: "network",
        about: "network namespaces, carried into the guest",
        quick: false,
        place: Place::DevVm,
        skip: &[],
    },
    Suite {
        name: "pods",
        about: "pods through containerd's CRI plugin",
        quick: false,
        place: Place::DevVm,
        skip: &["load::a_hundred"],
    },
    Suite {
        name: "pods-2",
        about: "the same with containerd 2",
        quick: false,
        place: Place::Containerd2("podsandbox"),
        skip: &["load::a_hundred", "network::bulk"],
    },
    Suite {
        name: "sandbox",
        about: "pods with containerd 2 and the sandbox API",
        quick: false,
        place: Place::Containerd2("shim"),
        skip: &["load::", "streams::", "network::bulk"],
    },
    Suite {
        name: "volumes",
        about: "what pods store on, and how they grow and shrink",
        quick: false,
        place: Place::Exercisers,
        skip: &["for_ten_minutes"],
    },
    Suite {
        name: "faults",
        about: "killed processes, missing files: words and leaks",
        quick: false,
        place: Place::DevVm,
        skip: &[],
    },
];

/// Programs from the registry that try a file system out: how tests are told of each, its name and
/// version.
const EXERCISERS: [(&str, &str, &str); 2] = [
    ("NUTSHELL_TEST_PJDFSTEST", "pjdfstest", "0.2.2"),
    ("NUTSHELL_TEST_FSX", "fsx", "0.3.2"),
];

/// What to run.
#[derive(Debug)]
pub(crate) struct Selection {
    pub(crate) quick: bool,
    pub(crate) only: Vec<String>,
    /// Passed to the test binaries, for example a test's name.
    pub(crate) arguments: Vec<String>,
}

/// Runs the suites one after the other, all of them even if one fails, and sums up.
pub(crate) fn run(selection: &Selection) -> Result<u8> {
    let suites = select(selection)?;
    let mut vm = e2e::Session::default();
    let mut results: Vec<(&str, Duration, Result<()>)> = Vec::new();
    for suite in suites {
        progress::note(&format!("suite {}: {}", suite.name, suite.about));
        let begin = Instant::now();
        let result = match suite.place {
            Place::Here(run) => run(),
            place => place.command(suite.name).and_then(|mut command| {
                command.extend_from_slice(&selection.arguments);
                if selection.arguments.is_empty() {
                    let skip = |test: &&str| ["--skip".to_owned(), (*test).to_owned()];
                    command.extend(suite.skip.iter().flat_map(skip));
                }
                vm.run(&command)
            }),
        };
        if let Err(error) = &result {
            progress::note(&format!("suite {} failed: {error:#}", suite.name));
        }
        results.push((suite.name, begin.elapsed(), result));
    }
    vm.stop()?;
    Ok(report(&results))
}

/// Assignments that have the suite `pods` use Debian's newest containerd.
fn containerd_2(sandboxer: &str) -> Result<Vec<String>> {
    let programs = archive::unpacked("sid", "containerd")?.join("usr/bin");
    // Built for a newer Debian; it asks little of the C library.
    let version = progress::output(Command::new(programs.join("containerd")).arg("--version"))?;
    progress::note(version.trim());
    Ok(vec![
        "env".to_owned(),
        format!("NUTSHELL_TEST_CONTAINERD={}", programs.display()),
        format!("NUTSHELL_TEST_SANDBOXER={sandboxer}"),
    ])
}

/// Assignments that name the programs which try a file system out. Static: they run in containers.
fn exercisers() -> Result<Vec<String>> {
    packages::ensure(
        "trying file systems out",
        &[any("e2fsprogs"), any("mount"), any("xfsprogs")],
    )?;
    let mut assignments = vec!["env".to_owned()];
    for (variable, name, version) in EXERCISERS {
        let program = crates::program(name, version, Linkage::Static)?;
        assignments.push(format!("{variable}={}", program.display()));
    }
    Ok(assignments)
}

fn select(selection: &Selection) -> Result<Vec<&'static Suite>> {
    for name in &selection.only {
        if !SUITES.iter().any(|suite| suite.name == name) {
            let known: String = SUITES
                .iter()
                .map(|suite| format!("\n  {:8} {}", suite.name, suite.about))
                .collect();
            bail!("no suite is named {name}; there are:{known}");
        }
    }
    Ok(SUITES
        .iter()
        .filter(|suite| {
            let named = selection.only.iter().any(|name| name == suite.name);
            named || selection.only.is_empty()
        })
        .filter(|suite| !selection.quick || suite.quick)
        .collect())
}

/// Prints a line a suite and one that closes, and returns the exit code.
fn report(results: &[(&str, Duration, Result<()>)]) -> u8 {
    println!();
    for (name, time, result) in results {
        let verdict = if result.is_ok() { "passed" } else { "FAILED" };
        println!("{name:8} {verdict} in {:.1} s", time.as_secs_f64());
    }
    let failed: Vec<&str> = results
        .iter()
        .filter(|(_, _, result)| result.is_err())
        .map(|(name, ..)| *name)
        .collect();
    if results.is_empty() {
        println!("no suite was run");
        1
    } else if failed.is_empty() {
        println!("all {} suites passed", results.len());
        0
    } else {
        println!(
            "{} of {} suites FAILED: {}",
            failed.len(),
            results.len(),
            failed.join(", ")
        );
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(quick: bool, only: &[&str]) -> Result<Vec<&'static str>> {
        let only = only.iter().map(|&name| name.to_owned()).collect();
        let selection = Selection {
            quick,
            only,
            arguments: Vec::new(),
        };
        Ok(select(&selection)?.iter().map(|suite| suite.name).collect())
    }

    #[test]
    fn selects_suites() {
        assert_eq!(names(true, &[]).unwrap(), ["lint", "unit"]);
        assert_eq!(
            names(false, &["faults", "unit"]).unwrap(),
            ["unit", "faults"]
        );
        let error = names(false, &["nope"]).unwrap_err().to_string();
        assert!(
            error.contains("nope") && error.contains("faults"),
            "{error}"
        );
    }

    #[test]
    fn a_failed_suite_fails_the_run() {
        let second = Duration::from_secs(1);
        assert_eq!(report(&[("a", second, Ok(()))]), 0);
        assert_eq!(
            report(&[
                ("a", second, Ok(())),
                ("b", second, Err(anyhow::anyhow!("x")))
            ]),
            1
        );
        assert_eq!(report(&[]), 1);
    }
}
