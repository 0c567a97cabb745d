// SPDX-License-Identifier: Apache-2.0
//! Programs of the guest image that do what the agent does not: they are used where they are there.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::error::{AgentError, Context as _, Result};
use crate::reaper::{Claimed, Reaper, ended};

const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
/// How long one may run.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is kept of an output.
const MOST: u64 = 3 << 20;

/// The program `name`, where the image has it.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
}

/// Runs the program at `path` with `arguments` and `input`; the result is its output.
///
/// # Errors
///
/// A program that does not start, fails or does not end, with what it said.
pub(crate) async fn run(
    reaper: &Reaper,
    path: &Path,
    arguments: &[&str],
    input: &[u8],
) -> Result<Vec<u8>> {
    let launch = reaper.launch();
    let mut child = Command::new(path)
        .args(arguments)
        .env_clear()
        .env("PATH", FOLDERS.join(":"))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(|| format!("start {path:?}"))?;
    let claimed = launch.child(&child);
    let Claimed { pidfd, exit, .. } = claimed.context(|| format!("watch {path:?}"))?;
    drop(launch);
    let context = || format!("streams of {path:?}");
    let stdin = child.stdin.take().map(OwnedFd::from);
    let mut stdin = stdin
        .map(pipe::Sender::from_owned_fd)
        .transpose()
        .context(context)?;
    let receiver = |fd: Option<OwnedFd>| {
        fd.map(pipe::Receiver::from_owned_fd)
            .transpose()
            .context(context)
    };
    let stdout = receiver(child.stdout.take().map(OwnedFd::from))?;
    let stderr = receiver(child.stderr.take().map(OwnedFd::from))?;
    let read = |from: Option<pipe::Receiver>| async move {
        let mut data = Vec::new();
        if let Some(from) = from {
            let _ = from.take(MOST).read_to_end(&mut data).await;
        }
        data
    };
    let conversation = async {
        let write = async {
            if let Some(stdin) = &mut stdin {
                // One that does not want it all has its reasons, which it says.
                let _ = stdin.write_all(input).await;
            }
            stdin = None;
        };
        let ((), stdout, stderr) = tokio::join!(write, read(stdout), read(stderr));
        (ended(&exit).await, stdout, stderr)
    };
    let Ok((end, stdout, stderr)) = timeout(PATIENCE, conversation).await else {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        return Err(AgentError::internal(format!(
            "{path:?} did not end within {} s",
            PATIENCE.as_secs()
        )));
    };
    if end.code != 0 {
        return Err(AgentError::internal(format!(
            "{path:?} ended with {}: {}",
            end.code,
            String::from_utf8_lossy(&stderr).trim()
        )));
    }
    Ok(stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_s_words_come_back() {
        let reaper = Reaper::default();
        reaper.start().unwrap();
        let shell = find("sh").unwrap();
        let output = run(&reaper, &shell, &["-c", "tr a-z A-Z"], b"words").await;
        assert_eq!(output.unwrap(), b"WORDS");
        let failed = run(&reaper, &shell, &["-c", "echo why >&2; exit 3"], b"").await;
        let line = failed.unwrap_err().line();
        assert!(line.ends_with("ended with 3: why"), "{line}");
        assert!(find("no-such-program").is_none());
    }
}
