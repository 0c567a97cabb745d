// SPDX-License-Identifier: Apache-2.0
//! A process's standard streams: between containerd's named pipes and the agent.
//!
//! The rules of the pipes follow from how containerd's clients attach and detach:
//! - An output pipe is held open for reading too, so that a client that goes away is no error and
//!   the next one can attach. It reports its end when the shim closes it.
//! - The input pipe is held open for writing too, so that a client that goes away doesn't end the
//!   input. It ends when `CloseIO` was called and every client is gone.
//!
//! An output is read from the guest until its end even where nobody wants it: the process would
//! block on a full pipe. After the process's end, a stream that another process keeps open is
//! given up once it is quiet.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::select;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::agent::{Agent, Output, ProcessName};
use crate::error::{Context, Kind, Result, ShimError};

/// How much one call carries. A pipe holds as much.
const CHUNK: u32 = 64 * 1024;
/// After the process's end: how long the agent may take for an answer. It ends a stream by itself
/// half a second after the end, once what the pipe holds is read; this is for one that doesn't.
const QUIET: Duration = Duration::from_secs(30);
/// After the process's end: how long a client may leave the output where it is.
const STUCK: Duration = Duration::from_secs(10);
/// After the process's end: how long all that is left may take.
const DRAIN: Duration = Duration::from_secs(60);

/// Where a process's streams go, as containerd names them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// The opened ends.
#[derive(Debug)]
pub(crate) struct Streams {
    stdin: Option<Input>,
    stdout: Sink,
    /// A terminal has one output.
    stderr: Option<Sink>,
}

#[derive(Debug)]
struct Input {
    pipe: pipe::Receiver,
    /// Keeps the pipe from ending with a client; gone after `CloseIO`.
    keeper: Option<File>,
}

#[derive(Debug)]
enum Sink {
    Discard,
    Pipe(pipe::Sender),
    File(tokio::fs::File),
}

impl Stdio {
    /// Opens the streams; nothing here waits for a client.
    pub(crate) fn open(&self) -> Result<Streams> {
        Ok(Streams {
            stdin: open_input(&self.stdin)?,
            stdout: open_output(&self.stdout)?,
            stderr: if self.terminal {
                None
            } else {
                Some(open_output(&self.stderr)?)
            },
        })
    }
}

/// A stream's path, from a path or a URI. A logging program (`binary://`) would have to be run
/// beside each container, and is refused.
fn path<'a>(stream: &'a str, what: &str) -> Result<(&'a str, bool)> {
    match stream.split_once("://") {
        None | Some(("fifo", _)) => Ok((stream.strip_prefix("fifo://").unwrap_or(stream), false)),
        Some(("file", path)) => Ok((path.split('?').next().unwrap_or(path), true)),
        Some((scheme, _)) => Err(ShimError::new(
            Kind::InvalidArgument,
            format!("{what} {stream}: streams of kind {scheme}:// are not supported"),
        )),
    }
}

fn open_input(stream: &str) -> Result<Option<Input>> {
    if stream.is_empty() {
        return Ok(None);
    }
    let (path, is_file) = path(stream, "stdin")?;
    if is_file {
        return Err(ShimError::new(
            Kind::InvalidArgument,
            format!("stdin {stream}: a file can't be an input"),
        ));
    }
    let context = || format!("open stdin {path}");
    // In this order: opening for writing without blocking needs a reader.
    let pipe = pipe::OpenOptions::new()
        .open_receiver(path)
        .context(Kind::InvalidArgument, context)?;
    let keeper = OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .context(Kind::InvalidArgument, context)?;
    Ok(Some(Input {
        pipe,
        keeper: Some(keeper),
    }))
}

fn open_output(stream: &str) -> Result<Sink> {
    if stream.is_empty() {
        return Ok(Sink::Discard);
    }
    let (path, is_file) = path(stream, "output")?;
    let context = || format!("open output {path}");
    if is_file {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .context(Kind::InvalidArgument, context)?;
        return Ok(Sink::File(tokio::fs::File::from_std(file)));
    }
    let pipe = pipe::OpenOptions::new()
        .read_write(true)
        .open_sender(path)
        .context(Kind::InvalidArgument, context)?;
    Ok(Sink::Pipe(pipe))
}

impl Sink {
    async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Discard => Ok(()),
            Self::Pipe(pipe) => pipe.write_all(data).await,
            Self::File(file) => file.write_all(data).await,
        }
    }

    async fn flush(&mut self) {
        if let Self::File(file) = self {
            let _ = file.flush().await;
        }
    }
}

/// The running pumps of a process.
#[derive(Debug)]
pub(crate) struct Pumps {
    outputs: JoinSet<()>,
    input: JoinSet<()>,
    keeper: Option<File>,
    exited: watch::Sender<bool>,
}

