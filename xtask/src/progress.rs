// SPDX-License-Identifier: Apache-2.0
//! What the user sees of long steps, and running other programs.
//!
//! All of it goes to stderr: stdout belongs to the command that the user asked for.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{IsTerminal, Write, stderr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

/// How often a running step is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often a running step is mentioned in a log without a terminal.
const REMINDER: Duration = Duration::from_secs(20);
/// Lines of a failed step's output to show.
const TAIL_LINES: usize = 25;

/// Prints one line about what is being done.
pub(crate) fn note(text: &str) {
    let _ = writeln!(stderr(), "xtask: {text}");
}

/// The command line as a user would type it.
pub(crate) fn command_line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

/// Mentions now and then that a step goes on whose own output stays as it is, until dropped.
#[derive(Debug)]
pub(crate) struct Reminder {
    _over: Sender<()>,
}

impl Reminder {
    /// The first mention comes only after a while.
    pub(crate) fn of(title: &'static str) -> Self {
        let (over, ended) = channel::<()>();
        let begin = Instant::now();
        thread::spawn(move || {
            while ended.recv_timeout(REMINDER) == Err(RecvTimeoutError::Timeout) {
                note(&format!("{title} … {} s", begin.elapsed().as_secs()));
            }
        });
        Self { _over: over }
    }
}

/// Runs a program with our own stdin, stdout and stderr.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    let status = command
        .status()
        .with_context(|| format!("starting `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// Runs a program and returns what it wrote on stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting `{line}`"))?;
    if !output.status.success() {
        bail!(
            "`{line}` failed: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a long step with its output in `log`, showing that it goes on; on failure shows the output's end.
pub(crate) fn step(title: &str, log: &Path, command: &mut Command) -> Result<()> {
    let line = command_line(command);
    let file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("starting `{line}`"))?;
    let terminal = stderr().is_terminal();
    let mut mentioned = Instant::now();
    if !terminal {
        note(title);
    }
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        sleep(TICK);
        if terminal {
            let last = last_line(log);
            let _ = write!(
                stderr(),
                "\r\x1b[Kxtask: {title} … {} s  {last}",
                begin.elapsed().as_secs()
            );
        } else if mentioned.elapsed() >= REMINDER {
            mentioned = Instant::now();
            note(&format!("{title} … {} s", begin.elapsed().as_secs()));
        }
    };
    if terminal {
        let _ = write!(stderr(), "\r\x1b[K");
    }
    if !status.success() {
        bail!(
            "{title}: `{line}` failed: {status}\n{}",
            tail(log, TAIL_LINES)
        );
    }
    note(&format!(
        "{title}: done in {:.1} s",
        begin.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// The last lines of a text file.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all.get(from..).unwrap_or_default().join("\n")
}

fn last_line(path: &Path) -> String {
    tail(path, 1).trim().chars().take(60).collect()
}
