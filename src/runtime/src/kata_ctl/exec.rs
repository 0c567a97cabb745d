// SPDX-License-Identifier: Apache-2.0
//! `exec`: a terminal on the debug console of a sandbox's guest.
//!
//! The console carries the bytes of a terminal and nothing else; it has no word for the window's
//! size.

use std::fs;
use std::future::pending;
use std::io::{self, IsTerminal, Read, Write, stdin, stdout};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime;
use tokio::select;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::error::{Context, Kind, Result, ShimError};
use crate::paths;
use crate::sandbox::{CONSOLE_PORT, connect};

/// How long a guest may take to say that it listens.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ctrl-], by which telnet and `virsh console` are left as well.
const LEAVE: u8 = 0x1d;

/// Carries standard input and output to a shell of the guest's, to its end.
pub(super) fn run(sandbox: &str) -> Result<()> {
    let sandbox = find(paths::sandboxes(), sandbox)?;
    let what = || format!("the console of sandbox {sandbox}");
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .internal(what)?;
    runtime.block_on(async {
        let console = open(&sandbox).await?;
        let [mut terminate, mut hang_up, mut interrupt] = ends().internal(what)?;
        let terminal = Raw::enter().internal(what)?;
        select! {
            carried = carry(console, terminal.is_some()) => carried.internal(what),
            _ = terminate.recv() => Ok(()),
            _ = hang_up.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })
}

/// The sandbox of that name, or the one whose name begins so.
fn find(sandboxes: &Path, wanted: &str) -> Result<String> {
    let mut names: Vec<_> = fs::read_dir(sandboxes)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !wanted.is_empty() && name.starts_with(wanted))
        .collect();
    if names.iter().any(|name| name == wanted) {
        return Ok(wanted.to_owned());
    }
    names.sort();
    match names.as_slice() {
        [name] => Ok(name.clone()),
        [] => Err(ShimError::new(
            Kind::NotFound,
            format!("sandbox {wanted:?}: no sandbox of that name runs on this host"),
        )),
        _ => Err(ShimError::new(
            Kind::InvalidArgument,
            format!("sandbox {wanted:?}: it may be {}", names.join(", ")),
        )),
    }
}

async fn open(sandbox: &str) -> Result<UnixStream> {
    let what = || format!("connect to the console of sandbox {sandbox}");
    let path = paths::vsock(sandbox);
    let connecting = timeout(PATIENCE, connect(&path, CONSOLE_PORT));
    let connected = connecting.await.context(Kind::DeadlineExceeded, || {
        format!("{}: the guest does not answer", what())
    })?;
    match connected {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ShimError::new(
            Kind::FailedPrecondition,
            format!(
                "sandbox {sandbox} has no debug console: debug_console_enabled was not on when it \
                 was made"
            ),
        )),
        connected => connected.context(Kind::Unavailable, what),
    }
}

/// The signals that would end this program without the terminal's being restored.
fn ends() -> io::Result<[Signal; 3]> {
    Ok([
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
        signal(SignalKind::interrupt())?,
    ])
}

/// Until the guest hangs up, or somebody at a terminal leaves.
async fn carry(console: UnixStream, at_terminal: bool) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = console.into_split();
    let (sender, mut typed) = mpsc::channel(1);
    // Reading a terminal can't be given up: this thread ends with the program.
    thread::spawn(move || read_input(&sender));
    let input = async {
        while let Some(typed) = typed.recv().await {
            if at_terminal && typed.contains(&LEAVE) {
                return;
            }
            if to_guest.write_all(&typed).await.is_err() {
                break;
            }
        }
        // The guest may have more to say to what it was told.
        let _ = to_guest.shutdown().await;
        pending::<()>().await;
    };
    let output = async {
        let mut said = vec![0; 16 << 10];
        loop {
            let length = from_guest.read(&mut said).await?;
            let said = said.get(..length).unwrap_or_default();
            if said.is_empty() {
                return Ok(());
            }
            let mut stdout = stdout().lock();
            stdout.write_all(said).and_then(|()| stdout.flush())?;
        }
    };
    select! {
        () = input => Ok(()),
        ended = output => ended,
    }
}

fn read_input(typed: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    let mut stdin = stdin().lock();
    while let Ok(length @ 1..) = stdin.read(&mut buffer) {
        let some = buffer.get(..length).unwrap_or_default();
        if typed.blocking_send(some.to_vec()).is_err() {
            return;
        }
    }
}

/// The terminal of standard input, every byte of which goes to the guest as long as this lives.
struct Raw {
    before: Termios,
}

impl Raw {
    /// None where standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // It fails only where the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_found_by_the_beginning_of_its_name() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["abc", "abcd", "b1"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let found = |wanted| find(folder.path(), wanted);
        assert_eq!(found("b").unwrap(), "b1");
        assert_eq!(found("abc").unwrap(), "abc");
        for (wanted, reason) in [
            ("ab", "it may be abc, abcd"),
            ("x", "no sandbox"),
            ("", "no"),
        ] {
            let error = found(wanted).unwrap_err().chain();
            assert!(error.contains(reason), "{error}");
        }
    }
}
