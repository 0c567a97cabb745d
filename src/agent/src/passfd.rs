// SPDX-License-Identifier: Apache-2.0
//! Streams of processes that the host connects instead of asking for what is in them (Kata's
//! passfd): the host's port of each connection is the name under which a request asks for it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, WriteHalf, split};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use crate::container::{Output, Stdio};
use crate::error::{AgentError, Result};
use crate::ports::{Door, Stream};
use crate::reaper::Exit;

/// How long a request waits for its connections.
const PATIENCE: Duration = Duration::from_secs(3);
/// Connections that no request has asked for yet.
const MOST: usize = 1024;
/// How long one is kept.
const KEPT: Duration = Duration::from_secs(60);
/// What is carried at once.
const PIECE: u32 = 64 << 10;
/// What a terminal takes for the end of input.
const END_OF_INPUT: &[u8] = b"\x04";
/// How long the host may take to take the rest of a process's output, once that has ended.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Connections that wait for the request that names them.
#[derive(Debug)]
pub(crate) struct Arrivals {
    waiting: Mutex<HashMap<u32, Waiting>>,
    arrived: Notify,
}

/// A connection, and since when it waits.
type Waiting = (Box<dyn Stream>, Instant);

impl fmt::Debug for dyn Stream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Stream")
    }
}

/// The connections of one process.
#[derive(Debug, Default)]
pub(crate) struct Connected {
    stdin: Option<Box<dyn Stream>>,
    stdout: Option<Box<dyn Stream>>,
    stderr: Option<Box<dyn Stream>>,
}

impl Arrivals {
    /// Takes connections from now on.
    pub(crate) fn start(door: Door) -> Arc<Self> {
        let arrivals = Arc::new(Self {
            waiting: Mutex::default(),
            arrived: Notify::new(),
        });
        let taking = Arc::clone(&arrivals);
        tokio::spawn(async move {
            loop {
                let (stream, port) = door.next().await;
                taking.put(port, stream);
            }
        });
        arrivals
    }

    fn put(&self, port: u32, stream: Box<dyn Stream>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (_, since)| since.elapsed() < KEPT);
        if waiting.len() >= MOST {
            warn!(port, "too many streams that no process asks for: dropped");
            return;
        }
        waiting.insert(port, (stream, Instant::now()));
        drop(waiting);
        self.arrived.notify_waiters();
    }

    /// The connection from the host's `port`; none for port 0.
    async fn take(&self, port: u32) -> Result<Option<Box<dyn Stream>>> {
        if port == 0 {
            return Ok(None);
        }
        let deadline = Instant::now()
            .checked_add(PATIENCE)
            .unwrap_or_else(Instant::now);
        loop {
            let mut arrived = Box::pin(self.arrived.notified());
            arrived.as_mut().enable();
            let found = {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                waiting.remove(&port)
            };
            if let Some((stream, _)) = found {
                return Ok(Some(stream));
            }
            if timeout_at(deadline, arrived).await.is_err() {
                return Err(AgentError::not_found(format!(
                    "no stream came from the host's port {port} within {} s",
                    PATIENCE.as_secs()
                )));
            }
        }
    }
}

/// The connections that a request names by `ports`: of standard input, output and errors. None
/// where it names none: then streams are read and written by calls.
///
/// # Errors
///
/// NOT_FOUND for one that does not come; UNIMPLEMENTED where this agent takes none.
pub(crate) async fn take(
    arrivals: Option<&Arrivals>,
    ports: [u32; 3],
) -> Result<Option<Connected>> {
    if ports == [0; 3] {
        return Ok(None);
    }
    let arrivals = arrivals.ok_or_else(|| {
        AgentError::unsupported(
            "stdin_port, stdout_port, stderr_port: agent.passfd_listener_port is 0",
        )
    })?;
    let [stdin, stdout, stderr] = ports;
    Ok(Some(Connected {
        stdin: arrivals.take(stdin).await?,
        stdout: arrivals.take(stdout).await?,
        stderr: arrivals.take(stderr).await?,
    }))
}

impl Connected {
    /// One connection for both directions, as of a terminal.
    pub(crate) fn both(stream: Box<dyn Stream>) -> Self {
        Self {
            stdin: None,
            stdout: Some(stream),
            stderr: None,
        }
    }

    /// Carries a process's streams over these connections until they end. `two_way` has what the
    /// host writes to the connection of the output be the input.
    pub(crate) async fn carry(self, stdio: Arc<Stdio>, exit: Exit, two_way: bool) {
        let (from, stdout) = match self.stdout.map(split) {
            Some((from, to)) => (Some(from), Some(to)),
            None => (None, None),
        };
        let stderr = self.stderr.map(|stream| split(stream).1);
        let (input_stdio, input_exit) = (Arc::clone(&stdio), exit.clone());
        let mut input = if two_way {
            tokio::spawn(write_all(input_stdio, input_exit, from))
        } else {
            // Whole: who writes to what the process has closed is told so.
            tokio::spawn(write_all(input_stdio, input_exit, self.stdin))
        };
        let error = read_all(Arc::clone(&stdio), exit.clone(), Output::Stderr, stderr);
        let output = read_all(Arc::clone(&stdio), exit.clone(), Output::Stdout, stdout);
        let mut outputs = Box::pin(async { tokio::join!(output, error) });
        if two_way {
            // Who hangs up gets what is on its way; then the terminal goes, and with it what runs.
            tokio::select! {
                _ = &mut outputs => {}
                _ = &mut input => {
                    let _ = stdio.write(END_OF_INPUT, &exit).await;
                    let _ = timeout(LAST_WORDS, &mut outputs).await;
                }
            }
        } else {
            outputs.await;
        }
        input.abort();
    }
}

/// From the host to standard input.
async fn write_all(stdio: Arc<Stdio>, exit: Exit, from: Option<impl AsyncRead + Unpin>) {
    if let Some(mut from) = from {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(length) = from.read(&mut buffer).await {
            let Some(data) = buffer.get(..length).filter(|data| !data.is_empty()) else {
                break;
            };
            if stdio.write(data, &exit).await.is_err() {
                break;
            }
        }
    }
    stdio.close_stdin().await;
}

/// From an output to the host. What the host no longer takes is thrown away: a process must not
/// wait for a reader that has gone.
async fn read_all(
    stdio: Arc<Stdio>,
    exit: Exit,
    output: Output,
    mut to: Option<WriteHalf<Box<dyn Stream>>>,
) {
    loop {
        let data = match stdio.read(output, PIECE, &exit).await {
            Ok(data) if !data.is_empty() => data,
            Ok(_) => break,
            Err(error) => {
                debug!(error = error.line(), "output not carried");
                break;
            }
        };
        if let Some(stream) = &mut to
            && !deliver(stream, &data, &exit).await
        {
            to = None;
        }
    }
    if let Some(mut stream) = to {
        let _ = stream.shutdown().await;
    }
}

/// Whether the host has taken `data`. As long as the process lives, it may take its time.
async fn deliver(stream: &mut WriteHalf<Box<dyn Stream>>, data: &[u8], exit: &Exit) -> bool {
    let mut exit = exit.clone();
    let late = async move {
        let _ = exit.wait_for(Option::is_some).await;
        sleep(LAST_WORDS).await;
    };
    tokio::select! {
        written = stream.write_all(data) => written.is_ok(),
        () = late => false,
    }
}

/// Waits until what `carrying` carries has arrived, or nobody takes it.
pub(crate) async fn carried(carrying: &mut tokio::task::JoinHandle<()>) {
    let _ = timeout(LAST_WORDS.saturating_mul(2), carrying).await;
}
