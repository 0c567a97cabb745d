// SPDX-License-Identifier: Apache-2.0
//! One process of a container that the runtime knows by an exec id.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use super::stdio::Stdio;
use crate::engine::Launched;
use crate::error::{AgentError, Result};
use crate::reaper::Exit;
use crate::sys;

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    pidfd: OwnedFd,
    pub(crate) exit: Exit,
    pub(crate) stdio: Stdio,
}

impl Process {
    /// The process of a launch, and the gate that may still hold it.
    ///
    /// # Errors
    ///
    /// When its streams can't be watched.
    pub(crate) fn new(launched: Launched) -> Result<(Self, crate::engine::Gate)> {
        let Launched {
            pid,
            pidfd,
            exit,
            streams,
            gate,
        } = launched;
        let process = Self {
            pid,
            pidfd,
            exit,
            stdio: Stdio::new(streams)?,
        };
        Ok((process, gate))
    }

    /// The number in the guest.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Sends `signal`.
    ///
    /// # Errors
    ///
    /// NOT_FOUND when the process has ended; a number that is no signal.
    pub(crate) fn signal(&self, signal: i32) -> Result<()> {
        let sent = sys::process::send_signal(self.pidfd.as_fd(), signal);
        sent.map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => AgentError::not_found("the process has ended"),
            Some(libc::EINVAL) => AgentError::invalid(format!("signal {signal} does not exist")),
            _ => AgentError::io(format!("send signal {signal}"), error),
        })
    }

    /// Whether `signal` would do nothing: the process is the first of its pid namespace, so the
    /// kernel drops signals that it has no handler for. Signals that it ignores by intention are
    /// left alone.
    pub(crate) fn would_drop(&self, signal: i32) -> bool {
        let Ok(status) = fs::read_to_string(format!("/proc/{}/status", self.pid)) else {
            return false;
        };
        let mask = |key: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
                .unwrap_or(0)
        };
        let Some(bit) = u32::try_from(signal)
            .ok()
            .and_then(|signal| signal.checked_sub(1))
            .and_then(|shift| 1_u64.checked_shl(shift))
        else {
            return false;
        };
        (mask("SigCgt:") | mask("SigIgn:")) & bit == 0
    }
}
