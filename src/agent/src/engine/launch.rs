// SPDX-License-Identifier: Apache-2.0
//! The agent's side of a launch.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::channel;
use super::helper::ROLE;
use super::hooks::{self, Hooks};
use super::plan::{ContainerPlan, Go, Job, ProcessPlan, Report};
use crate::error::{AgentError, Context as _, Result};
use crate::reaper::{Exit, Launch, Reaper};

/// Starts processes.
#[derive(Clone, Debug)]
pub(crate) struct Launcher {
    reaper: Reaper,
    /// How long a process may take until it is ready to execute.
    patience: Duration,
}

/// A process that is ready to execute, or does.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) exit: Exit,
    pub(crate) streams: Streams,
    pub(crate) gate: Gate,
}

/// The agent's ends of a process's standard streams, non-blocking.
#[derive(Debug)]
pub(crate) enum Streams {
    Pipes {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// The master side.
    Terminal(OwnedFd),
}

/// Holds a process back from executing its program. Dropping it ends the process.
#[derive(Debug)]
pub(crate) struct Gate {
    stream: UnixStream,
    patience: Duration,
}

/// Descriptors that go to the helper besides the streams.
#[derive(Debug)]
struct Along<'a> {
    cgroup: BorrowedFd<'a>,
    init: Option<BorrowedFd<'a>>,
    namespaces: &'a [OwnedFd],
}

impl Launcher {
    pub(crate) fn new(reaper: Reaper, patience: Duration) -> Self {
        Self { reaper, patience }
    }

    /// Makes a container in `cgroup`. `namespaces` are those of the plan to join, in its order.
    ///
    /// # Errors
    ///
    /// The first step that failed, whichever process it happened in. Processes that exist by then
    /// are left to the owner of the cgroup.
    pub(crate) async fn create(
        &self,
        plan: ContainerPlan,
        cgroup: BorrowedFd<'_>,
        namespaces: &[OwnedFd],
    ) -> Result<Launched> {
        let along = Along {
            cgroup,
            init: None,
            namespaces,
        };
        self.launch(Job::Create(Box::new(plan)), along).await
    }

    /// Starts one more process in the container whose first process is `init`.
    ///
    /// # Errors
    ///
    /// The first step that failed, up to the execution of the program.
    pub(crate) async fn exec(
        &self,
        plan: ProcessPlan,
        cgroup: BorrowedFd<'_>,
        init: BorrowedFd<'_>,
    ) -> Result<Launched> {
        let along = Along {
            cgroup,
            init: Some(init),
            namespaces: &[],
        };
        self.launch(Job::Exec(Box::new(plan)), along).await
    }

    /// Makes a pid namespace whose first process, in `cgroup`, reaps what is left to it. The result
    /// is that process's number.
    ///
    /// # Errors
    ///
    /// The first step that failed.
    pub(crate) async fn pid_namespace(&self, cgroup: BorrowedFd<'_>) -> Result<i32> {
        let along = Along {
            cgroup,
            init: None,
            namespaces: &[],
        };
        let job = Job::PidNamespace;
        let (_, process) = self.converse(&job, None, along, self.patience).await?;
        Ok(process.pid)
    }

    /// Runs the hooks of a container whose program has started; `pid` is its first process.
    ///
    /// # Errors
    ///
    /// The first that fails.
    pub(crate) async fn started(&self, hooks: &Hooks, pid: i32) -> Result<()> {
        let Hooks {
            poststart, state, ..
        } = hooks;
        hooks::run_in_agent(&self.reaper, poststart, state, "running", pid).await
    }

    /// Runs the hooks of a container that is gone.
    pub(crate) async fn stopped(&self, hooks: &Hooks) {
        hooks::run_all_in_agent(&self.reaper, &hooks.poststop, &hooks.state).await;
    }

    async fn launch(&self, job: Job, along: Along<'_>) -> Result<Launched> {
        let (pipes, theirs) = if job.has_pipes() {
            let (ours, theirs) = pipes()?;
            (Some(ours), Some(theirs))
        } else {
            (None, None)
        };
        let hooks = match &job {
            Job::Create(plan) => Some(&plan.hooks),
            Job::Exec(_) | Job::PidNamespace => None,
        };
        let to_create = hooks.map_or(Duration::ZERO, Hooks::patience_to_create);
        let to_start = hooks.map_or(Duration::ZERO, Hooks::patience_to_start);
        let patience = self.patience.saturating_add(to_create);
        let (stream, process) = self.converse(&job, theirs, along, patience).await?;
        let streams = match (pipes, process.master) {
            (Some(pipes), _) => pipes,
            (None, Some(master)) => {
                fcntl_setfl(&master, OFlags::NONBLOCK | OFlags::RDWR)
                    .context(|| "terminal without waiting")?;
                Streams::Terminal(master)
            }
            (None, None) => return Err(AgentError::internal("the process sent no terminal")),
        };
        Ok(Launched {
            pid: process.pid,
            pidfd: process.pidfd,
            exit: process.exit,
            streams,
            gate: Gate {
                stream,
                patience: self.patience.saturating_add(to_start),
            },
        })
    }

