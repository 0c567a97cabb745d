// SPDX-License-Identifier: Apache-2.0
//! A process's standard streams, as the runtime reads and writes them by calls.
//!
//! Output ends when its last writer is gone. A child that outlives the process may hold the pipe
//! open for ever, so after the process's exit only a bounded time is waited; what is in the pipe
//! by then is still delivered, whole.
//!
//! A terminal that no process has open is hung up, but only for as long as that lasts: a process
//! may close its streams and write to `/dev/console` later. So its slave side is kept open here
//! until the process's exit, and the hang-up is seen when it means the end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::{Errno, ioctl_fionread};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::select;
use tokio::sync::{Mutex, Notify};
use tokio::task::yield_now;
use tokio::time::{sleep_until, timeout};

use crate::engine::Streams;
use crate::error::{AgentError, Context as _, Kind, Result};
use crate::reaper::{Exit, ended};
use crate::sys::watch::watch;

/// How long output is waited for after the exit.
const DRAIN: Duration = Duration::from_millis(500);
/// The most that one read returns: what a pipe holds.
const LONGEST_READ: usize = 64 << 10;
/// More than a terminal's buffers hold on the way to the one whose length the kernel tells.
const ON_THE_WAY: usize = 16 << 10;

/// Which output.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Output {
    Stdout,
    Stderr,
}

/// The streams of one process.
#[derive(Debug)]
pub(crate) struct Stdio {
    stdin: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    stdout: Reader,
    /// A terminal has no second output.
    stderr: Option<Reader>,
    /// The master side.
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    reads: AtomicU64,
}

#[derive(Debug)]
struct Reader {
    fd: Arc<AsyncFd<OwnedFd>>,
    /// How much it may hold beyond the length that the kernel tells.
    on_the_way: usize,
    state: Mutex<State>,
    end: Notify,
}

#[derive(Debug, Default)]
struct State {
    ended: bool,
    /// Once the drain time is over: how much may still be in the pipe or the terminal.
    left: Option<usize>,
    /// Of a terminal, until the process has ended. Nobody reads from it.
    slave: Option<OwnedFd>,
}

impl Stdio {
    /// Takes over the agent's ends of the streams.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn new(streams: Streams) -> Result<Self> {
        let watched = |fd, interest| {
            watch(fd, interest)
                .map(Arc::new)
                .context(|| "watch a standard stream")
        };
        let stdio = match streams {
            Streams::Pipes {
                stdin,
                stdout,
                stderr,
            } => Self {
                stdin: Mutex::new(Some(watched(stdin, Interest::WRITABLE)?)),
                stdout: Reader::new(watched(stdout, Interest::READABLE)?, None),
                stderr: Some(Reader::new(watched(stderr, Interest::READABLE)?, None)),
                terminal: None,
                reads: AtomicU64::new(0),
            },
            Streams::Terminal(master) => {
                // Before the master is watched: a hang-up once noticed is never taken back.
                let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
                let slave = ioctl_tiocgptpeer(&master, flags)
                    .context(|| "keep the terminal's other side open")?;
                let master = watched(master, Interest::READABLE | Interest::WRITABLE)?;
                Self {
                    stdin: Mutex::new(Some(Arc::clone(&master))),
                    stdout: Reader::new(Arc::clone(&master), Some(slave)),
                    stderr: None,
                    terminal: Some(master),
                    reads: AtomicU64::new(0),
                }
            }
        };
        Ok(stdio)
    }

    /// Reads at most `length` bytes; nothing at the end of the stream.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) async fn read(&self, output: Output, length: u32, exit: &Exit) -> Result<Vec<u8>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let reader = match (output, &self.stderr) {
            (Output::Stdout, _) => &self.stdout,
            (Output::Stderr, Some(stderr)) => stderr,
            (Output::Stderr, None) => return Ok(Vec::new()),
        };
        let length = usize::try_from(length).unwrap_or(LONGEST_READ);
        reader.read(length.clamp(1, LONGEST_READ), exit).await
    }

    /// Writes all of `data` to standard input, waiting for the process to take it.
    ///
    /// # Errors
    ///
    /// When standard input is closed, by either side, or the process ends.
    pub(crate) async fn write(&self, data: &[u8], exit: &Exit) -> Result<()> {
        let stdin = self.stdin.lock().await;
        let stdin = stdin.as_ref().ok_or_else(closed)?;
        let mut rest = data;
        while !rest.is_empty() {
            let mut ready = select! {
                ready = stdin.writable() => ready.context(|| "wait for standard input")?,
                _ = ended(exit) => return Err(closed()),
            };
            let written =
                ready.try_io(|fd| rustix::io::write(fd.get_ref(), rest).map_err(Into::into));
            match written {
                Ok(Ok(length)) => rest = rest.get(length..).unwrap_or_default(),
                Ok(Err(error)) if is(&error, Errno::PIPE) || is(&error, Errno::IO) => {
                    return Err(closed());
                }
                Ok(Err(error)) if is(&error, Errno::INTR) => {}
                Ok(Err(error)) => return Err(AgentError::io("write to standard input", error)),
                // With a hang-up on record the descriptor always counts as ready.
                Err(_would_block) => yield_now().await,
            }
        }
        Ok(())
    }

    /// Closes standard input. That of a terminal stays: the two directions are one descriptor.
    pub(crate) async fn close_stdin(&self) {
        if self.terminal.is_none() {
            drop(self.stdin.lock().await.take());
        }
    }

    /// The master side of the terminal.
    ///
    /// # Errors
    ///
    /// UNAVAILABLE without a terminal.
    pub(crate) fn terminal(&self) -> Result<&OwnedFd> {
        match &self.terminal {
            Some(master) => Ok(master.get_ref()),
            None => Err(AgentError::new(
                Kind::Unavailable,
                "the process has no terminal",
            )),
        }
    }

    /// Waits until both outputs were read to their ends, or nobody has read for `patience`.
    pub(crate) async fn drained(&self, patience: Duration) {
        let both = async {
            self.stdout.ended().await;
            if let Some(stderr) = &self.stderr {
                stderr.ended().await;
            }
        };
        let mut both = Box::pin(both);
        loop {
            let before = self.reads.load(Ordering::Relaxed);
            let done = timeout(patience, &mut both).await.is_ok();
            if done || self.reads.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }
}

