// SPDX-License-Identifier: Apache-2.0
//! cgroup v2: one leaf a container, its limits, its devices, its end.

mod cpuset;
mod devices;
mod events;
mod resources;
mod stats;

use std::fs;
use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocols::agent::agent::CgroupStats;
#[cfg(any(test, fuzzing))]
use protocols::agent::oci;
use protocols::agent::oci::{Linux, LinuxResources};
use rustix::fs::{CWD, Mode, OFlags, openat};
use tokio::time::{sleep, timeout};
use tracing::warn;

pub(crate) use events::OutOfMemory;

use crate::error::{AgentError, Context as _, Kind, Result};

/// A text as files of the kernel's.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(text: &str) {
    if let Some(ranges) = cpuset::parse(text) {
        assert_eq!(cpuset::parse(&cpuset::words(&ranges)), Some(ranges.clone()));
        let _ = cpuset::within(&ranges, &[(1, 7)]);
    }
    stats::fuzz(text);
    let _ = relative(text, "id");
}

/// Rules about devices, as a program for the kernel that is not loaded.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_rules(rules: &[oci::LinuxDeviceCgroup], nodes: &[oci::LinuxDevice]) {
    devices::fuzz(rules, nodes);
}

const ROOT: &str = "/sys/fs/cgroup";
/// Controllers that containers are limited by.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"];
/// A frozen or killed group takes its processes out of system calls; this bounds the wait.
const SETTLED: Duration = Duration::from_secs(10);

/// A container's group. Dropping it leaves the group in place.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    folder: OwnedFd,
}

fn open(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).context(|| format!("open cgroup {path:?}"))
}

impl Cgroup {
    /// Makes the group that `linux` names for container `id`, with its limits and device rules.
    ///
    /// # Errors
    ///
    /// A path that leaves the hierarchy, a group that exists, or a limit that can't be set.
    pub(crate) fn create(linux: &Linux, id: &str) -> Result<Self> {
        let relative = relative(&linux.CgroupsPath, id)?;
        let path = Path::new(ROOT).join(&relative);
        let parent = path.parent().unwrap_or_else(|| Path::new(ROOT));
        fs::create_dir_all(parent).context(|| format!("make cgroup {parent:?}"))?;
        delegate(&relative)?;
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(AgentError::new(
                    Kind::AlreadyExists,
                    format!("linux.cgroupsPath: cgroup {relative:?} exists"),
                ));
            }
            Err(error) => return Err(AgentError::io(format!("make cgroup {relative:?}"), error)),
        }
        let made = Self::set_up(&path, linux);
        if made.is_err() {
            let _ = fs::remove_dir(&path);
        }
        made
    }

    fn set_up(path: &Path, linux: &Linux) -> Result<Self> {
        let cgroup = Self {
            path: path.to_owned(),
            folder: open(path)?,
        };
        let none = LinuxResources::default();
        let resources = linux.Resources.as_ref().unwrap_or(&none);
        cgroup.update(resources)?;
        devices::restrict(&cgroup, &resources.Devices, &linux.Devices)?;
        Ok(cgroup)
    }

    /// The group below this one that process `pid` is in: one that makes groups of its own, as systemd
    /// and nested containers do, has left this one, where no process may be then.
    ///
    /// # Errors
    ///
    /// A process that is gone, or that is not in this group or below it.
    pub(crate) fn of_process(&self, pid: i32) -> Result<OwnedFd> {
        let file = format!("/proc/{pid}/cgroup");
        let text = fs::read_to_string(&file).context(|| format!("read {file}"))?;
        let path = text.trim_end().strip_prefix("0::/").unwrap_or_default();
        let path = Path::new(ROOT).join(path);
        if !path.starts_with(&self.path) {
            return Err(AgentError::precondition(
                "the container's first process has left its cgroup",
            ));
        }
        open(&path)
    }

    /// Applies limits; those that are not given stay.
    ///
    /// # Errors
    ///
    /// A limit that cgroup v2 or this kernel does not have, or the kernel's reason.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<()> {
        resources::apply(self, resources)
    }

    /// What the group has used.
    pub(crate) fn stats(&self) -> CgroupStats {
        stats::read(self)
    }

    /// Whether the kernel has killed a process of the group because it needed more memory than
    /// the limit allows.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        stats::memory_kills(self) > 0
    }

    /// Kills every process of the group and of the groups below it, at once.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Stops all processes, or lets them run again. Those that could not all be stopped run on.
    ///
    /// # Errors
    ///
    /// The kernel's, or processes that can't be stopped in time.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        // Armed before the wait: the caller's patience may end it.
        let thaw = Thaw(self);
        let settled = events::wait(self, "frozen", value);
        timeout(SETTLED, settled)
            .await
            .map_err(|_| AgentError::internal("the container's processes can't be frozen"))??;
        mem::forget(thaw);
        Ok(())
    }

    /// Whether processes are stopped by [`Cgroup::freeze`].
    pub(crate) fn is_frozen(&self) -> bool {
        self.read("cgroup.freeze")
            .is_ok_and(|text| text.trim() == "1")
    }

    /// Kills what is left in the group, and removes it.
    ///
    /// # Errors
    ///
    /// The kernel's, or processes that do not end.
    pub(crate) async fn remove(&self) -> Result<()> {
        self.kill()?;
        timeout(SETTLED, events::wait(self, "populated", "0"))
            .await
            .map_err(|_| {
                AgentError::internal(format!("processes in {:?} do not end", self.path))
            })??;
        // The last process may still be on its way out of the group.
        for _ in 0..100 {
            match remove_tree(&self.path) {
                Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                    sleep(Duration::from_millis(10)).await;
                }
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                other => return other.context(|| format!("remove cgroup {:?}", self.path)),
            }
        }
        Err(AgentError::internal(format!(
            "cgroup {:?} stays busy",
            self.path
        )))
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.path.join(file), value)
            .context(|| format!("write {value:?} to {file} of the container's cgroup"))
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    fn has(&self, file: &str) -> bool {
        self.path.join(file).exists()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// Dropped, it takes a freeze back: half a freeze would leave a container that stands still, and
/// that nobody knows as paused.
struct Thaw<'a>(&'a Cgroup);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.write("cgroup.freeze", "0") {
            warn!(error = error.line(), "processes may stay frozen");
        }
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// The group's path below the root: as the spec says, in systemd's form as a path of the same
/// parts, and without a word by the container's name.
fn relative(wanted: &str, id: &str) -> Result<PathBuf> {
    let text = match wanted.split(':').collect::<Vec<_>>().as_slice() {
        [""] => id.to_owned(),
        [_] => wanted.to_owned(),
        [slice, prefix, name] => format!("{slice}/{prefix}-{name}"),
        _ => {
            return Err(AgentError::invalid(format!(
                "linux.cgroupsPath: {wanted:?}"
            )));
        }
    };
    let mut path = PathBuf::new();
    for part in text.split('/').filter(|part| !matches!(*part, "" | ".")) {
        if part == ".." {
            return Err(AgentError::invalid(format!(
                "linux.cgroupsPath: {wanted:?}"
            )));
        }
        path.push(part);
    }
    if path.as_os_str().is_empty() {
        path.push(id);
    }
    Ok(path)
}

