// SPDX-License-Identifier: Apache-2.0
//! The virtual machine around the container, from inside and from the host.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, ensure};
use tests::ctr::LIMIT;
use tests::procs::{self, Process};
use tests::scenario::{Outcome, vm_scenario};

#[test]
fn a_container_runs_in_a_vm_of_its_own() -> Outcome {
    vm_scenario("a_container_runs_in_a_vm_of_its_own", |ctr| {
        let script = r#"
            echo "KERNEL=$(uname -r)"
            echo "BOOT=$(cat /proc/sys/kernel/random/boot_id)"
            echo "CPUS=$(grep -c ^processor /proc/cpuinfo)"
            echo "HYPERVISOR=$(grep -c '^flags.* hypervisor' /proc/cpuinfo)"
            echo "MEMORY=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)""#;
        let host = |path| fs::read_to_string(path).with_context(|| String::from(path));
        let host_boot = host("/proc/sys/kernel/random/boot_id")?;
        let host_memory = host("/proc/meminfo")?;
        let host_memory: u64 = host_memory
            .split_whitespace()
            .nth(1)
            .context("MemTotal")?
            .parse()?;

        let output = ctr.run_script(&[], "vm-1", script)?.quietly()?;
        let kernel = output.value("KERNEL")?;
        let host_kernel = host("/proc/sys/kernel/osrelease")?;
        ensure!(kernel != host_kernel.trim(), "{output}\nthe host's kernel");
        ensure!(kernel.starts_with("6.12"), "{output}\nnot our guest kernel");
        let boot = output.value("BOOT")?;
        ensure!(boot != host_boot.trim(), "{output}\nthe host's boot");
        ensure!(
            output.value("CPUS")? == "1",
            "{output}\none CPU is the default"
        );
        ensure!(
            output.value("HYPERVISOR")? == "1",
            "{output}\nno hypervisor in sight"
        );
        let memory: u64 = output.value("MEMORY")?.parse()?;
        ensure!(
            memory < host_memory,
            "{output}\nthe host has {host_memory} kB"
        );

        let second = ctr.run_script(&[], "vm-2", script)?.quietly()?;
        ensure!(
            second.value("BOOT")? != boot,
            "{second}\ntwo containers, one boot"
        );
        Ok(())
    })
}

/// Open files that a VMM needs, by what `/proc/PID/fd` says of them.
fn kind(target: &str) -> &'static str {
    const KINDS: [(&str, &str); 12] = [
        ("anon_inode:kvm-vm", "KVM machine"),
        ("anon_inode:kvm-vcpu", "KVM vCPU"),
        ("anon_inode:[eventfd]", "eventfd"),
        ("anon_inode:[eventpoll]", "epoll"),
        ("anon_inode:[timerfd]", "timer"),
        ("anon_inode:[io_uring]", "io_uring"),
        ("anon_inode:[pidfd]", "pidfd"),
        ("/dev/kvm", "KVM"),
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
    } else if target.starts_with("/run/containerd/") && target.ends_with("/log") {
        "log"
    } else {
        "other"
    }
}

#[test]
fn the_vmm_is_a_child_that_holds_no_path() -> Outcome {
    vm_scenario("the_vmm_is_a_child_that_holds_no_path", |ctr| {
        let id = "confined";
        let mut running = ctr.start_run(&[], id, &["sh", "-c", "echo up; cat"])?;
        running.wait_for_stdout("up", LIMIT)?;
        let shim = procs::shim(id)?;
        let vmm = procs::vmm(id)?;

        // A child of the shim, no thread of it, and not above it.
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
        ensure!(
            !ancestors(&shim).contains(&vmm.pid),
            "the VMM is above the shim"
        );
        for file in shim.files()? {
            let machine = file.target.starts_with("anon_inode:kvm");
            ensure!(!machine, "the shim holds the machine: {file:?}");
        }

        // No path: not in its arguments, its environment, its working directory or its root.
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

        // No file that it doesn't need.
        let mut kinds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for file in vmm.files()? {
            let entry = kinds.entry(kind(&file.target)).or_default();
            entry.push(format!(
                "{} -> {} (flags {:o})",
                file.fd, file.target, file.flags
            ));
        }
        for (kind, files) in &kinds {
            eprintln!("{kind}: {files:#?}");
        }
        let count = |kind| kinds.get(kind).map_or(0, Vec::len);
        ensure!(count("KVM machine") == 1, "{kinds:#?}");
        ensure!(count("KVM vCPU") == 1, "{kinds:#?}");
        ensure!(count("KVM") <= 1, "{kinds:#?}");
        ensure!(count("own descriptors") <= 1, "{kinds:#?}");
        // What has a name else: the guest's image, read-only, and what is in the shared tree.
        for file in vmm
            .files()?
            .iter()
            .filter(|file| kind(&file.target) == "other")
        {
            let write = file.flags & 0o3 != 0 && file.flags & 0o10_000_000 == 0;
            let known = ["kata-containers.img", "/run/kata-containers/shared"]
                .iter()
                .any(|name| file.target.contains(name))
                || file.target == "/";
            ensure!(known && !write, "the VMM holds {file:?}\nof {kinds:#?}");
        }
        let standard: Vec<_> = vmm
            .files()?
            .into_iter()
            .filter(|file| file.fd < 3)
            .collect();
        let harmless = |target: &str| matches!(kind(target), "log" | "null" | "pipe" | "socket");
        ensure!(
            standard.iter().all(|file| harmless(&file.target)),
            "{standard:?}"
        );

        running.close_stdin();
        running.finish(LIMIT)?.quietly()?;
        Ok(())
    })
}

fn ancestors(process: &Process) -> Vec<i32> {
    let mut ancestors = Vec::new();
    let mut next = process.parent;
    while let Some(parent) = Process::read(next) {
        ancestors.push(parent.pid);
        next = parent.parent;
    }
    ancestors
}
