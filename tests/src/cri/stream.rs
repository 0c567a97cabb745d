// SPDX-License-Identifier: Apache-2.0
//! Streams of an exec, an attach or a port-forward: WebSockets with Kubernetes' subprotocol
//! `v4.channel.k8s.io`, where a message's first byte is its channel.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Bytes, Error, Message, WebSocket, client};

use super::Cri;
use super::messages::{AttachRequest, ExecRequest, PortForwardRequest, StreamResponse};
use crate::process::tail;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// How long a read waits before the deadline is looked at.
const POLL: Duration = Duration::from_millis(20);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

impl Cri {
    /// Starts a command in a container with all its streams.
    pub fn exec(&self, container: &str, argv: &[&str], terminal: bool) -> Result<Session> {
        let request = ExecRequest {
            container_id: container.to_owned(),
            cmd: argv.iter().map(|&word| word.to_owned()).collect(),
            tty: terminal,
            stdin: true,
            stdout: true,
            // A terminal has one output.
            stderr: !terminal,
            ..Default::default()
        };
        let answer: StreamResponse = self.runtime("Exec", &request)?;
        Session::open(&answer.url)
    }

    /// Attaches to a container's own process.
    pub fn attach(&self, container: &str, terminal: bool) -> Result<Session> {
        let request = AttachRequest {
            container_id: container.to_owned(),
            tty: terminal,
            stdin: true,
            stdout: true,
            stderr: !terminal,
            ..Default::default()
        };
        let answer: StreamResponse = self.runtime("Attach", &request)?;
        Session::open(&answer.url)
    }

    /// Connects to a port of a pod through containerd.
    pub fn forward(&self, pod: &str, port: u16) -> Result<Forward> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.to_owned(),
            port: vec![port.into()],
            ..Default::default()
        };
        let answer: StreamResponse = self.runtime("PortForward", &request)?;
        Ok(Forward {
            channels: Channels::open(&format!("{}?port={port}", answer.url))?,
        })
    }
}

/// A process with its streams at the other end.
#[derive(Debug)]
pub struct Session {
    channels: Channels,
}

impl Session {
    fn open(url: &str) -> Result<Self> {
        Channels::open(url).map(|channels| Self { channels })
    }

    /// Writes to standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.channels.send(STDIN, bytes)
    }

    /// Sets the terminal's size.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        self.channels.send(RESIZE, size.as_bytes())
    }

    /// Standard output so far.
    #[must_use]
    pub fn stdout(&self) -> &[u8] {
        self.channels.received(STDOUT)
    }

    /// Standard error so far.
    #[must_use]
    pub fn stderr(&self) -> &[u8] {
        self.channels.received(STDERR)
    }

    /// Waits until standard output holds `text`.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        self.channels.wait_for(STDOUT, text, limit)
    }

    /// Waits for the process's end; answers its exit code.
    pub fn finish(&mut self, limit: Duration) -> Result<i32> {
        self.channels.drain(limit)?;
        let status = self.channels.received(STATUS);
        let status: Value = serde_json::from_slice(status)
            .with_context(|| format!("a status of {:?}", tail(status)))?;
        let field = |name: &str| status.get(name).and_then(Value::as_str);
        if field("status") == Some("Success") {
            return Ok(0);
        }
        if field("reason") != Some("NonZeroExitCode") {
            bail!("{}", field("message").unwrap_or("no reason given"));
        }
        let code = status.pointer("/details/causes/0/message");
        let code = code.and_then(Value::as_str).context("no exit code")?;
        Ok(code.parse()?)
    }

    /// Goes away, as a client that is killed.
    pub fn hang_up(self) {}
}

/// A connection to a port of a pod.
#[derive(Debug)]
pub struct Forward {
    channels: Channels,
}

impl Forward {
    /// Each of its two channels, data and errors, begins with the port's number.
    const PORT: usize = 2;

    /// Writes to the port.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.channels.send(0, bytes)
    }

    /// Reads until the pod closes the connection.
    pub fn read_to_end(&mut self, limit: Duration) -> Result<Vec<u8>> {
        self.channels.drain(limit)?;
        let error = self.channels.received(1);
        let words = error.get(Self::PORT..).unwrap_or_default();
        ensure!(words.is_empty(), "{}", String::from_utf8_lossy(words));
        let data = self.channels.received(0);
        Ok(data.get(Self::PORT..).unwrap_or_default().to_vec())
    }
}

#[derive(Debug)]
struct Channels {
    socket: WebSocket<TcpStream>,
    received: [Vec<u8>; 5],
    open: bool,
}

impl Channels {
    fn open(url: &str) -> Result<Self> {
        let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
        let address = request.uri().authority().context("no address")?.to_string();
        request
            .headers_mut()
            .insert("sec-websocket-protocol", PROTOCOL.parse()?);
        let stream = TcpStream::connect(&address)
            .with_context(|| format!("connecting to the streams at {address}"))?;
        let (socket, _) = client::client(request, stream)
            .map_err(|error| anyhow::anyhow!("opening the streams: {error}"))?;
        socket.get_ref().set_read_timeout(Some(POLL))?;
        Ok(Self {
            socket,
            received: Default::default(),
            open: true,
        })
    }

    fn received(&self, channel: u8) -> &[u8] {
        self.received
            .get(usize::from(channel))
            .map_or(&[], Vec::as_slice)
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[channel], bytes].concat();
        Ok(self.socket.send(Message::Binary(Bytes::from(message)))?)
    }

    /// Takes in one message, if one comes soon.
    fn step(&mut self) -> Result<()> {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                let (channel, bytes) = bytes.split_first().context("an empty message")?;
                self.received
                    .get_mut(usize::from(*channel))
                    .with_context(|| format!("a message on channel {channel}"))?
                    .extend_from_slice(bytes);
            }
            Ok(_) => {}
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => {
                self.open = false;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn wait_for(&mut self, channel: u8, text: &str, limit: Duration) -> Result<()> {
        let begin = Instant::now();
        while !String::from_utf8_lossy(self.received(channel)).contains(text) {
            ensure!(
                self.open && begin.elapsed() < limit,
                "no {text:?} on channel {channel} after {:.1?} ({}); so far: {}",
                begin.elapsed(),
                if self.open { "open" } else { "closed" },
                self.describe()
            );
            self.step()?;
        }
        Ok(())
    }

    fn drain(&mut self, limit: Duration) -> Result<()> {
        let begin = Instant::now();
        while self.open {
            ensure!(
                begin.elapsed() < limit,
                "the streams are open after {limit:?}; so far: {}",
                self.describe()
            );
            self.step()?;
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let words = self.received.iter().map(|bytes| tail(bytes));
        words.collect::<Vec<_>>().join(" | ")
    }
}
