// SPDX-License-Identifier: Apache-2.0
//! Hooks of the OCI runtime specification ("POSIX-platform Hooks"): programs that run at points of a
//! container's life, on the host for the shim and in the guest for the agent. Each gets the
//! container's state on its standard input. Which run where, and what a failure means, is for the
//! caller to say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};

/// How long a hook may take that doesn't say.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// How many bytes of a failed hook's last words are told.
const WORDS: u64 = 1024;

/// What hooks are told about a container ("State"), but for what changes.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct State {
    /// The version of the specification, `ociVersion`.
    pub version: String,
    /// The container's.
    pub id: String,
    /// Where its bundle is.
    pub bundle: PathBuf,
    /// The specification's.
    pub annotations: BTreeMap<String, String>,
}

impl State {
    /// As JSON. `pid` is the container's process, 0 where there is none.
    #[must_use]
    pub fn json(&self, status: &str, pid: u32) -> Vec<u8> {
        let mut state = serde_json::json!({
            "ociVersion": self.version,
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if pid != 0
            && let Some(state) = state.as_object_mut()
        {
            state.insert("pid".to_owned(), pid.into());
        }
        state.to_string().into_bytes()
    }
}

/// What a hook writes to its standard error. A file, not a pipe: nothing waits for a hook that leaves
/// a process behind.
#[derive(Debug)]
pub struct Words(File);

impl Words {
    /// None yet.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> io::Result<Self> {
        file(&[]).map(Self)
    }

    /// The last of them, for the end of a one-line message: `: WORDS`, or nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn last(mut self) -> io::Result<String> {
        let length = self.0.metadata()?.len();
        self.0.seek(SeekFrom::Start(length.saturating_sub(WORDS)))?;
        let mut text = Vec::new();
        self.0.take(WORDS).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        Ok(if line.is_empty() {
            line
        } else {
            format!(": {line}")
        })
    }
}

/// The command for the program at `path`. The first of `arguments` is its name, as with execve(2).
///
/// # Errors
/// The kernel's, for the files that stand for its streams.
pub fn command<'a>(
    path: impl AsRef<std::ffi::OsStr>,
    arguments: &[String],
    environment: impl IntoIterator<Item = (&'a str, &'a str)>,
    state: &[u8],
    words: &Words,
) -> io::Result<Command> {
    let mut command = Command::new(path);
    if let Some((name, arguments)) = arguments.split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(environment)
        // A file here, too: nothing blocks on a hook that doesn't read.
        .stdin(file(state)?)
        .stdout(Stdio::null())
        .stderr(words.0.try_clone()?)
        .process_group(0);
    Ok(command)
}

/// Waits for the end; `None` for a program that had to be killed after `limit`, with all that it has
/// started in its process group.
///
/// # Errors
/// The kernel's.
pub fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(&child);
    let handle = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut events = [PollFd::new(&handle, PollFlags::IN)];
    if rustix::io::retry_on_intr(|| poll(&mut events, Some(&limit)))? == 0 {
        kill_process_group(pid, Signal::KILL)?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

/// A file in memory, at its beginning.
fn file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_words_are_told_by_their_end() {
        let words = Words::new().unwrap();
        let script = "seq 1000 >&2; exit 3";
        let arguments = ["sh", "-c", script].map(str::to_owned);
        let command = command(
            "/bin/sh",
            &arguments,
            [("PATH", "/usr/bin:/bin")],
            b"",
            &words,
        );
        let child = command.unwrap().spawn().unwrap();
        let status = wait(child, TIMEOUT).unwrap().unwrap();
        assert_eq!(status.code(), Some(3));
        let last = words.last().unwrap();
        assert!(last.len() < 1100 && last.ends_with("999 1000"), "{last}");
        assert_eq!(Words::new().unwrap().last().unwrap(), "");
    }

    #[test]
    fn the_state_names_the_process_while_there_is_one() {
        let state = State {
            id: "c\"1".to_owned(),
            ..State::default()
        };
        let json = |pid| -> serde_json::Value {
            serde_json::from_slice(&state.json("creating", pid)).unwrap()
        };
        assert_eq!(
            (&json(7)["pid"], &json(7)["id"]),
            (&7.into(), &"c\"1".into())
        );
        assert!(json(0).get("pid").is_none());
    }
}