impl Reader {
    fn new(fd: Arc<AsyncFd<OwnedFd>>, slave: Option<OwnedFd>) -> Self {
        Self {
            fd,
            on_the_way: if slave.is_some() { ON_THE_WAY } else { 0 },
            state: Mutex::new(State {
                slave,
                ..State::default()
            }),
            end: Notify::new(),
        }
    }

    async fn read(&self, length: usize, exit: &Exit) -> Result<Vec<u8>> {
        // Held across the wait: reads are answered in the order in which they came.
        let mut state = self.state.lock().await;
        let data = self.read_locked(&mut state, length, exit).await?;
        if data.is_empty() {
            state.ended = true;
            self.end.notify_waiters();
        }
        Ok(data)
    }

    async fn read_locked(&self, state: &mut State, length: usize, exit: &Exit) -> Result<Vec<u8>> {
        while !state.ended {
            if let Some(left) = state.left {
                let data = self.take(length.min(left))?.unwrap_or_default();
                state.left = Some(left.saturating_sub(data.len()));
                return Ok(data);
            }
            select! {
                ready = self.fd.readable() => {
                    let mut ready = ready.context(|| "wait for output")?;
                    match self.take(length)? {
                        Some(data) => return Ok(data),
                        None => {
                            ready.clear_ready();
                            // With a hang-up on record this does not clear it.
                            yield_now().await;
                        }
                    }
                }
                _ = ended(exit), if state.slave.is_some() => state.slave = None,
                () = drain_time_over(exit), if state.slave.is_none() => {
                    let left = ioctl_fionread(self.fd.get_ref()).unwrap_or(0);
                    let left = usize::try_from(left).unwrap_or(usize::MAX);
                    state.left = Some(left.saturating_add(self.on_the_way));
                }
            }
        }
        Ok(Vec::new())
    }

