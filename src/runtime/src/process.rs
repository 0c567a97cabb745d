// SPDX-License-Identifier: Apache-2.0
//! Processes of the host, named so that a number used again can't be mistaken for them.

use std::os::fd::OwnedFd;
use std::time::Duration;
use std::{fs, io, process};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::param::clock_ticks_per_second;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process: its number and when it began, in clock ticks since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pid: u32,
    started: u64,
}

impl ProcessId {
    pub(crate) fn own() -> io::Result<Self> {
        Self::of(process::id())
    }

    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // proc_pid_stat(5): the name is in parentheses and may hold anything; of what follows,
        // the start time is the 20th.
        let started = stat
            .rsplit_once(')')
            .and_then(|(_, fields)| fields.split_ascii_whitespace().nth(19)?.parse().ok())
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))?;
        Ok(Self { pid, started })
    }

    /// Whether these arguments, one after the other, are on the command line of a shim.
    pub(crate) fn was_started_with(self, arguments: &[&str]) -> bool {
        let Ok(line) = fs::read(format!("/proc/{}/cmdline", self.pid)) else {
            return false;
        };
        let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
        words.windows(arguments.len()).any(|window| {
            window
                .iter()
                .zip(arguments)
                .all(|(word, argument)| *word == argument.as_bytes())
        })
    }

    /// Whether it still runs, or waits to be reaped.
    pub(crate) fn exists(self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == self)
    }

    /// Kills the process and waits until it is gone. A process that ended before is no error.
    pub(crate) fn kill(self, timeout: Duration) -> io::Result<()> {
        let Some(process) = self.open()? else {
            return Ok(());
        };
        match pidfd_send_signal(&process, Signal::KILL) {
            Ok(()) => {}
            Err(Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        let mut events = [PollFd::new(&process, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut events, Some(&timeout)))? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("process {} does not end", self.pid),
            ));
        }
        Ok(())
    }

    /// A handle of this very process, if it still runs.
    fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            // EINVAL: it is being reaped at this moment (pidfd_open(2) has no flag to object to, and
            // Linux says so of a number that still exists and leads no thread group any more).
            Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Compared after the handle is held: the number can't change its owner any more.
        match Self::of(self.pid) {
            Ok(now) if now == self => Ok(Some(handle)),
            _ => Ok(None),
        }
    }
}

/// What a process has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Microseconds of CPU time; a guest's count as user time.
    pub(crate) user: u64,
    pub(crate) system: u64,
    /// Bytes that nobody else has, or its part of those that it shares.
    pub(crate) memory: u64,
}

impl Usage {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // proc_pid_stat(5): user and system time are the 14th and 15th, counted in ticks.
        let mut fields = stat
            .rsplit_once(')')
            .map_or("", |(_, fields)| fields)
            .split_ascii_whitespace()
            .skip(11)
            .map_while(|field| field.parse::<u64>().ok());
        let microseconds = 1_000_000_u64
            .checked_div(clock_ticks_per_second())
            .unwrap_or(0);
        let mut time = || {
            let ticks = fields
                .next()
                .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no times")))?;
            io::Result::Ok(ticks.saturating_mul(microseconds))
        };
        let (user, system) = (time()?, time()?);
        let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/smaps_rollup has no Pss")))?;
        Ok(Self {
            user,
            system,
            memory: memory.saturating_mul(1024),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_used_again_is_not_killed() {
        let own = ProcessId::own().unwrap();
        let older = ProcessId {
            started: own.started.wrapping_sub(1),
            ..own
        };
        older.kill(Duration::from_secs(1)).unwrap();
        // Still here.
        assert_eq!(ProcessId::own().unwrap(), own);
    }

    #[test]
    fn a_process_has_used_memory() {
        let usage = Usage::of(process::id()).unwrap();
        assert!(usage.memory > 100_000, "{usage:?}");
    }
}
