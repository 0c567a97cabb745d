// SPDX-License-Identifier: Apache-2.0
//! What a VMM process may be and hold: a child of the shim, with open files and without paths.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::procs::Process;

/// What its machine is made of.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// Virtual CPUs.
    pub vcpus: usize,
    /// Queue pairs of network devices.
    pub taps: usize,
}

/// Open files that a VMM needs, by what `/proc/PID/fd` says of them.
fn kind(target: &str) -> &'static str {
    const KINDS: [(&str, &str); 14] = [
        ("anon_inode:kvm-vm", "KVM machine"),
        ("anon_inode:kvm-vcpu", "KVM vCPU"),
        ("anon_inode:[eventfd]", "eventfd"),
        ("anon_inode:[eventpoll]", "epoll"),
        ("anon_inode:[timerfd]", "timer"),
        ("anon_inode:[io_uring]", "io_uring"),
        ("anon_inode:[pidfd]", "pidfd"),
        ("/dev/kvm", "KVM"),
        ("/dev/net/tun", "tap"),
        ("/dev/vhost-net", "vhost"),
        ("/dev/null", "null"),
        ("/memfd:", "memory"),
        ("socket:", "socket"),
        ("pipe:", "pipe"),
    ];
    KINDS
        .iter()
        .find(|(start, _)| target.starts_with(start))
        .map_or_else(|| named(target), |(_, kind)| kind)
}

/// What has a name: containerd's end of the log, which is a FIFO in the bundle, and the folder of
/// its own descriptors, by which the file server opens again what it has looked up.
fn named(target: &str) -> &'static str {
    let folder = target
        .strip_prefix("/proc/")
        .and_then(|rest| rest.strip_suffix("/fd"));
    if folder.is_some_and(|process| process.parse::<u32>().is_ok()) {
        "own descriptors"
    } else if target.contains("/io.containerd.") && target.ends_with("/log") {
        "log"
    } else {
        "other"
    }
}

/// Checks the two processes against each other and against what the machine needs.
pub fn expect_confined(shim: &Process, vmm: &Process, expected: Expected) -> Result<()> {
    related(shim, vmm)?;
    for file in shim.files()? {
        let kind = kind(&file.target);
        let machines = ["KVM machine", "KVM vCPU", "KVM", "tap", "vhost"].contains(&kind);
        ensure!(!machines, "the shim holds what is the machine's: {file:?}");
    }
    holds_no_path(vmm)?;
    holds_what_it_needs(vmm, expected)
}

/// A child of the shim, no thread of it, and not above it.
fn related(shim: &Process, vmm: &Process) -> Result<()> {
    ensure!(
        vmm.parent == shim.pid,
        "{} is no child of {}",
        vmm.describe(),
        shim.describe()
    );
    ensure!(
        !shim.threads()?.contains(&vmm.pid),
        "the VMM is a thread of the shim"
    );
    let mut next = shim.parent;
    while let Some(parent) = Process::read(next) {
        ensure!(parent.pid != vmm.pid, "the VMM is above the shim");
        next = parent.parent;
    }
    Ok(())
}

/// Not in its arguments, its environment, its working directory or its root.
fn holds_no_path(vmm: &Process) -> Result<()> {
    let paths: Vec<_> = vmm
        .arguments()
        .into_iter()
        .skip(1)
        .chain(vmm.environment())
        .filter(|word| word.contains('/'))
        .collect();
    ensure!(paths.is_empty(), "the VMM was told paths: {paths:?}");
    let folder = vmm.link("cwd")?;
    ensure!(folder == "/", "the VMM's working directory is {folder}");
    Ok(())
}

/// No file more.
fn holds_what_it_needs(vmm: &Process, expected: Expected) -> Result<()> {
    let files = vmm.files()?;
    let mut kinds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for file in &files {
        let entry = kinds.entry(kind(&file.target)).or_default();
        entry.push(format!(
            "{} -> {} (flags {:o})",
            file.fd, file.target, file.flags
        ));
    }
    let count = |kind| kinds.get(kind).map_or(0, Vec::len);
    ensure!(count("KVM machine") == 1, "{kinds:#?}");
    ensure!(count("KVM vCPU") == expected.vcpus, "{kinds:#?}");
    ensure!(count("tap") == expected.taps, "{kinds:#?}");
    // The kernel's part of a queue pair, where it has one.
    ensure!(count("vhost") <= expected.taps, "{kinds:#?}");
    ensure!(count("KVM") <= 1, "{kinds:#?}");
    ensure!(count("own descriptors") <= 1, "{kinds:#?}");
    // What has a name else: the guest's image, read-only, and what is in the shared tree.
    for file in files.iter().filter(|file| kind(&file.target) == "other") {
        let write = file.flags & 0o3 != 0 && file.flags & 0o10_000_000 == 0;
        let known = ["kata-containers.img", "/run/kata-containers/shared"]
            .iter()
            .any(|name| file.target.contains(name))
            || file.target == "/";
        ensure!(known && !write, "the VMM holds {file:?}\nof {kinds:#?}");
    }
    let harmless = |target: &str| matches!(kind(target), "log" | "null" | "pipe" | "socket");
    let standard: Vec<_> = files.iter().filter(|file| file.fd < 3).collect();
    ensure!(
        standard.iter().all(|file| harmless(&file.target)),
        "{standard:?}"
    );
    Ok(())
}
