// SPDX-License-Identifier: Apache-2.0
//! One process of a container that the runtime knows by an exec id.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::pipe::fcntl_setpipe_size;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::stdio::Stdio;
use crate::engine::{Launched, Streams};
use crate::error::{AgentError, Context as _, Result};
use crate::passfd::{self, Connected};
use crate::reaper::Exit;
use crate::sys;

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    pidfd: OwnedFd,
    pub(crate) exit: Exit,
    pub(crate) stdio: Arc<Stdio>,
    /// What carries its streams to connections of the host, where it does not ask for them.
    carrying: Mutex<Option<JoinHandle<()>>>,
}

impl Process {
    /// The process of a launch, and the gate that may still hold it. Its pipes hold `pipe_size`
    /// bytes, where that is given; its streams go over `connected`, where there is any.
    ///
    /// # Errors
    ///
    /// When its streams can't be watched or have another size.
    pub(crate) fn new(
        launched: Launched,
        pipe_size: Option<usize>,
        connected: Option<Connected>,
    ) -> Result<(Self, crate::engine::Gate)> {
        let Launched {
            pid,
            pidfd,
            exit,
            streams,
            gate,
        } = launched;
        if let (
            Some(size),
            Streams::Pipes {
                stdin,
                stdout,
                stderr,
            },
        ) = (pipe_size, &streams)
        {
            for pipe in [stdin, stdout, stderr] {
                fcntl_setpipe_size(pipe, size)
                    .context(|| format!("agent.container_pipe_size: {size}"))?;
            }
        }
        let stdio = Arc::new(Stdio::new(streams)?);
        let carrying = connected.map(|connected| {
            tokio::spawn(connected.carry(Arc::clone(&stdio), exit.clone(), false))
        });
        let process = Self {
            pid,
            pidfd,
            exit,
            stdio,
            carrying: Mutex::new(carrying),
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

    /// Waits until what it wrote has reached the host's connections, where it has such.
    pub(crate) async fn carried(&self) {
        let mut carrying = self.carrying.lock().await;
        if let Some(task) = carrying.as_mut() {
            passfd::carried(task).await;
        }
        *carrying = None;
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
