// SPDX-License-Identifier: Apache-2.0
//! What containers may leave on the host: seen before and after, the difference is a leak.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::ctr::{CRI_NAMESPACE, Ctr, NAMESPACE};
use crate::descriptors::Descriptors;
use crate::procs::Process;
use crate::wait::until;

/// Folders that runtimes and containerd write below while a container lives.
const FOLDERS: [&str; 9] = [
    "/run/containerd",
    "/run/kata",
    "/run/kata-containers",
    "/run/nutshell",
    "/run/vc",
    "/run/netns",
    "/dev/shm",
    "/var/lib/cni",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
];

/// Made at first use and kept: they belong to no container.
const PARENTS: [&str; 11] = [
    "/run/containerd/runc",
    "/run/containerd/s",
    "/run/kata",
    "/run/kata-containers",
    "/run/kata-containers/shared",
    "/run/kata-containers/shared/sandboxes",
    "/run/netns",
    "/var/lib/cni",
    "/var/lib/cni/cache",
    "/var/lib/cni/results",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
];

/// Made by `ip netns` at its first use and kept.
const NAMED_NAMESPACES: &str = "/run/netns";

/// What a private containerd keeps of its pods, below its root.
const PRIVATE: [&str; 2] = [
    "root/io.containerd.grpc.v1.cri",
    "root/io.containerd.runtime.v2.task",
];

/// Folders and cgroups that are made for a namespace's first container and kept.
const NAMESPACES: [&str; 2] = [NAMESPACE, CRI_NAMESPACE];

/// Not the runtime's to remove: the client's pipes, which `ctr` leaves where its task is gone before
/// it asks for the deletion.
const CLIENT: &str = "/run/containerd/fifo";

/// runc's shim leaves its socket when it is killed; ours must not.
const SOCKETS: &str = "/run/containerd/s";

/// How deep the folders are walked.
const DEPTH: usize = 8;

/// How long the last of a container may take to go: `ctr` returns before the shim has ended.
const LIMIT: Duration = Duration::from_secs(15);

/// The host at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// One line a thing.
    things: BTreeSet<String>,
    /// What each containerd holds open.
    containerds: BTreeMap<Process, Descriptors>,
}

impl Snapshot {
    /// Looks at the host, and at the state folder of the containerd in use.
    pub fn take(ctr: &Ctr) -> Result<Self> {
        let mut things = BTreeSet::new();
        mounts(&mut things)?;
        processes(&mut things)?;
        cgroups(&mut things, Path::new("/sys/fs/cgroup"));
        sockets(&mut things)?;
        for entry in fs::read_dir("/sys/class/net").context("listing network devices")? {
            things.insert(format!(
                "network device {}",
                entry?.file_name().to_string_lossy()
            ));
        }
        redirections(&mut things)?;
        let state = ctr
            .address()
            .parent()
            .unwrap_or_else(|| Path::new("/run/containerd"));
        let home = state.parent().unwrap_or(state);
        let folders = FOLDERS.iter().map(PathBuf::from);
        let private = PRIVATE.iter().map(|name| home.join(name));
        for folder in folders.chain(private).chain([state.to_owned()]) {
            if let Ok(metadata) = fs::symlink_metadata(&folder) {
                files(&mut things, &folder, metadata.dev(), DEPTH);
            }
        }
        if !ctr.has_vm() {
            things.retain(|thing| !thing.contains(SOCKETS));
        }
        Ok(Self {
            things,
            containerds: containerds()?,
        })
    }

    /// Waits until the host holds nothing that this snapshot doesn't; an error lists what it is.
    pub fn expect_nothing_new(&self, ctr: &Ctr) -> Result<()> {
        let mut new = Vec::new();
        let clean = until("nothing left behind", LIMIT, || {
            let now = Self::take(ctr)?;
            new = now.things.difference(&self.things).cloned().collect();
            for (containerd, descriptors) in &now.containerds {
                // One that was started or stopped meanwhile can't be compared.
                if let Some(before) = self.containerds.get(containerd) {
                    let open = descriptors.beyond(before).into_iter();
                    new.extend(
                        open.map(|line| format!("open in {}: {line}", containerd.describe())),
                    );
                }
            }
            Ok(new.is_empty().then_some(()))
        });
        if clean.is_err() {
            bail!("{} left behind:\n  {}", new.len(), new.join("\n  "));
        }
        Ok(())
    }
}

