// SPDX-License-Identifier: Apache-2.0
//! The test ladder: checks of the source, unit tests, then suites against a real containerd in the dev VM.

mod invariants;
mod lanes;
mod lint;
mod unit;

use crate::build;
use crate::packages::{self, any};
use crate::{archive, crates, progress};
use anyhow::{Context, Result, bail};
use lanes::Job;
use std::path::Path;
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
    /// The same, a program that is its guests' init as well, with a harness of its own.
    Guest,
    /// As `DevVm`, with static programs that containers run.
    Exercisers,
    /// Component tests of the agent, in the dev VM.
    Agent,
    /// A client of the agent in a guest that boots the installed image, as `Guest`.
    Protocol,
    /// The test binary `pods` with containerd 2, which asks for a sandbox in this way.
    Containerd2(&'static str),
}

impl Suite {
    /// The line above its output.
    fn title(&self) -> String {
        format!("suite {}: {}", self.name, self.about)
    }

    /// The test binary, which several suites may share.
    fn binary(&self) -> &'static str {
        match self.place {
            Place::Agent => "component",
            Place::Containerd2(_) => "pods",
            _ => self.name,
        }
    }

    /// Whether its tests can be chosen by their whole names, as the standard harness has it.
    fn has_exact_names(&self) -> bool {
        !matches!(self.place, Place::Guest | Place::Protocol)
    }

    /// What runs of it in the dev VM. What the test binary `program` finds there besides is built or
    /// fetched.
    fn job(&'static self, program: &Path, selection: &Selection) -> Result<Job> {
        let mut command = match self.place {
            Place::Agent | Place::Protocol => {
                packages::ensure(
                    "the agent's tests",
                    &[
                        any("busybox-static"),
                        any("e2fsprogs"),
                        any("iproute2"),
                        any("mount"),
                        any("perl-base"),
                        any("runc"),
                    ],
                )?;
                Vec::new()
            }
            Place::Exercisers => exercisers()?,
            Place::Containerd2(sandboxer) => containerd_2(sandboxer)?,
            Place::Here(_) | Place::DevVm | Place::Guest => Vec::new(),
        };
        command.push(program.to_string_lossy().into_owned());
        let chosen = !selection.arguments.is_empty();
        let skip = |test: &&str| ["--skip".to_owned(), (*test).to_owned()];
        Ok(Job {
            suite: self,
            program: command,
            arguments: if chosen {
                selection.arguments.clone()
            } else {
                self.skip.iter().flat_map(skip).collect()
            },
            chosen,
        })
    }
}

