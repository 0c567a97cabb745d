// SPDX-License-Identifier: Apache-2.0
//! CPUs of the host that a machine's threads may run on.
//!
//! A container's cpuset names CPUs of the host, which the guest doesn't have. So it is the machine
//! that is held to them: its threads run on the CPUs of all its containers together, and on any
//! while there is a container without a cpuset. Within the guest, the kernel divides the time.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Context, Kind, Result, ShimError};

/// Memory nodes of the host.
const NODES: &str = "/sys/devices/system/node/online";

/// The CPUs of a machine's containers.
#[derive(Debug)]
pub(super) struct Cpus {
    /// The shim's own, which its machine begins with.
    all: CpuSet,
    /// Whether each vCPU keeps to one CPU, while there are as many.
    pin: bool,
    containers: Mutex<HashMap<String, Option<CpuSet>>>,
}

impl Cpus {
    pub(super) fn new(pin: bool) -> Result<Self> {
        Ok(Self {
            all: sched_getaffinity(None).internal(|| "own CPUs".to_owned())?,
            pin,
            containers: Mutex::default(),
        })
    }

    /// Holds process `pid` to the CPUs of its containers, with `list` for this one. An empty list
    /// is all of them.
    pub(super) fn assign(&self, pid: u32, container: &str, list: &str) -> Result<()> {
        let set = match list.trim() {
            "" => None,
            list => Some(parse(list)?),
        };
        self.change(pid, |containers| {
            containers.insert(container.to_owned(), set);
        })
        .context(Kind::InvalidArgument, || {
            format!("cpuset {list:?}: hold the machine to these CPUs of the host")
        })
    }

    /// A container is gone.
    pub(super) fn release(&self, pid: u32, container: &str) -> io::Result<()> {
        self.change(pid, |containers| {
            containers.remove(container);
        })
    }

    /// The machine has other vCPUs than before.
    pub(super) fn refresh(&self, pid: u32) -> Result<()> {
        let containers = self
            .containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let union = self.union(&containers);
        if union == self.all {
            return Ok(());
        }
        apply(pid, &union, self.pin).internal(|| "hold the machine to its CPUs".to_owned())
    }

    fn change(
        &self,
        pid: u32,
        change: impl FnOnce(&mut HashMap<String, Option<CpuSet>>),
    ) -> io::Result<()> {
        let mut containers = self
            .containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = self.union(&containers);
        let mut changed = containers.clone();
        change(&mut changed);
        let after = self.union(&changed);
        if after != before {
            apply(pid, &after, self.pin && after != self.all)?;
        }
        *containers = changed;
        Ok(())
    }

    fn union(&self, containers: &HashMap<String, Option<CpuSet>>) -> CpuSet {
        let mut union = CpuSet::new();
        for set in containers.values() {
            let Some(set) = set else {
                return self.all;
            };
            for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)) {
                union.set(cpu);
            }
        }
        if containers.is_empty() {
            self.all
        } else {
            union
        }
    }
}

/// Every thread of the process; with `pin` each vCPU on a CPU of its own, if there are as many.
fn apply(pid: u32, set: &CpuSet, pin: bool) -> io::Result<()> {
    spread(pid, set)?;
    if !pin {
        return Ok(());
    }
    let vcpus = vcpus(pid)?;
    if u32::try_from(vcpus.len()).is_ok_and(|count| count == set.count()) {
        let cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu));
        for (thread, cpu) in vcpus.into_iter().zip(cpus) {
            let mut one = CpuSet::new();
            one.set(cpu);
            hold(thread, &one)?;
        }
    }
    Ok(())
}

/// Every thread of the process. One that begins meanwhile has the set of the thread that starts
/// it, so it is done when a look finds no thread that it hasn't seen before.
fn spread(pid: u32, set: &CpuSet) -> io::Result<()> {
    let mut seen = Vec::new();
    loop {
        let mut new = false;
        for thread in threads(pid)? {
            if !seen.contains(&thread) {
                seen.push(thread);
                new = true;
                hold(thread, set)?;
            }
        }
        if !new {
            return Ok(());
        }
    }
}

