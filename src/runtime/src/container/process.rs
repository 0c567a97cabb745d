// SPDX-License-Identifier: Apache-2.0
//! A process of a container as its actor sees it.

use protocols::agent::oci;

use super::io::{Pumps, Stdio, Streams};
use super::{Exit, Reply, Status};
use crate::agent::ProcessName;
use crate::error::{Kind, Result, ShimError};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Created,
    /// The guest was asked to start it. It may have ended already, before the answer came.
    Starting {
        ended: Option<Exit>,
    },
    Running,
    Stopped(Exit),
    /// It is being removed.
    Deleting(Exit),
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) name: ProcessName,
    pub(super) phase: Phase,
    pub(super) stdio: Stdio,
    /// Of an exec: what to run.
    pub(super) spec: Option<Box<oci::Process>>,
    /// Opened, before the start.
    pub(super) streams: Option<Streams>,
    /// No client is to write input any more.
    input_closed: bool,
    /// From the start on.
    pub(super) pumps: Option<Pumps>,
    /// How it ended, while its output is still being taken.
    pub(super) ending: Option<Exit>,
    waiters: Vec<Reply<Exit>>,
}

impl Process {
    pub(super) fn new(name: ProcessName, stdio: Stdio) -> Self {
        Self {
            name,
            phase: Phase::Created,
            stdio,
            spec: None,
            streams: None,
            input_closed: false,
            pumps: None,
            ending: None,
            waiters: Vec::new(),
        }
    }

    /// Moves to `Starting`, if it may.
    pub(super) fn begin_start(&mut self) -> Result<()> {
        match self.phase {
            Phase::Created => {
                self.phase = Phase::Starting { ended: None };
                Ok(())
            }
            Phase::Starting { .. } => Err(precondition("the process is being started")),
            Phase::Running => Err(precondition("the process runs already")),
            Phase::Stopped(_) | Phase::Deleting(_) => Err(precondition("the process has ended")),
        }
    }

    /// Whether a signal may be sent.
    pub(super) fn check_signal(&self) -> Result<()> {
        if self.pumps.as_ref().is_some_and(Pumps::ending) {
            return Err(finished());
        }
        match self.phase {
            // A container's init exists before its start; an exec's process doesn't.
            Phase::Created if !self.name.exec.is_empty() => {
                Err(precondition("the process is not started yet"))
            }
            Phase::Created | Phase::Starting { .. } | Phase::Running => Ok(()),
            Phase::Stopped(_) | Phase::Deleting(_) => Err(finished()),
        }
    }

    pub(super) fn status(&self, paused: bool) -> Status {
        match self.phase {
            Phase::Created | Phase::Starting { .. } => Status::Created,
            Phase::Running if paused => Status::Paused,
            Phase::Running => Status::Running,
            Phase::Stopped(exit) | Phase::Deleting(exit) => Status::Stopped(exit),
        }
    }

    /// Answers now or when the process ends.
    pub(super) fn wait(&mut self, reply: Reply<Exit>) {
        match self.phase {
            Phase::Stopped(exit) | Phase::Deleting(exit) => {
                let _ = reply.send(Ok(exit));
            }
            _ => self.waiters.push(reply),
        }
    }

    /// The process has ended.
    pub(super) fn end(&mut self, exit: Exit) {
        self.phase = Phase::Stopped(exit);
        self.streams = None;
        if let Some(pumps) = &mut self.pumps {
            drop(pumps.process_ended());
        }
        for waiter in self.waiters.drain(..) {
            let _ = waiter.send(Ok(exit));
        }
    }

    /// Streams that were opened; they may have been under way when the input was closed.
    pub(super) fn put_streams(&mut self, mut streams: Streams) {
        if self.input_closed {
            streams.close_stdin();
        }
        self.streams = Some(streams);
    }

    /// No client is to write input any more.
    pub(super) fn close_stdin(&mut self) {
        self.input_closed = true;
        if let Some(streams) = &mut self.streams {
            streams.close_stdin();
        }
        if let Some(pumps) = &mut self.pumps {
            pumps.close_stdin();
        }
    }
}

fn finished() -> ShimError {
    ShimError::new(Kind::NotFound, "process already finished")
}

pub(super) fn precondition(context: &str) -> ShimError {
    ShimError::new(Kind::FailedPrecondition, context)
}