/// Lets the groups on the way to `relative` pass their controllers on.
fn delegate(relative: &Path) -> Result<()> {
    let mut folder = PathBuf::from(ROOT);
    let ancestors = relative.parent().unwrap_or_else(|| Path::new(""));
    enable(&folder)?;
    for part in ancestors {
        folder.push(part);
        enable(&folder)?;
    }
    Ok(())
}

fn enable(folder: &Path) -> Result<()> {
    let read = |file| {
        let path = folder.join(file);
        fs::read_to_string(&path).context(|| format!("read {path:?}"))
    };
    let available = read("cgroup.controllers")?;
    let enabled = read("cgroup.subtree_control")?;
    let missing: Vec<String> = CONTROLLERS
        .iter()
        .filter(|name| available.split_whitespace().any(|word| word == **name))
        .filter(|name| !enabled.split_whitespace().any(|word| word == **name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::write(folder.join("cgroup.subtree_control"), missing.join(" "))
        .context(|| format!("enable {missing:?} in {folder:?}"))
}

/// Removes a group and those that the container made below it.
fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_freeze_that_fails_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        // A file that can't be watched: the wait fails after the freeze was asked for.
        fs::write(folder.path().join("cgroup.events"), "frozen 0\n").unwrap();
        let cgroup = Cgroup {
            path: folder.path().to_owned(),
            folder: fs::File::open(folder.path()).unwrap().into(),
        };
        cgroup.freeze(true).await.unwrap_err();
        assert_eq!(cgroup.read("cgroup.freeze").unwrap(), "0");
    }

    #[test]
    fn paths_stay_below_the_root() {
        let path = |wanted| relative(wanted, "c1").map(|path| path.display().to_string());
        assert_eq!(path("").unwrap(), "c1");
        assert_eq!(path("/").unwrap(), "c1");
        assert_eq!(path("/default/c1").unwrap(), "default/c1");
        assert_eq!(path("a//./b/").unwrap(), "a/b");
        assert_eq!(path("k.slice:cri:c1").unwrap(), "k.slice/cri-c1");
        for wrong in ["..", "/a/../../b", "a:b", "a:b:c:d", "../x:y:z"] {
            path(wrong).unwrap_err();
        }
    }
}
