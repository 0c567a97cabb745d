// SPDX-License-Identifier: Apache-2.0
//! The host's end of a session: one command at a time, with our stdin, stdout, stderr and terminal.

use super::machine::Machine;
use super::wire::{self, Exec, Exit, Frame, Kind, Setup, Size};
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::env;
use std::fmt;
use std::io::{IsTerminal, Read, Write, stderr, stdin, stdout};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a changed terminal size is looked for.
const RESIZE_INTERVAL: Duration = Duration::from_millis(250);
/// Variables of the caller that are passed on.
const PASSED_ENV: &[&str] = &[
    "TERM",
    "COLORTERM",
    "LANG",
    "RUST_BACKTRACE",
    "RUST_LOG",
    "NO_COLOR",
];
/// Prefix of further variables that are passed on.
const PASSED_PREFIX: &str = "NUTSHELL_";

/// A VM that is silent for so long is frozen: it says that it gets on far more often.
const SILENCE: Duration = Duration::from_secs(120);
/// How long an overdue command may take to be reported and killed; longer than [`SILENCE`], so that a
/// frozen VM is known as one.
const GRACE: Duration = Duration::from_secs(150);

/// Brings up what `setup` names; an error holds the guest's words.
pub(crate) fn set_up(machine: &Machine, setup: &Setup) -> Result<()> {
    let mut stream = machine.stream()?;
    wire::write_message(&mut stream, Kind::Setup, setup)?;
    match next(&mut stream, None)? {
        Next::Frame(frame) if frame.kind == Kind::SetupDone && frame.payload.is_empty() => Ok(()),
        Next::Frame(frame) if frame.kind == Kind::SetupDone => {
            bail!(
                "setting up the dev VM: {}",
                String::from_utf8_lossy(&frame.payload)
            )
        }
        Next::Frame(frame) => bail!("the dev VM answered the set-up with {:?}", frame.kind),
        Next::Silent => bail!("the set-up: {}", machine.frozen(SILENCE)),
        Next::Gone | Next::Late => bail!(
            "the dev VM died during its set-up\n{}",
            machine.last_words()
        ),
    }
}

/// What a command's streams are joined to.
#[derive(Debug)]
pub(crate) enum Streams<'a> {
    /// Our stdin, stdout, stderr and terminal.
    Ours,
    /// No input; both outputs, in their order.
    Kept {
        output: &'a mut Vec<u8>,
        /// On our stdout as well.
        shown: bool,
    },
}

/// How a command ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// With this exit code.
    Exited(u8),
    /// It took longer than it may and was killed; its output's end says what hung.
    Overdue,
    /// The VM died or froze: its last words.
    Lost(String),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Overdue => f.write_str("it did not end in time and was killed"),
            Self::Lost(words) => f.write_str(words),
        }
    }
}

/// Runs one command in the VM, for at most `limit`.
pub(crate) fn execute(
    machine: &Machine,
    argv: Vec<String>,
    streams: Streams<'_>,
    limit: Option<Duration>,
) -> Result<Ended> {
    let ours = matches!(streams, Streams::Ours);
    let terminal = ours.then(Terminal::raw).flatten();
    let exec = Exec {
        argv,
        cwd: env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        env: env::vars()
            .filter(|(name, _)| {
                PASSED_ENV.contains(&name.as_str()) || name.starts_with(PASSED_PREFIX)
            })
            .collect(),
        terminal: terminal.as_ref().and_then(|_| size()),
    };
    let sender = Arc::new(Mutex::new(machine.stream()?));
    send(&sender, Kind::Exec, &serde_json::to_vec(&exec)?)?;
    if ours {
        let input = Arc::clone(&sender);
        thread::spawn(move || forward_input(&input));
    } else {
        send(&sender, Kind::Stdin, &[])?;
    }
    if exec.terminal.is_some() {
        let resizes = Arc::clone(&sender);
        thread::spawn(move || follow_size(&resizes));
    }
    let result = collect(machine, &sender, streams, limit);
    // Before an error is printed.
    drop(terminal);
    result
}

