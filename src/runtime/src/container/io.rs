// SPDX-License-Identifier: Apache-2.0
//! A process's standard streams: between containerd's named pipes and the agent, by calls, or past the
//! runtime: then the monitor has the pipes' ends as well.
//!
//! The rules of the pipes follow from how containerd's clients attach and detach:
//! - An output pipe is held open for reading too, so that a client that goes away is no error and
//!   the next one can attach. It reports its end when the shim closes it.
//! - The input pipe is held open for writing too, so that a client that goes away doesn't end the
//!   input. It ends when `CloseIO` was called and every client is gone.
//!
//! A process's end is told once its output has been taken: containerd 1.6.20 closes its side of
//! a pod's pipes as soon as it hears of the end, with whatever is still in them.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::output::{DRAIN, Flow, OutputPump, Sink, settled};
use super::passed::PassedOutput;
use crate::agent::{Agent, Output, ProcessName};
use crate::error::{Context, Kind, Result, ShimError};
use crate::sandbox::{Passed, StreamDoor};

/// How much one call carries. A pipe holds as much.
pub(super) const CHUNK: u32 = 64 * 1024;
/// After the process's end: how long it may take until what it wrote is where it belongs.
const SETTLE: Duration = Duration::from_secs(30);

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
    /// What of these the monitor moves, if it moves them.
    passed: Option<PassedStreams>,
}

#[derive(Debug)]
struct PassedStreams {
    stdin: Option<Passed>,
    stdout: Option<Passed>,
    stderr: Option<Passed>,
}

/// The names under which the agent finds streams that the monitor moves; 0 for one that isn't there.
/// All are 0 where it moves none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StreamPorts {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
}

#[derive(Debug)]
struct Input {
    /// Gone once it was passed.
    pipe: Option<pipe::Receiver>,
    /// Keeps the pipe from ending with a client; gone after `CloseIO`.
    keeper: Option<File>,
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
            passed: None,
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
        pipe: Some(pipe),
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

/// Passes the writing end of an output's pipe: the runtime's own reads, too.
async fn pass_output(sink: &Sink, door: &StreamDoor) -> Result<Option<Passed>> {
    let Sink::Pipe(pipe) = sink else {
        return Ok(None);
    };
    let writer = OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(format!("/proc/self/fd/{}", pipe.as_fd().as_raw_fd()))
        .internal(|| "open an output's pipe".to_owned())?;
    door.pass(writer).await.map(Some)
}

/// The running pumps of a process.
#[derive(Debug)]
pub(crate) struct Pumps {
    outputs: JoinSet<()>,
    flows: Vec<watch::Receiver<Flow>>,
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

    /// Has the monitor move the streams, for a process that is still to be made. A file takes no
    /// notice of who waits to write to it, so what goes into one comes by calls, with all else of that
    /// process.
    pub(crate) async fn pass(&mut self, door: &StreamDoor) -> Result<StreamPorts> {
        let stderr = self.stderr.as_ref().unwrap_or(&Sink::Discard);
        let outputs = [&self.stdout, stderr];
        let stdin = self.stdin.as_ref().and_then(|input| input.pipe.as_ref());
        if outputs.iter().any(|sink| matches!(sink, Sink::File(_)))
            || (stdin.is_none() && outputs.iter().all(|sink| matches!(sink, Sink::Discard)))
        {
            return Ok(StreamPorts::default());
        }
        let input = async {
            match stdin {
                Some(pipe) => door.pass(pipe).await.map(Some),
                None => Ok(None),
            }
        };
        let [stdout, stderr] = outputs.map(|sink| pass_output(sink, door));
        let (stdin, stdout, stderr) = tokio::try_join!(input, stdout, stderr)?;
        let port = |stream: &Option<Passed>| stream.as_ref().map_or(0, |stream| stream.port);
        let ports = StreamPorts {
            stdin: port(&stdin),
            stdout: port(&stdout),
            stderr: port(&stderr),
        };
        if let Some(input) = &mut self.stdin {
            input.pipe = None;
        }
        self.passed = Some(PassedStreams {
            stdin,
            stdout,
            stderr,
        });
        Ok(ports)
    }

    /// Starts to pump, or to watch what the monitor moves. The process must exist in the guest.
    pub(crate) fn pump(mut self, agent: &Agent, process: &ProcessName) -> Pumps {
        match self.passed.take() {
            Some(passed) => self.watch(passed),
            None => self.pump_by_calls(agent, process),
        }
    }

    fn watch(self, passed: PassedStreams) -> Pumps {
        let (exited, _) = watch::channel(false);
        let mut outputs = JoinSet::new();
        let mut flows = Vec::new();
        let sinks = [
            (passed.stdout, Some(self.stdout)),
            (passed.stderr, self.stderr),
        ];
        for sink in sinks {
            if let (Some(stream), Some(Sink::Pipe(pipe))) = sink {
                let (flow, watched) = watch::channel(Flow::Client);
                flows.push(watched);
                let exited = exited.subscribe();
                let output = PassedOutput {
                    pipe,
                    stream,
                    exited,
                    flow,
                };
                outputs.spawn(output.run());
            }
        }
        let mut input = JoinSet::new();
        if let Some(mut stream) = passed.stdin {
            // Hung up with the process's end.
            input.spawn(async move { stream.ended().await });
        }
        Pumps {
            outputs,
            flows,
            input,
            keeper: self.stdin.and_then(|input| input.keeper),
            exited,
        }
    }

    fn pump_by_calls(self, agent: &Agent, process: &ProcessName) -> Pumps {
        let (exited, _) = watch::channel(false);
        let mut outputs = JoinSet::new();
        let sinks = [
            (Output::Stdout, Some(self.stdout)),
            (Output::Stderr, self.stderr),
        ];
        let mut flows = Vec::new();
        for (stream, sink) in sinks {
            if let Some(sink) = sink {
                let pump = OutputPump::new(agent, process, stream, sink, exited.subscribe());
                flows.push(pump.flow());
                outputs.spawn(pump.run());
            }
        }
        let terminal = outputs.len() == 1;
        let mut input = JoinSet::new();
        let keeper = match self.stdin {
            Some(Input { pipe, keeper }) => {
                if let Some(pipe) = pipe {
                    input.spawn(pump_input(agent.clone(), process.clone(), pipe, terminal));
                }
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
            flows,
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

    /// Whether the process has ended.
    pub(crate) fn ending(&self) -> bool {
        *self.exited.borrow()
    }

    /// Tells the pumps that the process has ended: no more input, and output only as long as
    /// there is some. The first time it answers what waits until the clients have taken it.
    pub(crate) fn process_ended(&mut self) -> Option<impl Future<Output = ()> + use<>> {
        self.input.abort_all();
        self.close_stdin();
        if self.exited.send_replace(true) {
            return None;
        }
        let flows = mem::take(&mut self.flows);
        Some(async move {
            let all = async {
                for flow in flows {
                    settled(flow).await;
                }
            };
            if timeout(SETTLE, all).await.is_err() {
                debug!("output is not taken in time");
            }
        })
    }

    /// Waits until all output is delivered, after the process's end.
    pub(crate) async fn drained(mut self) {
        // The pumps bound themselves; the rest is for a file system that hangs.
        let all = async { while self.outputs.join_next().await.is_some() {} };
        if timeout(DRAIN.saturating_mul(2), all).await.is_err() {
            debug!("output given up");
        }
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
