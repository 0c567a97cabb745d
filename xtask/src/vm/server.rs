// SPDX-License-Identifier: Apache-2.0
//! xtask inside the dev VM: first process, and server of the session.

use super::wire::{self, Exec, Exit, Frame, Kind, Setup, Size};
use super::{pty, setup, waiting};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const POLL: Duration = Duration::from_millis(10);
/// After a command's end, how long its output may be silent before it counts as complete: a process that
/// the command left behind may hold the pipe for ever.
const DRAIN: Duration = Duration::from_millis(500);

type Port = Arc<Mutex<File>>;

/// Process 1: runs the server, reaps every orphan, powers off when the server ends.
pub(crate) fn init() -> Result<()> {
    let server = Command::new(std::env::current_exe()?)
        .arg("vm-serve")
        .env("PATH", PATH)
        .env("HOME", "/root")
        .current_dir("/")
        .spawn()
        .context("starting the session's server")?;
    let server = Pid::from_child(&server);
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == server => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => bail!("waiting for children: {error}"),
        }
    }
    rustix::fs::sync();
    rustix::system::reboot(rustix::system::RebootCommand::PowerOff).context("powering off")
}

/// Serves commands until the host's end of the port closes.
pub(crate) fn serve() -> Result<()> {
    let path = port_device()?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let mut input = file.try_clone()?;
    let port: Port = Arc::new(Mutex::new(file));
    send(&port, Kind::Ready, &[])?;
    let heart = Arc::clone(&port);
    thread::spawn(move || {
        while send(&heart, Kind::Alive, &[]).is_ok() {
            sleep(wire::HEARTBEAT);
        }
    });
    let mut running: Option<Running> = None;
    while let Some(frame) = wire::read(&mut input)? {
        match frame.kind {
            Kind::Setup => {
                let done = setup::run(&frame.message::<Setup>()?);
                let words = done
                    .err()
                    .map(|error| format!("{error:#}"))
                    .unwrap_or_default();
                send(&port, Kind::SetupDone, words.as_bytes())?;
            }
            Kind::Exec => running = start(&port, &frame.message()?)?,
            Kind::Stdin | Kind::Resize => {
                if let Some(running) = &mut running {
                    running.feed(&frame);
                }
            }
            Kind::Overdue => {
                if let Some(running) = &running {
                    running.give_up(&port)?;
                }
            }
            other => bail!("unexpected {other:?} frame from the host"),
        }
    }
    Ok(())
}

/// A running command, and where it takes its input.
struct Running {
    group: Pid,
    input: Option<File>,
    terminal: bool,
}

impl Running {
    /// Says what every process waits for, then kills the command.
    fn give_up(&self, port: &Port) -> Result<()> {
        for part in waiting::report().as_bytes().chunks(wire::MAX_PAYLOAD) {
            send(port, Kind::Stderr, part)?;
        }
        // It may have ended meanwhile.
        let _ = kill_process_group(self.group, Signal::KILL);
        Ok(())
    }

    fn feed(&mut self, frame: &Frame) {
        if frame.kind == Kind::Resize {
            if let (true, Some(input), Ok(size)) =
                (self.terminal, &self.input, frame.message::<Size>())
            {
                pty::resize(input, size);
            }
        } else if frame.payload.is_empty() {
            if self.terminal {
                return;
            }
            self.input = None;
        } else if let Some(input) = &mut self.input
            && input.write_all(&frame.payload).is_err()
        {
            // The command does not read; like a shell's pipe, drop the rest.
            self.input = None;
        }
    }
}

/// Starts a command; its output and exit are sent by threads of their own.
fn start(port: &Port, exec: &Exec) -> Result<Option<Running>> {
    match exec.terminal {
        Some(size) => start_on_terminal(port, exec, size),
        None => start_on_pipes(port, exec),
    }
    .or_else(|error| {
        send(port, Kind::Stderr, format!("{error:#}\n").as_bytes())?;
        send(port, Kind::Exit, &serde_json::to_vec(&Exit { code: 127 })?)?;
        Ok(None)
    })
}

