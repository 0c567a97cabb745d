// SPDX-License-Identifier: Apache-2.0
//! The owner's side: starts the VMM process, sends it requests, hears its events.
//!
//! Blocking, and shareable: one thread may wait in `next_event` while others send.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;

use crate::control::{Channel, ChannelError, Event, ExitReason, Request, VmConfig};

/// Why the VMM did not do what its owner wanted.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The process could not be started.
    #[error("can't start the VMM process")]
    Spawn(#[source] io::Error),
    /// The process is gone, or speaks another language.
    #[error("can't speak with the VMM process")]
    Channel(#[from] ChannelError),
    /// It says why it can't; the text is the whole chain of causes.
    #[error("{0}")]
    Failed(String),
    /// The machine ended before it answered.
    #[error("the virtual machine has ended: {reason:?}")]
    Exited {
        /// Why.
        reason: ExitReason,
        /// The last that the guest wrote to its console.
        console: String,
    },
}

/// A VMM process and the control socket to it. Dropping it kills the process, and the machine
/// with it.
#[derive(Debug)]
pub struct VmmProcess {
    channel: Channel,
    pid: Pid,
    pidfd: OwnedFd,
    end: Arc<End>,
}

#[derive(Debug, Default)]
struct End {
    status: Mutex<Option<ExitStatus>>,
    known: Condvar,
}

impl VmmProcess {
    /// Starts `command`, whose program must call `process::run` first of all (the shim's own
    /// binary in its role `vmm`). It gets the control socket as its standard input, an empty
    /// environment, no standard output, and the standard error that the caller has set.
    ///
    /// A thread stays behind that started it and waits for it: the process asks to be killed
    /// when the thread that is its parent ends (`PR_SET_PDEATHSIG` means threads, not processes).
    ///
    /// # Errors
    /// No socket, thread or process is to be had.
    pub fn spawn(mut command: Command) -> Result<Self, ClientError> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| ClientError::Spawn(errno.into()))?;
        command.env_clear().stdin(theirs).stdout(Stdio::null());
        let end = Arc::new(End::default());
        let (started, start) = mpsc::sync_channel(1);
        let keeper_end = Arc::clone(&end);
        let keeper = thread::Builder::new().name("vmm-keeper".to_owned());
        keeper
            .spawn(move || {
                let child = command.spawn();
                // The command holds the other end of the socket: without it the channel closes
                // when the process ends.
                drop(command);
                match child.and_then(|child| Ok((open(&child)?, child))) {
                    Ok((handles, child)) => {
                        if started.send(Ok(handles)).is_ok() {
                            keeper_end.wait_for(child);
                        }
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            })
            .map_err(ClientError::Spawn)?;
        let handles = start
            .recv()
            .map_err(|error| ClientError::Spawn(io::Error::other(error)))?;
        let (pid, pidfd) = handles.map_err(ClientError::Spawn)?;
        Ok(Self {
            channel: Channel::new(ours),
            pid,
            pidfd,
            end,
        })
    }

    /// The process ID, for cgroups and logs; to wait or kill use the methods below.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// A descriptor that is readable when the process has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The control socket, to wait for events with `poll`.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Builds the machine and starts it. `files` are those that `config` names by index. Events
    /// before the answer, such as milestones, go to `other`.
    ///
    /// # Errors
    /// The VMM says why not, or is gone. The process ends then.
    pub fn boot(
        &self,
        config: VmConfig,
        files: &[BorrowedFd<'_>],
        mut other: impl FnMut(Event, Vec<OwnedFd>),
    ) -> Result<(), ClientError> {
        self.send(&Request::Boot(Box::new(config)), files)?;
        loop {
            match self.next_event()? {
                (Event::Done, _) => return Ok(()),
                (Event::Failed(text), _) => return Err(ClientError::Failed(text)),
                (Event::Exited { reason, console }, _) => {
                    return Err(ClientError::Exited { reason, console });
                }
                (event, files) => other(event, files),
            }
        }
    }

    /// Sends a request; its answer, such as `Event::Done` or `Event::Failed`, comes by `next_event`.
    ///
    /// # Errors
    /// The process is gone.
    pub fn send(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        Ok(self.channel.send(request, files)?)
    }

    /// Waits for the next event and its files.
    ///
    /// # Errors
    /// The process is gone: `ChannelError::Closed`.
    pub fn next_event(&self) -> Result<(Event, Vec<OwnedFd>), ClientError> {
        Ok(self.channel.receive()?)
    }

    /// Kills the process, and the machine with it; does nothing when it has ended.
    pub fn kill(&self) {
        // The only failure is that it has ended.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits until the process has ended, no longer than `limit`.
    #[must_use]
    pub fn wait_for(&self, limit: Duration) -> Option<ExitStatus> {
        let status = self
            .end
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let running = |status: &mut Option<ExitStatus>| status.is_none();
        let waited = self.end.known.wait_timeout_while(status, limit, running);
        let (status, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *status
    }

    /// Waits until the process has ended.
    #[must_use]
    pub fn wait(&self) -> ExitStatus {
        let mut status = self
            .end
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(status) = *status {
                return status;
            }
            let waited = self.end.known.wait(status);
            status = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

impl End {
    fn wait_for(&self, mut child: Child) {
        // It can only fail when somebody else has reaped the process.
        let status = child.wait().unwrap_or_default();
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        self.known.notify_all();
    }
}

fn open(child: &Child) -> io::Result<(Pid, OwnedFd)> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("a process has a strange ID"))?;
    Ok((pid, pidfd_open(pid, PidfdFlags::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_no_vmm_is_gone() {
        let process = VmmProcess::spawn(Command::new("true")).unwrap();
        assert!(matches!(
            process.next_event(),
            Err(ClientError::Channel(ChannelError::Closed))
        ));
        assert!(process.wait().success());
    }

    #[test]
    fn a_dropped_process_is_killed() {
        let process = VmmProcess::spawn(Command::new("cat")).unwrap();
        let end = Arc::clone(&process.end);
        process.kill();
        assert!(!process.wait().success());
        drop(process);
        assert!(end.status.lock().unwrap().is_some());
    }

    #[test]
    fn a_program_that_is_missing_is_told() {
        let error = VmmProcess::spawn(Command::new("/nonexistent")).unwrap_err();
        assert!(matches!(error, ClientError::Spawn(_)));
    }
}