/// Passes output on until the command ends.
fn collect(
    machine: &Machine,
    sender: &Mutex<UnixStream>,
    mut streams: Streams<'_>,
    limit: Option<Duration>,
) -> Result<Ended> {
    let mut stream = machine.stream()?;
    let after = |time| Instant::now().checked_add(time);
    let mut deadline = limit.and_then(after);
    let mut overdue = false;
    loop {
        let frame = match next(&mut stream, deadline)? {
            Next::Frame(frame) => frame,
            Next::Late if overdue => return Ok(Ended::Overdue),
            Next::Late => {
                send(sender, Kind::Overdue, &[])?;
                (overdue, deadline) = (true, after(GRACE));
                continue;
            }
            Next::Silent => return Ok(Ended::Lost(machine.frozen(SILENCE))),
            Next::Gone => {
                let words = machine.last_words();
                return Ok(Ended::Lost(format!(
                    "the dev VM died while the command ran\n{words}"
                )));
            }
        };
        match (frame.kind, &mut streams) {
            (Kind::Stdout, Streams::Ours) => show(&frame.payload),
            (Kind::Stderr, Streams::Ours) => drop(stderr().write_all(&frame.payload)),
            (Kind::Stdout | Kind::Stderr, Streams::Kept { output, shown }) => {
                output.extend_from_slice(&frame.payload);
                if *shown {
                    show(&frame.payload);
                }
            }
            (Kind::Exit, _) if overdue => return Ok(Ended::Overdue),
            (Kind::Exit, _) => return Ok(Ended::Exited(frame.message::<Exit>()?.code)),
            (other, _) => bail!("unexpected {other:?} frame from the dev VM"),
        }
    }
}

fn show(bytes: &[u8]) {
    // A reader that went away is no reason to stop the command early.
    let _ = stdout().write_all(bytes).and_then(|()| stdout().flush());
}

/// What came of waiting for a frame.
enum Next {
    Frame(Frame),
    /// The other end is gone.
    Gone,
    /// Not even a heartbeat for [`SILENCE`].
    Silent,
    /// The deadline has passed.
    Late,
}

/// Waits for a frame that is no heartbeat.
fn next(stream: &mut UnixStream, deadline: Option<Instant>) -> Result<Next> {
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(Next::Late);
        }
        let wait = left.unwrap_or(SILENCE).min(SILENCE);
        let ready = poll(
            &mut [PollFd::new(stream, PollFlags::IN)],
            Some(&wait.try_into()?),
        )?;
        if ready == 0 {
            if wait == SILENCE {
                return Ok(Next::Silent);
            }
            continue;
        }
        match wire::read(stream)? {
            Some(frame) if frame.kind == Kind::Alive => {}
            Some(frame) => return Ok(Next::Frame(frame)),
            None => return Ok(Next::Gone),
        }
    }
}

fn send(stream: &Mutex<UnixStream>, kind: Kind, payload: &[u8]) -> Result<()> {
    wire::write(
        &mut *stream.lock().unwrap_or_else(PoisonError::into_inner),
        kind,
        payload,
    )
}

/// Copies our stdin until its end, or until the session is gone.
fn forward_input(stream: &Mutex<UnixStream>) {
    let mut buffer = vec![0; wire::MAX_PAYLOAD];
    let mut input = stdin().lock();
    loop {
        let count = input.read(&mut buffer).unwrap_or(0);
        let bytes = buffer.get(..count).unwrap_or_default();
        if send(stream, Kind::Stdin, bytes).is_err() || count == 0 {
            return;
        }
    }
}

/// Sends the terminal's size when it changes. Looking is simpler than a signal handler, and quick enough.
fn follow_size(stream: &Mutex<UnixStream>) {
    let mut last = size();
    loop {
        thread::sleep(RESIZE_INTERVAL);
        let now = size();
        if now != last
            && let Some(size) = now
        {
            let Ok(message) = serde_json::to_vec(&size) else {
                return;
            };
            if send(stream, Kind::Resize, &message).is_err() {
                return;
            }
            last = now;
        }
    }
}

fn size() -> Option<Size> {
    let size = tcgetwinsize(stdin()).ok()?;
    Some(Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Our terminal in raw mode; dropping restores it.
struct Terminal {
    saved: Termios,
}

impl Terminal {
    /// `None` unless both input and output are a terminal.
    fn raw() -> Option<Self> {
        if !stdin().is_terminal() || !stdout().is_terminal() {
            return None;
        }
        let saved = tcgetattr(stdin()).ok()?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Flush, &raw)
            .context("raw terminal")
            .ok()?;
        Some(Self { saved })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), OptionalActions::Flush, &self.saved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_keep_no_command_alive() {
        let (mut host, mut guest) = UnixStream::pair().unwrap();
        wire::write(&mut guest, Kind::Alive, &[]).unwrap();
        wire::write(&mut guest, Kind::Stdout, b"abc").unwrap();
        wire::write(&mut guest, Kind::Alive, &[]).unwrap();
        let soon = || Instant::now().checked_add(Duration::from_millis(50));
        let frame = next(&mut host, soon()).unwrap();
        assert!(matches!(frame, Next::Frame(frame) if frame.payload == b"abc"));
        assert!(matches!(next(&mut host, soon()).unwrap(), Next::Late));
        drop(guest);
        assert!(matches!(next(&mut host, None).unwrap(), Next::Gone));
    }
}
