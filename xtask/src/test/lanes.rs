// SPDX-License-Identifier: Apache-2.0
//! Suites that need root and a machine of their own: each lane is a dev VM that takes one suite after the
//! other. A suite leaves a third of two CPUs idle, so that several lanes fit on a machine.

use super::{Finished, Suite};
use crate::build::Profile;
use crate::progress;
use crate::vm::{Contents, Ended, Options, Parts, Streams, Vm};
use anyhow::{Result, bail};
use std::collections::VecDeque;
use std::fs;
use std::io::{Write, stdout};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

/// Memory of this machine that each lane but the first asks for, in MiB: its VM's, and what the host keeps
/// of the files that the VM reads.
const MEMORY: u64 = 7168;
/// The longest that a suite may take: some twice what the longest does.
const LIMIT: Duration = Duration::from_secs(25 * 60);
/// How often the suites under way are mentioned.
const REMINDER: Duration = Duration::from_secs(60);

/// A suite whose test binary was built.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) suite: &'static Suite,
    /// The test binary, with what it finds in its environment.
    pub(crate) program: Vec<String>,
    pub(crate) arguments: Vec<String>,
    /// A user has chosen the tests: they may take their time, and run once.
    pub(crate) chosen: bool,
}

/// Runs the jobs, the first ones first. Where lanes run side by side, the output of a suite appears whole at
/// its end.
pub(crate) fn run(jobs: Vec<Job>) -> Result<Vec<Finished>> {
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let parts = Parts::build(Contents::Containerd(Profile::Quick))?;
    let lanes = lanes().min(jobs.len());
    if lanes > 1 {
        progress::note(&format!(
            "{} suites in {lanes} dev VMs; the output of each comes at its end",
            jobs.len()
        ));
    }
    let floor = Floor {
        parts,
        side_by_side: lanes > 1,
        waiting: Mutex::new(jobs.into()),
        running: Mutex::default(),
        finished: Mutex::default(),
    };
    thread::scope(|scope| {
        let (over, ended) = channel::<()>();
        let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(|| floor.lane())).collect();
        if floor.side_by_side {
            let floor = &floor;
            scope.spawn(move || {
                while ended.recv_timeout(REMINDER) == Err(RecvTimeoutError::Timeout) {
                    floor.mention();
                }
            });
        }
        let lanes: Vec<_> = lanes
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        drop(over);
        lanes.into_iter().try_for_each(|lane| match lane {
            Ok(result) => result,
            Err(_) => bail!("a lane of the suites panicked"),
        })
    })?;
    Ok(floor
        .finished
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner))
}

/// What the lanes share.
struct Floor {
    parts: Parts,
    side_by_side: bool,
    waiting: Mutex<VecDeque<Job>>,
    running: Mutex<Vec<(&'static str, Instant)>>,
    finished: Mutex<Vec<Finished>>,
}

impl Floor {
    /// Runs suites until none waits.
    fn lane(&self) -> Result<()> {
        let mut vm = None;
        while let Some(job) = self.next() {
            let begin = Instant::now();
            if !self.side_by_side {
                progress::note(&job.suite.title());
            }
            lock(&self.running).push((job.suite.name, begin));
            let mut kept = Vec::new();
            let result = self.suite(&mut vm, &job, &mut kept);
            lock(&self.running).retain(|(name, _)| *name != job.suite.name);
            self.finish(&job, begin, result, &kept);
        }
        vm.map_or(Ok(()), Vm::stop)
    }

    fn next(&self) -> Option<Job> {
        lock(&self.waiting).pop_front()
    }

