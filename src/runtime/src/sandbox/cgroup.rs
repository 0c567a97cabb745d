// SPDX-License-Identifier: Apache-2.0
//! A sandbox's cgroups on the host: what the pod uses is counted, and limited, where its runtime
//! looks for it. That is the cgroup that its specification names, in the one of a pod.
//!
//! Ours have no limits of their own: those of the containers are set in the guest, and a limit for
//! all that a container may use in there would leave nothing for the guest's kernel, the monitor and
//! the shim. The cgroup above has the pod's limit with its overhead, if anybody has set one.
//!
//! With cgroup v2 a process's threads can't be in cgroups that are counted apart. So where the
//! overhead is to be outside of the pod (`sandbox_cgroup_only = false`), that is the shim; with
//! cgroup v1 it is the monitor as well, but for the threads that run vCPUs.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::process;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::debug;

use super::cpus::vcpus;
use super::journal::{Journal, Object};
use crate::error::{Context, Kind, Result, ShimError};

const ROOT: &str = "/sys/fs/cgroup";
/// Where this process is.
const OWN: &str = "/proc/self/cgroup";

/// Where the overhead of sandboxes is, outside of them.
const OVERHEAD: &str = "/kata_overhead";

/// Of a hierarchy of cgroup v2.
const CONTROLLERS: &str = "cgroup.controllers";

/// How long the kernel may take to see that a cgroup's last process has ended.
const BUSY: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);

/// How often a cgroup above may vanish just then, with the last of another sandbox.
const ATTEMPTS: usize = 3;

/// What cgroup v1 wants to know before a process may be in a cgroup.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// A sandbox's cgroups; none of them where its specification names none.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    pod: Option<Cgroup>,
    overhead: Option<Cgroup>,
}

/// A cgroup: a folder in each hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cgroup {
    folders: Vec<Folder>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Folder {
    path: PathBuf,
    /// How many of the cgroups above it were made with it.
    above: usize,
    /// Where the shim came from, and goes before this is removed.
    home: PathBuf,
    /// The hierarchy's root.
    root: PathBuf,
}

/// A hierarchy, and the cgroup in it that this process is in.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    home: PathBuf,
}

impl Cgroups {
    /// Makes those of a sandbox, whose specification names `name`, and moves this process to its
    /// place. `only` is whether all is to be in that one.
    pub(super) fn create(name: &str, only: bool, id: &str, journal: &mut Journal) -> Result<Self> {
        if name.is_empty() {
            return Ok(Self::default());
        }
        let own = fs::read_to_string(OWN).internal(|| format!("read {OWN}"))?;
        let hierarchies = hierarchies(Path::new(ROOT), &own);
        let make = |name: &str, journal: &mut Journal| -> Result<Option<Cgroup>> {
            if hierarchies.is_empty() {
                return Ok(None);
            }
            Cgroup::create(&hierarchies, name, journal).map(Some)
        };
        let cgroups = Self {
            pod: make(name, journal)?,
            overhead: if only {
                None
            } else {
                make(&format!("{OVERHEAD}/{id}"), journal)?
            },
        };
        if let Some(place) = cgroups.overhead.as_ref().or(cgroups.pod.as_ref()) {
            place.take(process::id())?;
        }
        Ok(cgroups)
    }

    /// Moves the machine's process to its place.
    pub(super) fn take_machine(&self, pid: u32) -> Result<()> {
        let outside = self.overhead.as_ref().filter(|it| it.has_threads());
        match outside.or(self.pod.as_ref()) {
            Some(place) => place.take(pid),
            None => Ok(()),
        }
    }

    /// Moves the threads that run vCPUs to theirs, which is not the machine's with cgroup v1 alone.
    pub(super) fn take_vcpus(&self, pid: u32) -> Result<()> {
        let (Some(pod), Some(_)) = (&self.pod, &self.overhead) else {
            return Ok(());
        };
        if !pod.has_threads() {
            return Ok(());
        }
        let threads = vcpus(pid).internal(|| "list the machine's vCPUs".to_owned())?;
        threads
            .into_iter()
            .try_for_each(|thread| pod.write("tasks", &thread.to_string()))
    }
}

