// SPDX-License-Identifier: Apache-2.0
//! The debug console: a shell of the guest for whoever connects to its port. It is off unless the
//! command line turns it on.

use std::env;
use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use tokio::io::AsyncWriteExt as _;

use crate::container::Stdio;
use crate::engine::Streams;
use crate::error::{AgentError, Context as _, Result};
use crate::passfd::Connected;
use crate::ports::{Door, Stream};
use crate::reaper::{Exit, Reaper};

/// The argument that makes this binary a console's shell.
pub(crate) const SHELL_ROLE: &str = "shell";
/// Kata's choice of shells, the better first.
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

/// Serves shells at `door` from now on.
pub(crate) fn start(door: Door, reaper: Reaper) {
    tokio::spawn(async move {
        loop {
            let (stream, _) = door.next().await;
            tokio::spawn(serve(stream, reaper.clone()));
        }
    });
}

async fn serve(mut stream: Box<dyn Stream>, reaper: Reaper) {
    match shell(&reaper) {
        Ok((stdio, exit)) => {
            let connected = Connected::both(stream);
            connected.carry(Arc::new(stdio), exit, true).await;
        }
        Err(error) => {
            let line = format!("debug console: {}\r\n", error.line());
            let _ = stream.write_all(line.as_bytes()).await;
        }
    }
}

/// Starts a shell with a terminal of the guest's own.
fn shell(reaper: &Reaper) -> Result<(Stdio, Exit)> {
    if !SHELLS.iter().any(|path| Path::new(path).exists()) {
        return Err(AgentError::unsupported(format!(
            "the guest image has no shell ({})",
            SHELLS.join(", ")
        )));
    }
    let context = || "open a terminal";
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).context(context)?;
    unlockpt(&master).context(context)?;
    let slave = ioctl_tiocgptpeer(&master, flags).context(context)?;
    let copy = |slave: &OwnedFd| slave.try_clone().context(context);
    let (output, errors) = (copy(&slave)?, copy(&slave)?);
    let launch = reaper.launch();
    // No code of ours runs between fork and exec; the session is made by the role.
    let child = Command::new("/proc/self/exe")
        .arg0("kata-agent")
        .arg(SHELL_ROLE)
        .env_clear()
        .current_dir("/")
        .stdin(slave)
        .stdout(output)
        .stderr(errors)
        .spawn()
        .context(|| "start a shell")?;
    let claimed = launch.child(&child).context(|| "watch the shell")?;
    fcntl_setfl(&master, OFlags::NONBLOCK | OFlags::RDWR).context(context)?;
    Ok((Stdio::new(Streams::Terminal(master))?, claimed.exit))
}

/// The role: takes its standard input for the terminal of a session of its own, and becomes a
/// shell.
pub(crate) fn shell_main() -> ExitCode {
    let say = |what: &dyn Display| {
        let _ = rustix::io::write(rustix::stdio::stderr(), format!("{what}\r\n").as_bytes());
    };
    let session = setsid().and_then(|_| ioctl_tiocsctty(rustix::stdio::stdin()));
    if let Err(error) = session {
        say(&format!("no session: {error}"));
    }
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for shell in SHELLS {
        last = Command::new(shell)
            .arg("-i")
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("TERM", env::var("TERM").as_deref().unwrap_or("linux"))
            .env("HOME", "/")
            .exec();
    }
    say(&format!("no shell: {last}"));
    ExitCode::FAILURE
}
