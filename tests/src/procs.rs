// SPDX-License-Identifier: Apache-2.0
//! Processes as `/proc` shows them: the shim of a container, and the VMM of a shim.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::wait::until;

/// A process, told from a later one with the same id by its start time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Ticks from boot to its start.
    pub start: u64,
    /// Its parent's id.
    pub parent: i32,
    /// The kernel's letter for its state.
    pub state: char,
    /// The kernel's short name for it.
    pub name: String,
}

/// An open file of a process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpenFile {
    /// Its number.
    pub fd: i32,
    /// What the link in `/proc/PID/fd` says.
    pub target: String,
    /// Open flags (`O_*`).
    pub flags: u32,
}

impl Process {
    /// Reads a process; absent once it is gone.
    #[must_use]
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold any character.
        let (head, rest) = stat.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        Some(Self {
            pid,
            start: fields.get(19)?.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            state: fields.first()?.chars().next()?,
            name: name.to_owned(),
        })
    }

    /// All processes.
    pub fn all() -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            if let Some(process) = name
                .to_str()
                .and_then(|name| name.parse().ok())
                .and_then(Self::read)
            {
                all.push(process);
            }
        }
        Ok(all)
    }

    /// Whether it still runs; a zombie doesn't.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.start == self.start && now.state != 'Z')
    }

    /// Its file in `/proc`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join(name)
    }

    /// What a link in `/proc` points to.
    pub fn link(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        let target = fs::read_link(&path).with_context(|| path.display().to_string())?;
        Ok(target.to_string_lossy().into_owned())
    }

    /// Its arguments.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        strings(&self.path("cmdline"))
    }

    /// Its environment, as it was at its start.
    #[must_use]
    pub fn environment(&self) -> Vec<String> {
        strings(&self.path("environ"))
    }

    /// Ids of its threads.
    pub fn threads(&self) -> Result<Vec<i32>> {
        let mut threads = Vec::new();
        for entry in fs::read_dir(self.path("task"))? {
            threads.extend(
                entry?
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<i32>().ok()),
            );
        }
        Ok(threads)
    }

    /// Its cgroup (of version 2), which all its threads are in.
    pub fn cgroup(&self) -> Result<String> {
        let mut found = Vec::new();
        for thread in self.threads()? {
            let text = fs::read_to_string(self.path(&format!("task/{thread}/cgroup")))?;
            let path = text.trim().strip_prefix("0::").context("no cgroup v2")?;
            found.push(path.to_owned());
        }
        found.dedup();
        ensure!(found.len() == 1, "threads of {} are in {found:?}", self.pid);
        found.pop().context("no threads")
    }

    /// Its open files.
    pub fn files(&self) -> Result<Vec<OpenFile>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.path("fd"))? {
            let name = entry?.file_name();
            let fd: i32 = name.to_string_lossy().parse()?;
            // A file may close between the listing and this.
            let (Ok(target), Ok(info)) = (
                self.link(&format!("fd/{fd}")),
                fs::read_to_string(self.path(&format!("fdinfo/{fd}"))),
            ) else {
                continue;
            };
            let flags = info
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
                .unwrap_or(0);
            files.push(OpenFile { fd, target, flags });
        }
        files.sort();
        Ok(files)
    }

    /// A number of kB from `/proc/PID/NAME`, such as `Private_Dirty` of `smaps_rollup`.
    pub fn kilobytes(&self, name: &str, key: &str) -> Result<u64> {
        let path = self.path(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let value = value.with_context(|| format!("no {key} in {}", path.display()))?;
        Ok(value.trim().trim_end_matches("kB").trim().parse()?)
    }

    /// Sends SIGKILL to this process and no other, and waits for its end.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)?;
        until(
            &format!("the end of process {}", self.pid),
            Duration::from_secs(10),
            || Ok((!self.is_alive()).then_some(())),
        )
    }

    /// Stops it (SIGSTOP), as if it hung.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid).context("no process id")?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("opening the process")?;
        ensure!(
            self.is_alive(),
            "process {} ({}) is gone already",
            self.pid,
            self.name
        );
        Ok(pidfd_send_signal(&pidfd, signal)?)
    }

    /// Its name and arguments, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "{} ({}) {:?} {}",
            self.pid,
            self.name,
            self.state,
            self.arguments().join(" ")
        )
    }
}

/// The shim that serves a container.
pub fn shim(id: &str) -> Result<Process> {
    let found: Vec<_> = Process::all()?
        .into_iter()
        .filter(|process| is_shim(process, id))
        .collect();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => bail!("no shim of {id}"),
        many => bail!("{} shims of {id}: {many:?}", many.len()),
    }
}

/// The VMM of a container: what holds a KVM machine open, below the container's shim.
pub fn vmm(id: &str) -> Result<Process> {
    let shim = shim(id)?;
    let children: Vec<_> = Process::all()?
        .into_iter()
        .filter(|process| process.parent == shim.pid)
        .collect();
    for child in &children {
        if child
            .files()?
            .iter()
            .any(|file| file.target == "anon_inode:kvm-vm")
        {
            return Ok(child.clone());
        }
    }
    bail!("no child of the shim of {id} holds a KVM machine: {children:?}")
}

fn is_shim(process: &Process, id: &str) -> bool {
    let arguments = process.arguments();
    let named = arguments
        .first()
        .is_some_and(|program| program.contains("containerd-shim"));
    let serves = !arguments
        .iter()
        .any(|argument| argument == "start" || argument == "delete");
    named
        && serves
        && arguments
            .windows(2)
            .any(|pair| matches!(pair, [flag, value] if flag == "-id" && value == id))
}

fn strings(path: &Path) -> Vec<String> {
    let bytes = fs::read(path).unwrap_or_default();
    bytes
        .split(|byte| *byte == 0)
        .filter(|part| !part.is_empty())
        .map(|part| {
            std::ffi::OsString::from_vec(part.to_vec())
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}