    /// Has a helper do the job, until the process is ready. `pipes` are closed here then.
    async fn converse(
        &self,
        job: &Job,
        pipes: Option<[OwnedFd; 3]>,
        along: Along<'_>,
        patience: Duration,
    ) -> Result<(UnixStream, Spawned)> {
        let (ours, theirs) = UnixStream::pair().context(|| "socket to the helper")?;
        // Statuses are kept from before the first process exists.
        let launch = self.reaper.launch();
        let helper = Helper::spawn(theirs)?;
        let conversation = converse(&ours, job, pipes, along, &launch, &self.reaper);
        match timeout(patience, conversation).await {
            Ok(spawned) => Ok((ours, spawned?)),
            Err(_) => {
                helper.kill();
                Err(AgentError::internal(format!(
                    "the process was not ready within {} s",
                    patience.as_secs()
                )))
            }
        }
    }
}

/// A process that is ready.
#[derive(Debug)]
struct Spawned {
    pid: i32,
    pidfd: OwnedFd,
    exit: Exit,
    /// Of its terminal.
    master: Option<OwnedFd>,
}

/// Sends the job and follows the reports until the process is ready.
async fn converse(
    stream: &UnixStream,
    job: &Job,
    pipes: Option<[OwnedFd; 3]>,
    along: Along<'_>,
    launch: &Launch,
    reaper: &Reaper,
) -> Result<Spawned> {
    let mut descriptors = vec![along.cgroup];
    descriptors.extend(along.init);
    descriptors.extend(pipes.iter().flatten().map(AsFd::as_fd));
    descriptors.extend(along.namespaces.iter().map(AsFd::as_fd));
    channel::send(stream, job, &descriptors)
        .await
        .context(|| "send the job to the helper")?;

    // Two processes report, so either may come first.
    let mut process = None;
    let mut ready = None;
    let mut mounted = false;
    loop {
        let (report, descriptors) = next(stream).await?;
        let mut descriptors = descriptors.into_iter();
        match report {
            Report::Spawned(pid) => {
                let pidfd = descriptors
                    .next()
                    .ok_or_else(|| AgentError::internal("the helper sent no pidfd"))?;
                let exit = launch.claim(pid, &pidfd);
                process = Some((pid, pidfd, exit));
            }
            Report::Mounted => mounted = true,
            Report::Ready => ready = Some(descriptors.next()),
            Report::Failed(failure) => return Err(failure.into()),
        }
        if let (Job::Create(plan), Some((pid, ..)), true) = (job, &process, mounted) {
            mounted = false;
            let Hooks {
                create_runtime,
                state,
                ..
            } = &plan.hooks;
            hooks::run_in_agent(reaper, create_runtime, state, "creating", *pid).await?;
            channel::send(stream, &Go, &[])
                .await
                .context(|| "tell the process to go on")?;
        }
        if process.is_some() && ready.is_some() {
            break;
        }
    }
    let (Some((pid, pidfd, exit)), Some(master)) = (process, ready) else {
        return Err(AgentError::internal("the helper did not report"));
    };
    Ok(Spawned {
        pid,
        pidfd,
        exit,
        master,
    })
}

async fn next(stream: &UnixStream) -> Result<(Report, Vec<OwnedFd>)> {
    channel::receive(stream)
        .await
        .context(|| "receive a report")?
        .ok_or_else(|| AgentError::internal("the process ended before it was ready"))
}

impl Gate {
    /// Lets the process execute its program.
    ///
    /// # Errors
    ///
    /// `exec: ...` when the program can't be executed after all.
    pub(crate) async fn open(self) -> Result<()> {
        channel::send(&self.stream, &Go, &[])
            .await
            .map_err(|_| AgentError::precondition("the process ended before it was started"))?;
        self.executed().await
    }

    /// Waits until the process has executed its program: that closes its end of the socket.
    ///
    /// # Errors
    ///
    /// `exec: ...` when the program can't be executed after all.
    pub(crate) async fn executed(self) -> Result<()> {
        let report = timeout(self.patience, channel::receive::<Report>(&self.stream)).await;
        match report {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some((Report::Failed(failure), _)))) => Err(failure.into()),
            Ok(Ok(Some(_))) => Err(AgentError::internal("the process reported twice")),
            Ok(Err(error)) => Err(AgentError::io("start the process", error)),
            Err(_) => Err(AgentError::internal(
                "the process did not execute its program",
            )),
        }
    }
}

/// The helper process. The reaper waits for it as for any orphan.
#[derive(Debug)]
struct Helper(Option<OwnedFd>);

impl Helper {
    fn spawn(socket: UnixStream) -> Result<Self> {
        let socket = socket
            .into_std()
            .and_then(|socket| socket.set_nonblocking(false).map(|()| socket))
            .context(|| "socket to the helper")?;
        // No pre_exec, no user, no folder: the standard library then uses posix_spawn, and no
        // code of ours runs between fork and execve.
        let child = Command::new("/proc/self/exe")
            .arg0("kata-agent")
            .arg(ROLE)
            .env_clear()
            .stdin(OwnedFd::from(socket))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(|| "start the helper")?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        Ok(Self(pidfd.ok()))
    }

    fn kill(&self) {
        if let Some(pidfd) = &self.0 {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// Three pipes: the agent's ends, and those of the process.
fn pipes() -> Result<(Streams, [OwnedFd; 3])> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe");
    let (stdin_read, stdin) = pipe()?;
    let (stdout, stdout_write) = pipe()?;
    let (stderr, stderr_write) = pipe()?;
    for ours in [&stdin, &stdout, &stderr] {
        fcntl_setfl(ours, OFlags::NONBLOCK).context(|| "pipe without waiting")?;
    }
    let ours = Streams::Pipes {
        stdin,
        stdout,
        stderr,
    };
    Ok((ours, [stdin_read, stdout_write, stderr_write]))
}