    /// Runs a suite. What fails or does not end runs once more in a fresh VM, for all to see: an emulated
    /// processor loses guests, and now and then its own kernel. Returns what passed only then.
    fn suite(&self, place: &mut Option<Vm>, job: &Job, kept: &mut Vec<u8>) -> Result<Vec<String>> {
        let first = self.attempt(place, job, job.arguments.clone(), kept);
        if matches!(first, Ok(Ended::Exited(0))) || job.chosen {
            return judge(first?).map(|()| Vec::new());
        }
        let failed = match &first {
            Ok(Ended::Exited(_)) => failures(&String::from_utf8_lossy(kept)),
            _ => Vec::new(),
        };
        *place = None;
        let (what, arguments) = if failed.is_empty() || !job.suite.has_exact_names() {
            let name = job.suite.name.to_owned();
            (vec![name], job.arguments.clone())
        } else {
            let exact = ["--exact".to_owned()].into_iter();
            (failed.clone(), exact.chain(failed).collect())
        };
        let why = first.map_or_else(|error| format!("{error:#}"), |ended| ended.to_string());
        let words = format!("xtask: {why}\nxtask: once more: {}\n", what.join(", "));
        self.show(kept, words.as_bytes());
        judge(self.attempt(place, job, arguments, kept)?).map(|()| what)
    }

    fn attempt(
        &self,
        place: &mut Option<Vm>,
        job: &Job,
        arguments: Vec<String>,
        kept: &mut Vec<u8>,
    ) -> Result<Ended> {
        // A VM that is lost, or holds what hung, takes no further suite down with it.
        let vm = match place.take() {
            Some(vm) => vm,
            None => Vm::start(&Options::default(), &self.parts)?,
        };
        let command = [job.program.clone(), arguments].concat();
        let limit = (!job.chosen).then_some(LIMIT);
        let streams = Streams::Kept {
            output: kept,
            shown: !self.side_by_side,
        };
        let ended = vm.execute_within(limit, command, streams)?;
        if matches!(ended, Ended::Exited(_)) {
            *place = Some(vm);
        }
        Ok(ended)
    }

    /// Adds words to a suite's output.
    fn show(&self, kept: &mut Vec<u8>, words: &[u8]) {
        kept.extend_from_slice(words);
        if !self.side_by_side {
            // A reader that went away is no reason to stop early, here and below.
            let _ = stdout().write_all(words);
        }
    }

    fn finish(&self, job: &Job, begin: Instant, result: Result<Vec<String>>, kept: &[u8]) {
        // One at a time: what two suites say does not mix.
        let mut finished = lock(&self.finished);
        if self.side_by_side {
            progress::note(&job.suite.title());
            let _ = stdout().write_all(kept).and_then(|()| stdout().flush());
        }
        finished.push(Finished::new(job.suite, begin, result));
    }

    fn mention(&self) {
        let words: Vec<_> = lock(&self.running)
            .iter()
            .map(|(name, begin)| format!("{name} … {} s", begin.elapsed().as_secs()))
            .collect();
        progress::note(&words.join(", "));
    }
}

fn judge(ended: Ended) -> Result<()> {
    match ended {
        Ended::Exited(0) => Ok(()),
        ended => bail!("{ended}"),
    }
}

/// The tests that a harness says have failed.
fn failures(output: &str) -> Vec<String> {
    let names = output.lines().filter_map(|line| {
        let (name, verdict) = line.strip_prefix("test ")?.split_once(" ... ")?;
        verdict.starts_with("FAILED").then(|| name.to_owned())
    });
    names.collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many lanes this machine carries: a CPU each, and memory.
fn lanes() -> usize {
    let cpus = available_parallelism().map_or(1, usize::from);
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = available(&text).map_or(1, |memory| memory / MEMORY);
    cpus.min(usize::try_from(memory).unwrap_or(usize::MAX))
        .max(1)
}

/// What `/proc/meminfo` says is available, in MiB.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_tests_are_found() {
        let output = "running 3 tests\ntest a::b ... ok\ntest c ... FAILED\n\
                      test d::e ... FAILED (3.1 s)\ntest f has been running\nFAILED\n";
        assert_eq!(failures(output), ["c", "d::e"]);
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:  24000000 kB\nMemAvailable:   20971520 kB\nBuffers: 1 kB\n";
        assert_eq!(available(text), Some(20480));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}