/// The threads of a process; none where it has ended.
fn threads(pid: u32) -> io::Result<Vec<i32>> {
    let entries = match fs::read_dir(format!("/proc/{pid}/task")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut threads = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        threads.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(threads)
}

/// The threads that run vCPUs, in the order of these.
pub(super) fn vcpus(pid: u32) -> io::Result<Vec<i32>> {
    let mut vcpus = Vec::new();
    for thread in threads(pid)? {
        let name = fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"));
        let name = name.unwrap_or_default();
        let number = name.trim().strip_prefix("vcpu");
        if let Some(number) = number.and_then(|number| number.parse::<u8>().ok()) {
            vcpus.push((number, thread));
        }
    }
    vcpus.sort_unstable();
    Ok(vcpus.into_iter().map(|(_, thread)| thread).collect())
}

fn hold(thread: i32, set: &CpuSet) -> io::Result<()> {
    match sched_setaffinity(Pid::from_raw(thread), set) {
        // It has ended.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Refuses memory nodes other than all: where a guest's memory comes from can't be chosen by a
/// container, that shares it with the others.
pub(crate) fn check_nodes(list: &str) -> Result<()> {
    if list.trim().is_empty() {
        return Ok(());
    }
    let wanted = parse(list)?;
    let all = fs::read_to_string(NODES).unwrap_or_else(|_| "0".to_owned());
    let all = parse(all.trim())?;
    if (0..CpuSet::MAX_CPU).all(|node| !all.is_set(node) || wanted.is_set(node)) {
        return Ok(());
    }
    Err(ShimError::new(
        Kind::InvalidArgument,
        format!(
            "cpuset: memory nodes {list}: a container in a guest can't choose among the host's"
        ),
    ))
}

/// Numbers and ranges, as cgroups write them: `0-3,7`.
fn parse(list: &str) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    let number = |text: &str| text.trim().parse().ok().filter(|&it| it < CpuSet::MAX_CPU);
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Some(first), Some(last)) = (number(first), number(last)) else {
            return Err(ShimError::new(
                Kind::InvalidArgument,
                format!("cpuset {list:?}: not a list of numbers and ranges"),
            ));
        };
        for cpu in first..=last {
            set.set(cpu);
        }
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(set: &CpuSet) -> Vec<usize> {
        (0..CpuSet::MAX_CPU)
            .filter(|&cpu| set.is_set(cpu))
            .collect()
    }

    #[test]
    fn lists_are_read_as_cgroups_write_them() {
        assert_eq!(cpus(&parse("0-2,7").unwrap()), [0, 1, 2, 7]);
        assert_eq!(cpus(&parse(" 5").unwrap()), [5]);
        for text in ["a", "1-", "0,,1", "5000", "-1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_process_runs_where_its_containers_may() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let of = || {
            let pid = i32::try_from(child.id()).unwrap();
            sched_getaffinity(Pid::from_raw(pid)).unwrap()
        };
        let own = Cpus::new(false).unwrap();
        let first = cpus(&own.all)[0];
        own.assign(child.id(), "a", &first.to_string()).unwrap();
        assert_eq!(cpus(&of()), [first]);
        own.assign(child.id(), "b", "").unwrap();
        assert_eq!(of(), own.all);
        own.release(child.id(), "b").unwrap();
        assert_eq!(cpus(&of()), [first]);
        // CPUs that aren't there change nothing.
        assert!(own.assign(child.id(), "a", "1023").is_err());
        assert_eq!(cpus(&of()), [first]);
        own.release(child.id(), "a").unwrap();
        assert_eq!(of(), own.all);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn all_memory_nodes_are_no_choice() {
        let all = fs::read_to_string(NODES).unwrap_or_else(|_| "0".to_owned());
        check_nodes("").unwrap();
        check_nodes(all.trim()).unwrap();
        assert!(check_nodes("1023").is_err());
    }
}