    /// What is there: `None` when there is nothing yet, nothing at all at the end.
    fn take(&self, length: usize) -> Result<Option<Vec<u8>>> {
        let mut data = vec![0; length];
        loop {
            match rustix::io::read(self.fd.get_ref(), data.as_mut_slice()) {
                Ok(read) => {
                    data.truncate(read);
                    return Ok(Some(data));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // The process has ended, and the last one has closed the terminal.
                Err(Errno::IO) => return Ok(Some(Vec::new())),
                Err(error) => return Err(AgentError::io("read output", error)),
            }
        }
    }

    async fn ended(&self) {
        loop {
            let mut end = Box::pin(self.end.notified());
            end.as_mut().enable();
            // A read under way holds the lock, and tells of the end.
            if self.state.try_lock().is_ok_and(|state| state.ended) {
                return;
            }
            end.await;
        }
    }
}

async fn drain_time_over(exit: &Exit) {
    let end = ended(exit).await;
    sleep_until(end.at.checked_add(DRAIN).unwrap_or(end.at)).await;
}

fn closed() -> AgentError {
    AgentError::precondition("standard input is closed")
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use rustix::fs::{OFlags, fcntl_setfl};
    use rustix::pipe::{PipeFlags, pipe_with};
    use rustix::pty::{openpt, unlockpt};
    use tokio::sync::watch;
    use tokio::time::Instant;

    use super::*;
    use crate::reaper::End;

    struct Rig {
        stdio: Stdio,
        stdin: std::fs::File,
        stdout: std::fs::File,
        exit: Exit,
        end: watch::Sender<Option<End>>,
    }

    fn rig() -> Rig {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (stdin_read, stdin) = pipe();
        let (stdout, stdout_write) = pipe();
        let (stderr, _) = pipe();
        for fd in [&stdin, &stdout, &stderr] {
            fcntl_setfl(fd, OFlags::NONBLOCK).unwrap();
        }
        let (end, exit) = watch::channel(None);
        Rig {
            stdio: Stdio::new(Streams::Pipes {
                stdin,
                stdout,
                stderr,
            })
            .unwrap(),
            stdin: stdin_read.into(),
            stdout: stdout_write.into(),
            exit,
            end,
        }
    }

    /// A terminal, and the side of it that the process has.
    struct TerminalRig {
        stdio: Stdio,
        slave: OwnedFd,
        exit: Exit,
        end: watch::Sender<Option<End>>,
    }

    impl TerminalRig {
        fn new() -> Self {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let master = openpt(flags).unwrap();
            unlockpt(&master).unwrap();
            fcntl_setfl(&master, OFlags::NONBLOCK | OFlags::RDWR).unwrap();
            // A process may have closed its side before the agent knows of the terminal.
            drop(slave_of(&master));
            let stdio = Stdio::new(Streams::Terminal(master)).unwrap();
            let slave = slave_of(stdio.terminal().unwrap());
            let (end, exit) = watch::channel(None);
            Self {
                stdio,
                slave,
                exit,
                end,
            }
        }

        async fn read(&self) -> Vec<u8> {
            let read = self.stdio.read(Output::Stdout, 100, &self.exit);
            timeout(DRAIN.saturating_mul(10), read)
                .await
                .unwrap()
                .unwrap()
        }
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn slave_of(master: &OwnedFd) -> OwnedFd {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        ioctl_tiocgptpeer(master, flags).unwrap()
    }

    fn exited(end: &watch::Sender<Option<End>>) {
        end.send_replace(Some(End {
            code: 0,
            at: Instant::now(),
        }));
    }

    #[tokio::test]
    async fn a_child_that_keeps_the_pipe_open_holds_nobody_up() {
        let mut rig = rig();
        rig.stdout.write_all(b"last words").unwrap();
        exited(&rig.end);
        let read = |length| rig.stdio.read(Output::Stdout, length, &rig.exit);
        assert_eq!(read(5).await.unwrap(), b"last ");
        assert_eq!(read(100).await.unwrap(), b"words");
        let start = Instant::now();
        assert_eq!(read(100).await.unwrap(), b"");
        assert!(start.elapsed() < DRAIN * 2);
    }

    #[tokio::test]
    async fn a_child_that_goes_on_writing_holds_nobody_up() {
        let mut rig = rig();
        exited(&rig.end);
        tokio::time::sleep(DRAIN).await;
        rig.stdout.write_all(b"kept").unwrap();
        // Enough to notice that the time is over; the writer never stops.
        let mut total = Vec::new();
        loop {
            let data = rig.stdio.read(Output::Stdout, 2, &rig.exit).await.unwrap();
            if data.is_empty() {
                break;
            }
            total.extend(data);
            rig.stdout.write_all(b"more").unwrap();
            assert!(total.len() < 10_000);
        }
        assert!(total.starts_with(b"kept"));
    }

    #[tokio::test]
    async fn output_ends_with_its_last_writer() {
        let rig = rig();
        drop(rig.stdout);
        let data = rig.stdio.read(Output::Stdout, 9, &rig.exit).await.unwrap();
        assert!(data.is_empty());
    }

    #[tokio::test]
    async fn a_write_that_nobody_takes_ends_with_the_process() {
        let rig = rig();
        let data = vec![0; 1 << 20];
        let write = rig.stdio.write(&data, &rig.exit);
        let end = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            exited(&rig.end);
        };
        let (written, ()) = tokio::join!(write, end);
        assert_eq!(written.unwrap_err().kind(), Kind::FailedPrecondition);
        drop(rig.stdin);
    }

    #[tokio::test]
    async fn both_ends_drained_are_noticed() {
        let rig = rig();
        drop(rig.stdout);
        for output in [Output::Stdout, Output::Stderr] {
            rig.stdio.read(output, 1, &rig.exit).await.unwrap();
        }
        timeout(
            Duration::from_secs(1),
            rig.stdio.drained(Duration::from_secs(60)),
        )
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn a_terminal_that_nobody_has_open_is_not_at_its_end() {
        let mut rig = TerminalRig::new();
        let closed = std::mem::replace(&mut rig.slave, null());
        rustix::io::write(&closed, b"first").unwrap();
        drop(closed);
        assert_eq!(rig.read().await, b"first");
        timeout(DRAIN, rig.read()).await.unwrap_err();
        rig.stdio.write(b"typed\n", &rig.exit).await.unwrap();
        let mut echo = Vec::new();
        while !echo.ends_with(b"\n") {
            echo.extend(rig.read().await);
        }
        assert_eq!(echo, b"typed\r\n");
        rig.slave = slave_of(rig.stdio.terminal().unwrap());
        rustix::io::write(&rig.slave, b"again").unwrap();
        assert_eq!(rig.read().await, b"again");
    }

    #[tokio::test]
    async fn a_terminal_ends_with_its_process() {
        let mut rig = TerminalRig::new();
        rustix::io::write(&rig.slave, b"last words").unwrap();
        rig.slave = null();
        let end = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let start = Instant::now();
            exited(&rig.end);
            start
        };
        let (data, start) = tokio::join!(
            async {
                assert_eq!(rig.read().await, b"last words");
                rig.read().await
            },
            end
        );
        assert_eq!(data, b"");
        assert!(start.elapsed() < DRAIN);
    }

    #[tokio::test]
    async fn a_child_that_keeps_the_terminal_open_holds_nobody_up() {
        let rig = TerminalRig::new();
        exited(&rig.end);
        let start = Instant::now();
        assert_eq!(rig.read().await, b"");
        assert!(start.elapsed() < DRAIN * 2);
    }

    #[tokio::test]
    async fn what_a_terminal_holds_is_delivered_however_late() {
        let mut rig = TerminalRig::new();
        // More than is in the buffer whose length the kernel tells.
        let data = vec![b'x'; 8000];
        assert_eq!(rustix::io::write(&rig.slave, &data), Ok(data.len()));
        rig.slave = null();
        exited(&rig.end);
        tokio::time::sleep(DRAIN).await;
        let mut read = Vec::new();
        loop {
            let piece = rig.read().await;
            if piece.is_empty() {
                break;
            }
            read.extend(piece);
        }
        assert_eq!(read.len(), data.len());
    }

    #[tokio::test]
    async fn a_hang_up_on_record_does_not_stop_the_event_loop() {
        let mut rig = TerminalRig::new();
        rig.stdio.stdout.state.lock().await.slave = None;
        rig.slave = null();
        let hung_up = rig.stdio.stdout.fd.readable().await.unwrap();
        drop(hung_up);
        rig.slave = slave_of(rig.stdio.terminal().unwrap());
        let write = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            rustix::io::write(&rig.slave, b"here").unwrap();
        };
        let (data, ()) = tokio::join!(rig.read(), write);
        assert_eq!(data, b"here");
    }
}