impl Streams {
    /// Lets the input end when every client has closed it.
    pub(crate) fn close_stdin(&mut self) {
        if let Some(input) = &mut self.stdin {
            input.keeper = None;
        }
    }

    /// Starts to pump. The process must exist in the guest.
    pub(crate) fn pump(self, agent: &Agent, process: &ProcessName) -> Pumps {
        let (exited, _) = watch::channel(false);
        let mut outputs = JoinSet::new();
        let sinks = [
            (Output::Stdout, Some(self.stdout)),
            (Output::Stderr, self.stderr),
        ];
        for (stream, sink) in sinks {
            if let Some(sink) = sink {
                let (agent, process) = (agent.clone(), process.clone());
                outputs.spawn(pump_output(
                    agent,
                    process,
                    stream,
                    sink,
                    exited.subscribe(),
                ));
            }
        }
        let terminal = outputs.len() == 1;
        let mut input = JoinSet::new();
        let keeper = match self.stdin {
            Some(Input { pipe, keeper }) => {
                input.spawn(pump_input(agent.clone(), process.clone(), pipe, terminal));
                keeper
            }
            None => {
                if !terminal {
                    let (agent, process) = (agent.clone(), process.clone());
                    input.spawn(async move { end_input(&agent, &process).await });
                }
                None
            }
        };
        Pumps {
            outputs,
            input,
            keeper,
            exited,
        }
    }
}

impl Pumps {
    /// Lets the input end when every client has closed it.
    pub(crate) fn close_stdin(&mut self) {
        self.keeper = None;
    }

    /// Tells the pumps that the process has ended: no more input, and output only as long as
    /// there is some.
    pub(crate) fn process_ended(&mut self) {
        self.input.abort_all();
        self.close_stdin();
        self.exited.send_replace(true);
    }

    /// Waits until all output is delivered, after the process's end.
    pub(crate) async fn drained(mut self) {
        // The pumps bound themselves; the rest is for a file system that hangs.
        let all = async { while self.outputs.join_next().await.is_some() {} };
        if timeout(DRAIN.saturating_add(QUIET), all).await.is_err() {
            debug!("output given up");
        }
    }
}

async fn pump_output(
    agent: Agent,
    process: ProcessName,
    stream: Output,
    mut sink: Sink,
    exited: watch::Receiver<bool>,
) {
    let after_exit = |time: Duration| {
        let mut exited = exited.clone();
        async move {
            // The sender lives as long as the process's record; its end is an end as well.
            let _ = exited.wait_for(|exited| *exited).await;
            sleep(time).await;
        }
    };
    let deliver = async {
        loop {
            let data = select! {
                biased;
                data = agent.read(&process, stream, CHUNK) => data,
                () = after_exit(QUIET) => break,
            };
            match data {
                Ok(data) if data.is_empty() => break,
                Ok(data) => {
                    let written = select! {
                        biased;
                        written = sink.write_all(&data) => written,
                        () = after_exit(STUCK) => Err(io::ErrorKind::TimedOut.into()),
                    };
                    if let Err(error) = written {
                        debug!(?process, ?stream, %error, "output has nowhere to go");
                        sink = Sink::Discard;
                    }
                }
                Err(error) => {
                    debug!(?process, ?stream, error = error.chain(), "output ended");
                    break;
                }
            }
        }
        sink.flush().await;
    };
    select! {
        () = deliver => {}
        () = after_exit(DRAIN) => debug!(?process, ?stream, "output given up"),
    }
}

async fn pump_input(agent: Agent, process: ProcessName, pipe: pipe::Receiver, terminal: bool) {
    loop {
        if pipe.readable().await.is_err() {
            return;
        }
        // Allocated for data only: a shell that waits for input costs nothing.
        let mut data = Vec::with_capacity(CHUNK as usize);
        match pipe.try_read_buf(&mut data) {
            Ok(0) => break,
            Ok(_) => {
                if let Err(error) = write_all(&agent, &process, &data).await {
                    // The process closed its input, or ended. Clients see a broken pipe.
                    debug!(?process, error = error.chain(), "input ended");
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                debug!(?process, %error, "input ended");
                break;
            }
        }
    }
    // The end of a terminal's input is a character in it, not the end of its client.
    if !terminal {
        end_input(&agent, &process).await;
    }
}

async fn write_all(agent: &Agent, process: &ProcessName, data: &[u8]) -> Result<()> {
    let mut rest = data;
    while !rest.is_empty() {
        let written = agent.write(process, rest.to_vec()).await?;
        rest = match rest.get(written..) {
            Some(more) if written > 0 => more,
            _ => {
                return Err(ShimError::new(
                    Kind::Internal,
                    format!("the agent took {written} of {} bytes", rest.len()),
                ));
            }
        };
    }
    Ok(())
}

async fn end_input(agent: &Agent, process: &ProcessName) {
    if let Err(error) = agent.close_stdin(process).await {
        debug!(?process, error = error.chain(), "input not closed");
    }
}
