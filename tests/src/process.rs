// SPDX-License-Identifier: Apache-2.0
//! Child processes with captured output and a deadline.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait::until;

/// How much of a stream an error message repeats, in bytes from its end.
const TAIL: usize = 4096;
/// How long output may stay open once the process has ended.
const DRAIN: Duration = Duration::from_secs(5);

/// Bytes that a thread reads as they come.
#[derive(Debug)]
pub(crate) struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Capture {
    pub(crate) fn start(source: impl Read + Send + 'static) -> Self {
        Self::spawn(source, |_| true)
    }

    /// Drops every `byte`.
    pub(crate) fn start_without(byte: u8, source: impl Read + Send + 'static) -> Self {
        Self::spawn(source, move |read| read != byte)
    }

    fn spawn(
        mut source: impl Read + Send + 'static,
        keep: impl Fn(u8) -> bool + Send + 'static,
    ) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            // A terminal's end is an error (EIO), so both end the capture.
            while let Ok(length @ 1..) = source.read(&mut buffer) {
                let read = buffer.get(..length).unwrap_or_default();
                let read = read.iter().copied().filter(|byte| keep(*byte));
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(read);
            }
        });
        Self { bytes, thread }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits for text from byte `from` on; answers the position behind it. Fails at once where
    /// the output has ended without.
    pub(crate) fn wait_for(&self, text: &str, from: usize, limit: Duration) -> Result<usize> {
        let needle = text.as_bytes();
        until(&format!("output {text:?}"), limit, || {
            let ended = self.thread.is_finished();
            let bytes = self.bytes();
            let found = bytes.get(from..).unwrap_or_default();
            let at = found
                .windows(needle.len())
                .position(|window| window == needle);
            ensure!(at.is_some() || !ended, "the output ended without {text:?}");
            Ok(at.map(|at| from.saturating_add(at).saturating_add(needle.len())))
        })
        .with_context(|| format!("so far: {}", tail(&self.bytes())))
    }
}

/// A process under way.
#[derive(Debug)]
pub struct Running {
    line: String,
    begin: Instant,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Capture,
    stderr: Capture,
}

impl Running {
    /// Starts a command with all three streams ours.
    pub fn start(command: &mut Command) -> Result<Self> {
        let line = line(command);
        let begin = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting `{line}`"))?;
        let stdin = child.stdin.take();
        let stdout = Capture::start(child.stdout.take().context("no stdout")?);
        let stderr = Capture::start(child.stderr.take().context("no stderr")?);
        Ok(Self {
            line,
            begin,
            child,
            stdin,
            stdout,
            stderr,
        })
    }

    /// The process's id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits until standard output holds `text`.
    pub fn wait_for_stdout(&self, text: &str, limit: Duration) -> Result<()> {
        self.stdout
            .wait_for(text, 0, limit)
            .map(|_| ())
            .with_context(|| self.describe("standard output"))
    }

    /// Standard output so far.
    #[must_use]
    pub fn stdout(&self) -> Vec<u8> {
        self.stdout.bytes()
    }

    /// Writes to standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stdin
            .as_mut()
            .context("standard input is closed")?
            .write_all(bytes)?;
        Ok(())
    }

    /// Writes all of `bytes` in the background, then closes standard input.
    pub fn feed(&mut self, bytes: Vec<u8>) -> Result<()> {
        let mut stdin = self.stdin.take().context("standard input is closed")?;
        thread::spawn(move || {
            // A process that ends without reading is for the caller to judge, by its output.
            let _ = stdin.write_all(&bytes);
        });
        Ok(())
    }

    /// Closes standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for the end of the process, and of its output.
    pub fn finish(mut self, limit: Duration) -> Result<Output> {
        let status = until("its end", limit, || Ok(self.child.try_wait()?))
            .with_context(|| self.describe("still running"))?;
        let elapsed = self.begin.elapsed();
        until("the end of its output", DRAIN, || {
            let done = self.stdout.thread.is_finished() && self.stderr.thread.is_finished();
            Ok(done.then_some(()))
        })
        .with_context(|| self.describe("output still open"))?;
        Ok(Output {
            line: self.line.clone(),
            code: status.code(),
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
            elapsed,
        })
    }

    fn describe(&self, state: &str) -> String {
        format!(
            "`{}`, {state} after {:.1?}\n--- stdout: {}\n--- stderr: {}",
            self.line,
            self.begin.elapsed(),
            tail(&self.stdout.bytes()),
            tail(&self.stderr.bytes())
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// What a process left.
#[derive(Debug)]
pub struct Output {
    line: String,
    /// Exit code; absent where a signal ended the process.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub elapsed: Duration,
}

impl Output {
    /// Fails unless the process ended with this code.
    pub fn exits(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "{self}\nexpected exit code {code}");
        Ok(self)
    }

    /// Fails unless the process ended with 0 and printed nothing on standard error.
    pub fn quietly(self) -> Result<Self> {
        let this = self.exits(0)?;
        ensure!(
            this.stderr.is_empty(),
            "{this}\nexpected nothing on standard error"
        );
        Ok(this)
    }

    /// Standard output as text, without the last line's end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// The value of the line `KEY=VALUE` on standard output.
    pub fn value(&self, key: &str) -> Result<String> {
        let text = self.text();
        let found = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        match found {
            Some(value) => Ok(value.trim().to_owned()),
            None => bail!("{self}\nexpected a line {key}=…"),
        }
    }

    /// The one line on standard error of a process that failed: no second line, no Go or Rust
    /// internals, and each of `words` in it.
    pub fn one_line(&self, words: &[&str]) -> Result<String> {
        ensure!(self.code != Some(0), "{self}\nexpected a failure");
        let text = String::from_utf8_lossy(&self.stderr);
        let mut lines = text.lines().filter(|line| !line.trim().is_empty());
        let Some(first) = lines.next() else {
            bail!("{self}\nexpected a line of words")
        };
        ensure!(lines.next().is_none(), "{self}\nexpected exactly one line");
        one_line(first, words).with_context(|| self.to_string())?;
        Ok(first.to_owned())
    }
}

/// Fails unless `text` is one line that has each of `words`, and no internals of Go or Rust.
pub fn one_line(text: &str, words: &[&str]) -> Result<()> {
    ensure!(!text.trim().contains('\n'), "expected one line: {text}");
    for word in words {
        ensure!(text.contains(word), "expected {word:?} in the line: {text}");
    }
    for internal in [
        "panicked",
        "RUST_BACKTRACE",
        "goroutine",
        "Error {",
        "Some(",
        "Errno(",
    ] {
        ensure!(
            !text.contains(internal),
            "expected words, not {internal:?}: {text}"
        );
    }
    Ok(())
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.code {
            Some(code) => write!(f, "`{}`: exit code {code}", self.line)?,
            None => write!(f, "`{}`: ended by a signal", self.line)?,
        }
        write!(
            f,
            " after {:.1?}\n--- stdout: {}\n--- stderr: {}",
            self.elapsed,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

/// A command as a shell would show it.
fn line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        let plain =
            !argument.is_empty() && !argument.contains(|c: char| " $&;|<>'\"\n".contains(c));
        // Writing to a string can't fail.
        let _ = if plain {
            write!(line, " {argument}")
        } else {
            write!(line, " '{argument}'")
        };
    }
    line
}

pub(crate) fn tail(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(TAIL);
    let text = String::from_utf8_lossy(bytes.get(from..).unwrap_or_default());
    if from == 0 {
        text.into_owned()
    } else {
        format!("({from} bytes before) …{text}")
    }
}
