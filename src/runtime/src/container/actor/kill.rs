// SPDX-License-Identifier: Apache-2.0
//! Signals, and that SIGKILL holds.
//!
//! The guest is only asked to send a signal. One that hangs, or obeys no more, must not keep a
//! container from its end: what was killed and doesn't end is ended with its machine.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::warn;

use super::{Actor, SIGKILL, answer};
use crate::agent::{Agent, ProcessName};
use crate::container::Reply;
use crate::container::process::Phase;
use crate::error::{Kind, Result, ShimError};
use crate::sandbox::Sandbox;

/// How long the guest may take to end what SIGKILL was sent to: milliseconds, but for a process
/// that waits for a disk or a shared file. The guest of the unit tests has neither.
pub(in crate::container) const KILL_PATIENCE: Duration =
    Duration::from_millis(if cfg!(test) { 500 } else { 30_000 });

/// SIGKILL for a container's init, and with it for all that runs in the container.
pub(super) struct InitKill {
    name: ProcessName,
    sandbox: Arc<Sandbox>,
    /// Whether the guest has told the end of the process. That is what counts: its output may
    /// still be on the way to a client, for longer.
    ended: watch::Receiver<bool>,
}

impl Actor {
    pub(super) fn kill(&mut self, exec: &str, signal: u32, all: bool, reply: Reply<()>) {
        let checked = self.process(exec).and_then(|process| {
            process.check_signal()?;
            Ok(process.name.clone())
        });
        let name = match checked {
            Ok(name) => name,
            Err(error) => return answer(reply, Err(error)),
        };
        let mut others = Vec::new();
        if all {
            let running = self
                .execs
                .values()
                .filter(|exec| exec.phase == Phase::Running && exec.name != name);
            others.extend(running.map(|exec| exec.name.clone()));
        }
        let init_kill = (exec.is_empty() && signal == SIGKILL).then(|| self.init_kill());
        self.call(|agent| async move {
            let sent = match init_kill {
                Some(kill) => kill.run().await,
                None => send(&agent, &name, signal).await,
            };
            for other in others {
                // Some may have ended meanwhile.
                let _ = send(&agent, &other, signal).await;
            }
            answer(reply, sent);
        });
    }

    pub(super) fn init_kill(&self) -> InitKill {
        InitKill {
            name: self.init.name.clone(),
            sandbox: Arc::clone(&self.sandbox),
            ended: self.init_ended.subscribe(),
        }
    }
}

impl InitKill {
    /// Sends the signal. Returns with the guest's answer, or once its machine was ended for want of
    /// one; what an answer is worth is seen to after that.
    pub(super) async fn run(self) -> Result<()> {
        let begin = Instant::now();
        let sending = send(self.sandbox.agent(), &self.name, SIGKILL);
        let sent = timeout(KILL_PATIENCE, sending).await.unwrap_or_else(|_| {
            let silence = "the agent did not answer in time";
            Err(ShimError::new(Kind::DeadlineExceeded, silence))
        });
        match sent {
            Err(error) if !matches!(error.kind(), Kind::NotFound | Kind::Unavailable) => {
                self.end_machine(&error.chain()).await;
                if *self.ended.borrow() || self.sandbox.has_ended() {
                    Ok(())
                } else {
                    Err(error)
                }
            }
            // Also if the process is said to be gone, or if the connection broke, which is seen to
            // where the end is waited for: either way the end is about to be told.
            sent => {
                let rest = KILL_PATIENCE.saturating_sub(begin.elapsed());
                tokio::spawn(self.enforce(rest));
                sent
            }
        }
    }

    /// Ends the machine if the process's end isn't told in time.
    async fn enforce(mut self, patience: Duration) {
        // No answer if the container was deleted: then it has ended, too.
        let ended = self.ended.wait_for(|ended| *ended);
        if timeout(patience, ended).await.is_err() {
            self.end_machine("it did not end in time").await;
        }
    }

    async fn end_machine(&self, reason: &str) {
        if *self.ended.borrow() {
            return;
        }
        warn!(
            container = self.name.container,
            sandbox = self.sandbox.id(),
            reason,
            "the guest does not kill a container: its machine is stopped"
        );
        self.sandbox.kill().await;
    }
}

async fn send(agent: &Agent, process: &ProcessName, signal: u32) -> Result<()> {
    agent
        .signal(process, signal)
        .await
        .map_err(|error| match error.kind() {
            Kind::NotFound => ShimError::new(Kind::NotFound, "process already finished"),
            _ => error,
        })
}