fn mounts(things: &mut BTreeSet<String>) -> Result<()> {
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        // Fields 4 and 5 are the root within the file system and the mount point; the type and
        // the source follow the separator (proc(5)).
        let (head, tail) = line.split_once(" - ").unwrap_or((line, ""));
        let mut fields = head.split(' ').skip(3);
        let (root, point) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        if point == NAMED_NAMESPACES {
            continue;
        }
        let kind: Vec<_> = tail.split(' ').take(2).collect();
        things.insert(format!("mount {point} ({} of {root})", kind.join(" ")));
    }
    Ok(())
}

/// Shims, their helpers, and whatever lives in another mount namespace than ours.
fn processes(things: &mut BTreeSet<String>) -> Result<()> {
    let ours = fs::read_link("/proc/self/ns/mnt")?;
    for process in Process::all()? {
        if process.pid == 2 || process.parent == 2 {
            continue; // The kernel's own threads.
        }
        let named = process.name == "vmm"
            || ["containerd-shim", "runc", "kata"]
                .iter()
                .any(|name| process.name.starts_with(name));
        let elsewhere =
            fs::read_link(process.path("ns/mnt")).is_ok_and(|namespace| namespace != ours);
        if named || elsewhere {
            // A state letter that changes must not make one process two.
            let zombie = if process.state == 'Z' { ", zombie" } else { "" };
            things.insert(format!(
                "process {} ({}{zombie}) {}",
                process.pid,
                process.name,
                process.arguments().join(" ")
            ));
        }
    }
    Ok(())
}

/// Every containerd, by what does not change in its life.
fn containerds() -> Result<BTreeMap<Process, Descriptors>> {
    let mut found = BTreeMap::new();
    for process in Process::all()? {
        if process.name == "containerd"
            && let Ok(descriptors) = Descriptors::of(&process)
        {
            found.insert(
                Process {
                    state: ' ',
                    ..process
                },
                descriptors,
            );
        }
    }
    Ok(found)
}

/// What joins network devices: qdiscs that take in packets. Their filters go with them.
fn redirections(things: &mut BTreeSet<String>) -> Result<()> {
    let output = Command::new("tc")
        .args(["qdisc", "show"])
        .output()
        .context("starting tc, of Debian's package iproute2")?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if ["ingress", "clsact"].iter().any(|kind| line.contains(kind)) {
            things.insert(format!("tc {line}"));
        }
    }
    Ok(())
}

fn cgroups(things: &mut BTreeSet<String>, folder: &Path) {
    // A cgroup may go while it is listed.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            if !is_namespace(&entry.file_name()) {
                things.insert(format!("cgroup {}", path.display()));
            }
            cgroups(things, &path);
        }
    }
}

fn is_namespace(name: &OsStr) -> bool {
    NAMESPACES.iter().any(|namespace| name == *namespace)
}

fn sockets(things: &mut BTreeSet<String>) -> Result<()> {
    for line in fs::read_to_string("/proc/net/unix")?.lines().skip(1) {
        let Some(name) = line.split_whitespace().nth(7) else {
            continue;
        };
        let watched = FOLDERS.iter().any(|folder| name.starts_with(folder));
        if watched || ["shim", "kata"].iter().any(|word| name.contains(word)) {
            things.insert(format!("socket {name}"));
        }
    }
    Ok(())
}

fn files(things: &mut BTreeSet<String>, folder: &Path, device: u64, depth: usize) {
    // A file may go while it is listed; another device's files are that mount's, which counts.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path == Path::new(CLIENT) {
            continue;
        }
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let kept = PARENTS.iter().any(|parent| path == Path::new(parent))
            || metadata.is_dir() && is_namespace(&entry.file_name());
        if !kept {
            things.insert(format!("file {}", path.display()));
        }
        if metadata.is_dir() && metadata.dev() == device && depth > 0 {
            files(things, &path, device, depth.saturating_sub(1));
        }
    }
}
