// SPDX-License-Identifier: Apache-2.0
//! One output of a process: from the agent to containerd's named pipe, or to a file.
//!
//! It is read from the guest until its end even where nobody wants it: the process would block on a
//! full pipe. After the process's end, a stream that another process keeps open is given up once it
//! is quiet.

use std::io;
use std::pin::pin;
use std::time::Duration;

use rustix::io::ioctl_fionread;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::select;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::io::CHUNK;
use crate::agent::{Agent, Output, ProcessName};
use crate::error::Result;

/// After the process's end: how long the agent may take for an answer. It ends a stream by itself
/// half a second after the end, once what the pipe holds is read; this is for one that doesn't.
const QUIET: Duration = Duration::from_secs(30);
/// After the process's end: how long a client may leave the output where it is.
pub(super) const STUCK: Duration = Duration::from_secs(10);
/// After the process's end: how long all that is left may take.
pub(super) const DRAIN: Duration = Duration::from_secs(60);

/// How long a client may leave a pipe as it is before it counts as one that doesn't read.
const TAKEN: Duration = Duration::from_secs(1);
/// How often a pipe is looked at: nothing tells its writer that it is empty.
pub(super) const LOOK: Duration = Duration::from_millis(2);
/// How long the guest may be silent before there is nothing more to wait for.
const SILENCE: Duration = Duration::from_millis(100);

/// Where the bytes go.
#[derive(Debug)]
pub(super) enum Sink {
    Discard,
    Pipe(pipe::Sender),
    File(tokio::fs::File),
}

/// What an output waits for; sent anew with all that moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// For the guest to say more.
    Guest,
    /// For the client to take what was said.
    Client,
}

/// Carries one output.
#[derive(Debug)]
pub(super) struct OutputPump {
    agent: Agent,
    process: ProcessName,
    stream: Output,
    sink: Sink,
    exited: watch::Receiver<bool>,
    flow: watch::Sender<Flow>,
}

impl OutputPump {
    pub(super) fn new(
        agent: &Agent,
        process: &ProcessName,
        stream: Output,
        sink: Sink,
        exited: watch::Receiver<bool>,
    ) -> Self {
        Self {
            agent: agent.clone(),
            process: process.clone(),
            stream,
            sink,
            exited,
            flow: watch::Sender::new(Flow::Guest),
        }
    }

    /// For `settled`.
    pub(super) fn flow(&self) -> watch::Receiver<Flow> {
        self.flow.subscribe()
    }

    /// Carries the output to its end.
    pub(super) async fn run(mut self) {
        let given_up = after_exit(self.exited.clone(), DRAIN);
        let (process, stream) = (self.process.clone(), self.stream);
        select! {
            () = self.deliver() => {}
            () = given_up => debug!(?process, ?stream, "output given up"),
        }
    }

    async fn deliver(&mut self) {
        while let Some(data) = self.next().await {
            if let Err(error) = self.write(&data).await {
                debug!(process = ?self.process, stream = ?self.stream, %error, "output has nowhere to go");
                self.sink = Sink::Discard;
            }
        }
        self.taken().await;
        if let Sink::File(file) = &mut self.sink {
            let _ = file.flush().await;
        }
    }

    /// What the guest says next; nothing at the end.
    async fn next(&self) -> Option<Vec<u8>> {
        self.flow.send_replace(Flow::Guest);
        let mut read = pin!(self.agent.read(&self.process, self.stream, CHUNK));
        let at_once = select! {
            biased;
            data = &mut read => Some(data),
            () = after_exit(self.exited.clone(), Duration::ZERO) => None,
        };
        let data: Result<Vec<u8>> = match at_once {
            Some(data) => data,
            None => {
                self.taken().await;
                timeout(QUIET, read).await.ok()?
            }
        };
        match data {
            Ok(data) if data.is_empty() => None,
            Ok(data) => Some(data),
            Err(error) => {
                let error = error.chain();
                debug!(process = ?self.process, stream = ?self.stream, error, "output ended");
                None
            }
        }
    }

    async fn write(&mut self, data: &[u8]) -> io::Result<()> {
        let mut rest = data;
        while !rest.is_empty() {
            let pipe = match &mut self.sink {
                Sink::Discard => return Ok(()),
                Sink::File(file) => return file.write_all(rest).await,
                Sink::Pipe(pipe) => pipe,
            };
            self.flow.send_replace(Flow::Client);
            let written = select! {
                biased;
                written = pipe.write(rest) => written?,
                () = after_exit(self.exited.clone(), STUCK) => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            };
            rest = rest.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// As `taken`, where the output goes into a pipe.
    async fn taken(&self) {
        if let Sink::Pipe(pipe) = &self.sink {
            taken(pipe, &self.flow).await;
            self.flow.send_replace(Flow::Guest);
        }
    }
}

/// Waits until the client has taken what lies in the pipe, or takes nothing any more.
pub(super) async fn taken(pipe: &pipe::Sender, flow: &watch::Sender<Flow>) {
    let mut left = ioctl_fionread(pipe).unwrap_or(0);
    let mut since = Instant::now();
    flow.send_replace(Flow::Client);
    while left > 0 && since.elapsed() < TAKEN {
        sleep(LOOK).await;
        let now = ioctl_fionread(pipe).unwrap_or(0);
        if now != left {
            (left, since) = (now, Instant::now());
            flow.send_replace(Flow::Client);
        }
    }
}

/// Waits until what an ended process wrote was taken: the output has ended, is silent, or its client
/// doesn't read.
pub(super) async fn settled(mut flow: watch::Receiver<Flow>) {
    loop {
        let patience = match *flow.borrow_and_update() {
            Flow::Guest => SILENCE,
            Flow::Client => TAKEN.saturating_mul(2),
        };
        // The sender goes with the pump.
        if !matches!(timeout(patience, flow.changed()).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// Some time after the process's end.
async fn after_exit(ended: watch::Receiver<bool>, time: Duration) {
    exited(ended).await;
    sleep(time).await;
}

/// The process's end.
pub(super) async fn exited(mut ended: watch::Receiver<bool>) {
    // The sender lives as long as the process's record; its end is an end as well.
    let _ = ended.wait_for(|ended| *ended).await;
}
