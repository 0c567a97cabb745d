// SPDX-License-Identifier: Apache-2.0
//! The host's end of a session: one command at a time, with our stdin, stdout, stderr and terminal.

use super::machine::Machine;
use super::wire::{self, Exec, Exit, Kind, Setup, Size};
use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::env;
use std::io::{IsTerminal, Read, Write, stderr, stdin, stdout};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

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

/// Brings up what `setup` names; an error holds the guest's words.
pub(crate) fn set_up(machine: &Machine, setup: &Setup) -> Result<()> {
    let mut stream = machine.stream()?;
    wire::write_message(&mut stream, Kind::Setup, setup)?;
    match wire::read(&mut stream)? {
        Some(frame) if frame.kind == Kind::SetupDone && frame.payload.is_empty() => Ok(()),
        Some(frame) if frame.kind == Kind::SetupDone => {
            bail!(
                "setting up the dev VM: {}",
                String::from_utf8_lossy(&frame.payload)
            )
        }
        Some(frame) => bail!("the dev VM answered the set-up with {:?}", frame.kind),
        None => bail!(
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
    Kept(&'a mut Vec<u8>),
}

/// Runs one command in the VM and returns its exit code.
pub(crate) fn execute(machine: &Machine, argv: Vec<String>, streams: Streams<'_>) -> Result<u8> {
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
    let result = collect(machine, streams);
    // Before an error is printed.
    drop(terminal);
    result?.with_context(|| {
        format!(
            "the dev VM died while the command ran\n{}",
            machine.last_words()
        )
    })
}

/// Passes output on until the command ends; `None` where the VM ended.
fn collect(machine: &Machine, mut streams: Streams<'_>) -> Result<Option<u8>> {
    let mut stream = machine.stream()?;
    while let Some(frame) = wire::read(&mut stream)? {
        match (frame.kind, &mut streams) {
            // A reader that went away is no reason to stop the command early.
            (Kind::Stdout, Streams::Ours) => drop(
                stdout()
                    .write_all(&frame.payload)
                    .and_then(|()| stdout().flush()),
            ),
            (Kind::Stderr, Streams::Ours) => drop(stderr().write_all(&frame.payload)),
            (Kind::Stdout | Kind::Stderr, Streams::Kept(output)) => {
                output.extend_from_slice(&frame.payload);
            }
            (Kind::Exit, _) => return Ok(Some(frame.message::<Exit>()?.code)),
            (other, _) => bail!("unexpected {other:?} frame from the dev VM"),
        }
    }
    Ok(None)
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