impl Cgroup {
    fn create(hierarchies: &[Hierarchy], name: &str, journal: &mut Journal) -> Result<Self> {
        let below = relative(name)?;
        let folder = |hierarchy: &Hierarchy| {
            let path = hierarchy.root.join(&below);
            let missing = path.ancestors().take_while(|path| !path.exists()).count();
            Folder {
                path,
                above: missing.saturating_sub(1),
                home: hierarchy.home.clone(),
                root: hierarchy.root.clone(),
            }
        };
        let folders = hierarchies.iter().map(folder).collect();
        let cgroup = Self { folders };
        journal.record(Object::Cgroup(cgroup.clone()))?;
        for folder in &cgroup.folders {
            let path = &folder.path;
            let context = || format!("make the cgroup {}", path.display());
            folder.make().context(Kind::FailedPrecondition, context)?;
        }
        Ok(cgroup)
    }

    /// Moves a process in.
    fn take(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        for folder in &self.folders {
            fs::write(folder.path.join(file), value)
                .internal(|| format!("move {value} to the cgroup {}", folder.path.display()))?;
        }
        Ok(())
    }

    /// Whether a process's threads may be in several, as with cgroup v1.
    fn has_threads(&self) -> bool {
        let threaded = |folder: &Folder| !folder.root.join(CONTROLLERS).exists();
        self.folders.iter().all(threaded)
    }

    /// Removes it. Those above may be others' by now, and stay then.
    pub(super) fn remove(&self) -> io::Result<()> {
        let removed: Vec<_> = self.folders.iter().map(Folder::remove).collect();
        removed.into_iter().collect()
    }
}

impl Folder {
    fn make(&self) -> io::Result<()> {
        let mut attempts = (0..ATTEMPTS).map(|_| fs::create_dir_all(&self.path));
        let made = attempts.find(|made| {
            let vanished = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
            !made.as_ref().is_err_and(vanished)
        });
        made.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))?;
        // From the top: each can have what the one above has.
        let mut new: Vec<_> = self
            .path
            .ancestors()
            .take(self.above.saturating_add(1))
            .collect();
        new.reverse();
        new.into_iter().try_for_each(inherit)
    }

    fn remove(&self) -> io::Result<()> {
        self.leave();
        let begin = Instant::now();
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) if begin.elapsed() > BUSY => return Err(error),
                Err(_) => sleep(PAUSE),
            }
        }
        for above in self.path.ancestors().skip(1).take(self.above) {
            if let Err(error) = fs::remove_dir(above) {
                debug!(cgroup = %above.display(), %error, "stays");
                break;
            }
        }
        Ok(())
    }

    /// Moves this process out, if it is in: to where it came from, or else to the top.
    fn leave(&self) {
        let own = process::id().to_string();
        let inside = fs::read_to_string(self.path.join("cgroup.procs"));
        if !inside.is_ok_and(|inside| inside.lines().any(|pid| pid == own)) {
            return;
        }
        let moved = [&self.home, &self.root]
            .into_iter()
            .map(|place| fs::write(place.join("cgroup.procs"), &own))
            .find(Result::is_ok);
        if moved.is_none() {
            debug!(cgroup = %self.path.display(), "this process can't leave");
        }
    }
}

/// Gives a new cgroup the CPUs and memory nodes of the one above, where it has none.
fn inherit(path: &Path) -> io::Result<()> {
    let Some(above) = path.parent() else {
        return Ok(());
    };
    for file in CPUSET {
        let own = fs::read_to_string(path.join(file));
        // In cgroup v2 an empty one is no choice. In v1 there is no `cgroup.controllers`.
        if own.is_ok_and(|own| own.trim().is_empty()) && !path.join(CONTROLLERS).exists() {
            fs::write(path.join(file), fs::read_to_string(above.join(file))?)?;
        }
    }
    Ok(())
}

