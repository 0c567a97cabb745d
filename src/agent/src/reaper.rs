// SPDX-License-Identifier: Apache-2.0
//! The one owner of `waitpid`: PID 1 inherits every orphan of the guest, so all children are
//! waited for here, and those that the agent started get their exit status delivered.
//!
//! A process may end before its pid has been claimed. While a launch is under way unclaimed
//! statuses are kept; the claim comes with the pidfd, which tells a status of this process from
//! one of an earlier process with the same number.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, WaitOptions, WaitStatus, pidfd_open, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;

use crate::error::{Context as _, Result};

/// An exit status as a shell gives it: the exit code, or 128 and the signal's number.
pub(crate) type ExitCode = i32;

/// The end of a process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) code: ExitCode,
    /// When it was noticed.
    pub(crate) at: Instant,
}

/// Becomes `Some` when the process has ended.
pub(crate) type Exit = watch::Receiver<Option<End>>;

/// Hands out exit statuses.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper(Arc<Mutex<Children>>);

#[derive(Debug, Default)]
struct Children {
    claimed: HashMap<i32, watch::Sender<Option<End>>>,
    /// Statuses that nobody has claimed; only kept while `launches` is not zero.
    unclaimed: HashMap<i32, End>,
    launches: usize,
}

/// A child whose exit is handed out.
#[derive(Debug)]
pub(crate) struct Claimed {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) exit: Exit,
}

/// A launch under way: statuses of unknown processes are kept until it is dropped.
#[derive(Debug)]
pub(crate) struct Launch(Reaper);

impl Reaper {
    /// Reaps children whenever SIGCHLD says so, for ever.
    ///
    /// # Errors
    ///
    /// When the signal can't be listened to.
    pub(crate) fn start(&self) -> Result<()> {
        let mut children = signal(SignalKind::child()).context(|| "listen to SIGCHLD")?;
        let reaper = self.clone();
        tokio::spawn(async move {
            reaper.children().reap();
            while children.recv().await.is_some() {
                reaper.children().reap();
            }
        });
        Ok(())
    }

    /// Announces that processes are about to be made.
    pub(crate) fn launch(&self) -> Launch {
        let mut children = self.children();
        children.launches = children.launches.saturating_add(1);
        Launch(self.clone())
    }

    fn children(&self) -> MutexGuard<'_, Children> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Launch {
    /// Claims `child`, which this launch has made.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn child(&self, child: &Child) -> rustix::io::Result<Claimed> {
        let pid = Pid::from_child(child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let exit = self.claim(pid.as_raw_nonzero().get(), &pidfd);
        Ok(Claimed { pid, pidfd, exit })
    }

    /// The exit of process `pid`, which `pidfd` refers to and which this launch has made.
    pub(crate) fn claim(&self, pid: i32, pidfd: impl AsFd) -> Exit {
        let mut children = self.0.children();
        // Everything that has ended by now is known; a later end finds the claim.
        children.reap();
        let stored = children.unclaimed.remove(&pid);
        // A living process can't have left a status: the number was another process's.
        let ended = stored.filter(|_| has_ended(pidfd));
        let (sender, receiver) = watch::channel(ended);
        if ended.is_none() {
            children.claimed.insert(pid, sender);
        }
        receiver
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut children = self.0.children();
        children.launches = children.launches.saturating_sub(1);
        if children.launches == 0 {
            children.unclaimed = HashMap::new();
        }
    }
}

impl Children {
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            let code = exit_code(status);
            debug!(pid, code, "process ended");
            let end = End {
                code,
                at: Instant::now(),
            };
            match self.claimed.remove(&pid) {
                Some(sender) => {
                    sender.send_replace(Some(end));
                }
                None if self.launches > 0 => {
                    self.unclaimed.insert(pid, end);
                }
                None => {}
            }
        }
    }
}

fn exit_code(status: WaitStatus) -> ExitCode {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => signal.saturating_add(128),
        (None, None) => 255,
    }
}

/// A pidfd is readable when its process has ended.
fn has_ended(pidfd: impl AsFd) -> bool {
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    matches!(poll(&mut polled, Some(&Timespec::default())), Ok(1))
}

/// Waits for the end of a process.
pub(crate) async fn ended(exit: &Exit) -> End {
    let mut exit = exit.clone();
    let end = exit.wait_for(Option::is_some).await;
    // The reaper, which holds the other end, lives as long as the agent.
    end.ok().and_then(|end| *end).unwrap_or_else(|| End {
        code: 255,
        at: Instant::now(),
    })
}