/// In the order of their run. Of those in the dev VM the longest come first, so that the lanes end
/// together.
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
        name: "ctr",
        about: "containers through containerd's ctr",
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
        name: "volumes",
        about: "what pods store on, and how they grow and shrink",
        quick: false,
        place: Place::Exercisers,
        skip: &["for_ten_minutes", "fifty_thousand"],
    },
    Suite {
        name: "agent",
        about: "the guest's agent, driven through its protocol",
        quick: false,
        place: Place::Agent,
        skip: &[],
    },
    Suite {
        name: "pods-2",
        about: "the same with containerd 2",
        quick: false,
        place: Place::Containerd2("podsandbox"),
        skip: &["load::a_hundred", "network::bulk"],
    },
    Suite {
        name: "machine",
        about: "machines of every size and their ends, each told apart",
        quick: false,
        place: Place::Guest,
        skip: &[],
    },
    Suite {
        name: "faults",
        about: "killed processes, missing files: words and leaks",
        quick: false,
        place: Place::DevVm,
        skip: &[],
    },
    Suite {
        name: "sandbox",
        about: "pods with containerd 2 and the sandbox API",
        quick: false,
        place: Place::Containerd2("shim"),
        skip: &["load::", "streams::", "network::bulk"],
    },
    Suite {
        name: "net",
        about: "packets between host and guest, on machines of its own",
        quick: false,
        place: Place::Guest,
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
        name: "protocol",
        about: "every method of the agent's protocol, in a booted guest",
        quick: false,
        place: Place::Protocol,
        skip: &[],
    },
    Suite {
        name: "vsock",
        about: "streams between host and guest, on a machine of its own",
        quick: false,
        place: Place::Guest,
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

/// How a suite ended.
#[derive(Debug)]
struct Finished {
    name: &'static str,
    time: Duration,
    /// What passed only when it ran once more.
    result: Result<Vec<String>>,
}

impl Finished {
    /// Says at once what failed.
    fn new(suite: &Suite, begin: Instant, result: Result<Vec<String>>) -> Self {
        if let Err(error) = &result {
            progress::note(&format!("suite {} failed: {error:#}", suite.name));
        }
        Self {
            name: suite.name,
            time: begin.elapsed(),
            result,
        }
    }
}

/// Runs the suites, all of them even if one fails, and sums up. What the dev VM needs is built before the
/// first of its suites: compilers beside a test would slow it.
pub(crate) fn run(selection: &Selection) -> Result<u8> {
    let mut finished = Vec::new();
    let mut in_vm = Vec::new();
    for suite in select(selection)? {
        if let Place::Here(run) = suite.place {
            progress::note(&suite.title());
            let begin = Instant::now();
            finished.push(Finished::new(suite, begin, run().map(|()| Vec::new())));
        } else {
            in_vm.push(suite);
        }
    }
    if !in_vm.is_empty() {
        let names = in_vm.iter().map(|suite| suite.binary()).collect();
        let programs = build::test_binaries(&names)?;
        let mut jobs = Vec::new();
        for suite in in_vm {
            let begin = Instant::now();
            let program = programs
                .get(suite.binary())
                .with_context(|| format!("cargo built no test binary {}", suite.binary()));
            match program.and_then(|program| suite.job(program, selection)) {
                Ok(job) => jobs.push(job),
                Err(error) => finished.push(Finished::new(suite, begin, Err(error))),
            }
        }
        finished.extend(lanes::run(jobs)?);
    }
    Ok(report(&finished))
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
        &[
            any("e2fsprogs"),
            any("erofs-utils"),
            any("git"),
            any("mount"),
            any("sqlite3"),
            any("xfsprogs"),
        ],
    )?;
    let mut assignments = vec!["env".to_owned()];
    for (variable, name, version) in EXERCISERS {
        let program = crates::program(name, version)?;
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
fn report(finished: &[Finished]) -> u8 {
    println!();
    for suite in finished {
        let seconds = suite.time.as_secs_f64();
        let verdict = match &suite.result {
            Ok(again) if again.is_empty() => format!("passed in {seconds:.1} s"),
            Ok(again) => format!(
                "passed in {seconds:.1} s, at the second try only: {}",
                again.join(", ")
            ),
            Err(_) => format!("FAILED in {seconds:.1} s"),
        };
        println!("{:8} {verdict}", suite.name);
    }
    let failed: Vec<&str> = finished
        .iter()
        .filter(|suite| suite.result.is_err())
        .map(|suite| suite.name)
        .collect();
    if finished.is_empty() {
        println!("no suite was run");
        1
    } else if failed.is_empty() {
        let second = |suite: &&Finished| matches!(&suite.result, Ok(again) if !again.is_empty());
        let again = match finished.iter().filter(second).count() {
            0 => String::new(),
            count => format!(", {count} of them at the second try only"),
        };
        println!("all {} suites passed{again}", finished.len());
        0
    } else {
        println!(
            "{} of {} suites failed: {}",
            failed.len(),
            finished.len(),
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
        let suite = |name, result| Finished {
            name,
            time: Duration::from_secs(1),
            result,
        };
        let passed = || suite("a", Ok(Vec::new()));
        assert_eq!(report(&[passed()]), 0);
        let failed = suite("b", Err(anyhow::anyhow!("x")));
        assert_eq!(report(&[passed(), failed]), 1);
        assert_eq!(report(&[]), 1);
    }
}