/// The hierarchies mounted below `root`, from what `/proc/self/cgroup` says.
fn hierarchies(root: &Path, own: &str) -> Vec<Hierarchy> {
    let below = |root: PathBuf, path: &str| {
        let home = root.join(path.trim_start_matches('/'));
        Hierarchy { root, home }
    };
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        if controllers.is_empty() {
            if root.join(CONTROLLERS).exists() {
                return vec![below(root.to_owned(), path)];
            }
            continue;
        }
        let folder = controllers.strip_prefix("name=").unwrap_or(controllers);
        let hierarchy = below(root.join(folder), path);
        if hierarchy.root.exists() {
            found.push(hierarchy);
        }
    }
    found
}

/// A cgroup's path below the root. In systemd's words, `slice:prefix:name`, a slice is in those
/// that its name begins with: `a-b.slice` in `a.slice`.
fn relative(name: &str) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    if let [slice, prefix, name] = *name.split(':').collect::<Vec<_>>().as_slice() {
        let stem = slice.strip_suffix(".slice").unwrap_or(slice);
        for (end, _) in stem.match_indices('-') {
            path.push(format!("{}.slice", stem.get(..end).unwrap_or_default()));
        }
        path.push(format!("{stem}.slice"));
        path.push(format!("{prefix}-{name}.scope"));
    } else {
        path.push(name.trim_start_matches('/'));
    }
    let mut parts = path.components();
    if parts.all(|part| matches!(part, Component::Normal(_))) {
        return Ok(path);
    }
    Err(ShimError::new(
        Kind::InvalidArgument,
        format!("config.json: linux.cgroupsPath: {name:?} is not below the cgroups' root"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_or_systemd_s() {
        let path = |name| relative(name).unwrap().display().to_string();
        assert_eq!(path("/kubepods/pod1/id"), "kubepods/pod1/id");
        assert_eq!(
            path("kubepods-besteffort-pod1.slice:cri-containerd:id"),
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/\
             cri-containerd-id.scope"
        );
        assert!(relative("/a/../../etc").is_err());
    }

    #[test]
    fn what_was_made_goes_and_what_was_there_stays() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("pods")).unwrap();
        let mut journal = Journal::create(root.path().join("journal/j")).unwrap();
        let hierarchies = [Hierarchy {
            root: root.path().to_owned(),
            home: root.path().to_owned(),
        }];
        let mut make = |name| Cgroup::create(&hierarchies, name, &mut journal).unwrap();
        let first = make("/pods/p1/a");
        let second = make("/pods/p1/b");
        first.remove().unwrap();
        assert!(root.path().join("pods/p1/b").exists());
        second.remove().unwrap();
        first.remove().unwrap();
        assert!(root.path().join("pods").exists());
    }

    #[test]
    fn a_host_has_one_hierarchy_or_one_a_controller() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for folder in ["memory", "cpu,cpuacct", "systemd"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        let own = "5:memory:/a/b\n4:cpu,cpuacct:/\n3:pids:/a\n1:name=systemd:/s\n0::/u\n";
        let found = |own: &str| -> Vec<_> {
            let pair = |it: Hierarchy| [it.root, it.home].map(|path| short(root, &path));
            hierarchies(root, own).into_iter().map(pair).collect()
        };
        let of = |pair: [&str; 2]| pair.map(ToOwned::to_owned);
        let expected = [
            of(["memory", "memory/a/b"]),
            of(["cpu,cpuacct", "cpu,cpuacct"]),
            of(["systemd", "systemd/s"]),
        ];
        assert_eq!(found(own), expected);
        // With the one hierarchy of version 2 mounted there.
        fs::write(root.join(CONTROLLERS), "").unwrap();
        assert_eq!(found("0::/u\n"), [of(["", "u"])]);
    }

    fn short(root: &Path, path: &Path) -> String {
        path.strip_prefix(root).unwrap().display().to_string()
    }

    #[test]
    fn a_cgroup_has_the_cpus_of_the_one_above() {
        let root = tempfile::tempdir().unwrap();
        let new = root.path().join("new");
        fs::create_dir(&new).unwrap();
        fs::write(root.path().join("cpuset.cpus"), "0-3\n").unwrap();
        fs::write(new.join("cpuset.cpus"), "\n").unwrap();
        inherit(&new).unwrap();
        assert_eq!(
            fs::read_to_string(new.join("cpuset.cpus")).unwrap(),
            "0-3\n"
        );
    }
}