fn start_on_pipes(port: &Port, exec: &Exec) -> Result<Option<Running>> {
    let mut child = command(exec, None)?
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| exec.argv.join(" "))?;
    let group = Pid::from_child(&child);
    let activity = Arc::new(AtomicU64::new(0));
    let mut copies = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        copies.push(copy(port, Kind::Stdout, stdout, &activity));
    }
    if let Some(stderr) = child.stderr.take() {
        copies.push(copy(port, Kind::Stderr, stderr, &activity));
    }
    let input = child
        .stdin
        .take()
        .map(|stdin| File::from(OwnedFd::from(stdin)));
    finish(port, child, copies, activity);
    Ok(Some(Running {
        group,
        input,
        terminal: false,
    }))
}

fn start_on_terminal(port: &Port, exec: &Exec, size: Size) -> Result<Option<Running>> {
    let (master, slave) = pty::open(size)?;
    let child = command(exec, Some(()))?
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave)
        .spawn()
        .with_context(|| exec.argv.join(" "))?;
    // setsid made it the first of a group, too.
    let group = Pid::from_child(&child);
    let activity = Arc::new(AtomicU64::new(0));
    let copies = vec![copy(port, Kind::Stdout, master.try_clone()?, &activity)];
    finish(port, child, copies, activity);
    Ok(Some(Running {
        group,
        input: Some(master),
        terminal: true,
    }))
}

fn command(exec: &Exec, terminal: Option<()>) -> Result<Command> {
    let (program, arguments) = exec.argv.split_first().context("no command")?;
    let mut command = match terminal {
        // setsid makes the pty the session's controlling terminal.
        Some(()) => {
            let mut command = Command::new("setsid");
            command.arg("--ctty").arg(program);
            command
        }
        None => Command::new(program),
    };
    let cwd = if exec.cwd.is_dir() {
        exec.cwd.clone()
    } else {
        PathBuf::from("/")
    };
    command
        .args(arguments)
        .current_dir(cwd)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("USER", "root")
        .envs(exec.env.iter().map(|(name, value)| (name, value)));
    Ok(command)
}

/// Copies output to the port until its end.
fn copy(
    port: &Port,
    kind: Kind,
    mut from: impl Read + Send + 'static,
    activity: &Arc<AtomicU64>,
) -> JoinHandle<()> {
    let (port, activity) = (Arc::clone(port), Arc::clone(activity));
    thread::spawn(move || {
        let mut buffer = vec![0; wire::MAX_PAYLOAD];
        // A pty reports the end of its last process as an error.
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            activity.fetch_add(1, Ordering::Relaxed);
            if send(&port, kind, buffer.get(..count).unwrap_or_default()).is_err() {
                return;
            }
            activity.fetch_add(1, Ordering::Relaxed);
        }
    })
}

/// Waits for the command, then for the rest of its output, then reports its exit.
fn finish(port: &Port, mut child: Child, copies: Vec<JoinHandle<()>>, activity: Arc<AtomicU64>) {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let code = child.wait().map_or(255, exit_code);
        let mut seen = activity.load(Ordering::Relaxed);
        let mut quiet_since = Instant::now();
        while !copies.iter().all(JoinHandle::is_finished) && quiet_since.elapsed() < DRAIN {
            sleep(POLL);
            let now = activity.load(Ordering::Relaxed);
            // An odd count: a copy is on its way to the port.
            if now != seen || now % 2 == 1 {
                (seen, quiet_since) = (now, Instant::now());
            }
        }
        if let Ok(message) = serde_json::to_vec(&Exit { code }) {
            let _ = send(&port, Kind::Exit, &message);
        }
    });
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| signal.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
}

fn send(port: &Port, kind: Kind, payload: &[u8]) -> Result<()> {
    wire::write(
        &mut *port.lock().unwrap_or_else(PoisonError::into_inner),
        kind,
        payload,
    )
}

/// The character device of our virtio-serial port.
fn port_device() -> Result<PathBuf> {
    let begin = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == wire::PORT {
                return Ok(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        if begin.elapsed() > Duration::from_secs(10) {
            bail!("no virtio-serial port named {}", wire::PORT);
        }
        sleep(POLL);
    }
}
