// SPDX-License-Identifier: Apache-2.0
//! The actor against an agent that does what a test tells it to: states, codes and events.

use std::fs::File;
use std::io::Read as _;
use std::mem;
use std::net::Shutdown;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream;
use protobuf::well_known_types::empty::Empty;
use protocols::agent::agent::{
    CreateContainerRequest, ExecProcessRequest, PauseContainerRequest, ReadStreamRequest,
    ReadStreamResponse, RemoveContainerRequest, ResumeContainerRequest, SignalProcessRequest,
    StartContainerRequest, WaitProcessRequest, WaitProcessResponse,
};
use protocols::agent::agent_ttrpc::{AgentService, create_agent_service};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, openat};
use rustix::io::ioctl_fionread;
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

use super::actor::kill::KILL_PATIENCE;
use super::*;
use crate::agent::Agent;
use crate::events::{Published, Publisher};
use crate::hooks::{Hooks, HostMounts};
use crate::sandbox::Sandbox;
use crate::spec::Spec;

/// An agent whose processes end, and whose starts answer, when the test says so.
#[derive(Default)]
struct Guest {
    init: watch::Sender<Option<i32>>,
    exec: watch::Sender<Option<i32>>,
    /// Start waits for this when set.
    start_blocked: watch::Sender<bool>,
    start_fails: watch::Sender<bool>,
    killed: Notify,
    /// What comes of SIGKILL.
    obeys: Mutex<Obeys>,
    /// What a process says on its standard output.
    output: Mutex<Vec<u8>>,
}

/// What a guest makes of SIGKILL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Obeys {
    #[default]
    Yes,
    /// It says that it does.
    Never,
    /// It says that the process is gone.
    Denies,
    /// It doesn't answer.
    Hangs,
    /// It answers with an error.
    Refuses,
}

impl Guest {
    fn process(&self, exec: &str) -> &watch::Sender<Option<i32>> {
        if exec.is_empty() {
            &self.init
        } else {
            &self.exec
        }
    }

    async fn start(&self) -> ttrpc::Result<Empty> {
        let _ = self
            .start_blocked
            .subscribe()
            .wait_for(|blocked| !blocked)
            .await;
        if *self.start_fails.borrow() {
            let text = "exec: \"nope\": not found".to_owned();
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                Code::NOT_FOUND,
                text,
            )));
        }
        Ok(Empty::new())
    }
}

#[async_trait]
impl AgentService for Guest {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        _: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        _: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.start().await
    }

    async fn exec_process(&self, _: &TtrpcContext, _: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.start().await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let mut status = self.process(&request.exec_id).subscribe();
        let status = status.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(WaitProcessResponse {
            status,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        if request.signal != 9 {
            return Ok(Empty::new());
        }
        let refusal = |code| Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no")));
        let obeys = *self.obeys.lock().unwrap();
        match obeys {
            Obeys::Yes => {
                self.process(&request.exec_id).send_replace(Some(137));
                self.killed.notify_one();
                Ok(Empty::new())
            }
            Obeys::Never => Ok(Empty::new()),
            Obeys::Denies => refusal(Code::NOT_FOUND),
            Obeys::Refuses => refusal(Code::INTERNAL),
            Obeys::Hangs => std::future::pending().await,
        }
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        _: PauseContainerRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        _: ResumeContainerRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        _: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        _: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        Ok(ReadStreamResponse {
            data: mem::take(&mut self.output.lock().unwrap()),
            ..Default::default()
        })
    }

    async fn read_stderr(
        &self,
        _: &TtrpcContext,
        _: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        Ok(ReadStreamResponse::new())
    }
}

struct Fixture {
    guest: Arc<Guest>,
    container: Handle,
    registry: Arc<Registry>,
    sandbox: Arc<Sandbox>,
    published: Published,
    /// The connection to the agent.
    line: StdStream,
    _server: Server,
}

impl Fixture {
    /// A container that was created.
    async fn new() -> Self {
        Self::with(Actor::spawn).await
    }

    /// A pod's sandbox container that was created.
    async fn pause() -> Self {
        Self::with(Pause::spawn).await
    }

    async fn with(spawn: impl FnOnce(Parts) -> Handle) -> Self {
        Self::with_stdio(spawn, Stdio::default()).await
    }

    async fn with_stdio(spawn: impl FnOnce(Parts) -> Handle, stdio: Stdio) -> Self {
        let guest = Arc::new(Guest::default());
        let (ours, theirs) = StdStream::pair().unwrap();
        let line = theirs.try_clone().unwrap();
        let connect = |stream: StdStream| {
            stream.set_nonblocking(true).unwrap();
            UnixStream::from_std(stream).unwrap()
        };
        let once = stream::iter([Ok(connect(theirs))]);
        // The listener stays open without another connection.
        let listener = Listener::new(stream::StreamExt::chain(once, stream::pending()));
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(create_agent_service(guest.clone()));
        server.start().await.unwrap();
        let (_, machine) = watch::channel(None);
        let agent = Agent::new(connect(ours), Duration::from_secs(5), machine);
        let (events, published) = Publisher::to_test();
        let registry = Arc::new(Registry::default());
        let sandbox = Arc::new(Sandbox::for_test(agent));
        let container = spawn(Parts {
            id: "c".to_owned(),
            bundle: "/b".to_owned(),
            pid: 1,
            owns_sandbox: true,
            streams: stdio.open().unwrap(),
            stdio,
            sandbox: Arc::clone(&sandbox),
            events,
            registry: Arc::clone(&registry),
            hooks: Hooks::new(
                &Spec::default(),
                "c",
                Path::new("/b"),
                HostMounts::current().unwrap(),
            ),
        });
        let reservation = registry.reserve("c").unwrap();
        reservation.fulfil(|| container.clone()).unwrap();
        Self {
            guest,
            container,
            registry,
            sandbox,
            published,
            line,
            _server: server,
        }
    }

    async fn start(&self, exec: &str) -> Result<u32> {
        let exec = exec.to_owned();
        self.container
            .ask(|reply| Command::Start { exec, reply })
            .await
    }

    async fn status(&self, exec: &str) -> Result<Status> {
        let exec = exec.to_owned();
        let state = self
            .container
            .ask(|reply| Command::State { exec, reply })
            .await?;
        Ok(state.status)
    }

    async fn wait(&self, exec: &str) -> Result<u32> {
        let exec = exec.to_owned();
        let wait = self.container.ask(|reply| Command::Wait { exec, reply });
        timeout(Duration::from_secs(5), wait)
            .await
            .unwrap()
            .map(|exit| exit.status)
    }

    async fn kill(&self, exec: &str, signal: u32) -> Result<()> {
        let exec = exec.to_owned();
        let all = false;
        self.container
            .ask(|reply| Command::Kill {
                exec,
                signal,
                all,
                reply,
            })
            .await
    }

    async fn delete(&self, exec: &str) -> Result<u32> {
        let exec = exec.to_owned();
        let answer = self
            .container
            .ask(|reply| Command::Delete { exec, reply })
            .await;
        answer.map(|(_, exit)| exit.status)
    }

    async fn add_exec(&self, exec: &str) -> Result<()> {
        self.add_exec_with(exec, Stdio::default()).await
    }

    async fn add_exec_with(&self, exec: &str, stdio: Stdio) -> Result<()> {
        let (exec, spec) = (exec.to_owned(), Box::default());
        self.container
            .ask(|reply| Command::Exec {
                exec,
                stdio,
                spec,
                reply,
            })
            .await
    }

    async fn freeze(&self) -> Result<()> {
        self.container.ask(|reply| Command::Pause { reply }).await
    }

    async fn thaw(&self) -> Result<()> {
        self.container.ask(|reply| Command::Resume { reply }).await
    }

    fn events(&mut self) -> Vec<String> {
        self.published.topics()
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> Kind {
    result.unwrap_err().kind()
}

#[tokio::test]
async fn a_life_in_order() {
    let mut it = Fixture::new().await;
    assert_eq!(it.status("").await.unwrap(), Status::Created);
    assert_eq!(kind(it.freeze().await), Kind::FailedPrecondition);
    it.start("").await.unwrap();
    assert_eq!(kind(it.start("").await), Kind::FailedPrecondition);
    assert_eq!(it.status("").await.unwrap(), Status::Running);
    assert_eq!(kind(it.delete("").await), Kind::FailedPrecondition);

    it.freeze().await.unwrap();
    assert_eq!(it.status("").await.unwrap(), Status::Paused);
    assert_eq!(kind(it.freeze().await), Kind::FailedPrecondition);
    assert_eq!(kind(it.add_exec("late").await), Kind::FailedPrecondition);
    it.thaw().await.unwrap();
    assert_eq!(kind(it.thaw().await), Kind::FailedPrecondition);

    it.add_exec("e").await.unwrap();
    assert_eq!(kind(it.add_exec("e").await), Kind::AlreadyExists);
    assert_eq!(kind(it.kill("e", 15).await), Kind::FailedPrecondition);
    assert_eq!(kind(it.kill("other", 15).await), Kind::NotFound);
    it.start("e").await.unwrap();
    it.guest.exec.send_replace(Some(42));
    assert_eq!(it.wait("e").await.unwrap(), 42);
    assert_eq!(it.delete("e").await.unwrap(), 42);
    assert_eq!(kind(it.status("e").await), Kind::NotFound);

    it.kill("", 9).await.unwrap();
    assert_eq!(it.wait("").await.unwrap(), 137);
    assert_eq!(kind(it.kill("", 9).await), Kind::NotFound);
    assert_eq!(kind(it.add_exec("f").await), Kind::FailedPrecondition);
    assert_eq!(it.delete("").await.unwrap(), 137);
    assert!(it.registry.is_empty());
    assert_eq!(kind(it.status("").await), Kind::NotFound);
    assert_eq!(
        it.events(),
        [
            "start",
            "paused",
            "resumed",
            "exec-added",
            "exec-started",
            "exit",
            "exit",
            "delete"
        ]
        .map(|name| format!("/tasks/{name}"))
    );
}

#[tokio::test]
async fn an_end_before_the_start_s_answer_waits_for_it() {
    let mut it = Fixture::new().await;
    it.guest.start_blocked.send_replace(true);
    let container = it.container.clone();
    let exec = String::new();
    let start =
        tokio::spawn(async move { container.ask(|reply| Command::Start { exec, reply }).await });
    it.guest.init.send_replace(Some(3));
    // While the start hangs, everything else answers.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let status = timeout(Duration::from_millis(50), it.status(""))
        .await
        .unwrap();
    assert_eq!(status.unwrap(), Status::Created);
    assert_eq!(it.events(), [""; 0]);
    it.guest.start_blocked.send_replace(false);
    start.await.unwrap().unwrap();
    assert_eq!(it.wait("").await.unwrap(), 3);
    assert_eq!(it.events(), ["/tasks/start", "/tasks/exit"]);
}

#[tokio::test]
async fn a_container_that_was_never_started_is_ended_and_deleted() {
    let mut it = Fixture::new().await;
    assert_eq!(it.delete("").await.unwrap(), 137);
    timeout(Duration::from_secs(1), it.guest.killed.notified())
        .await
        .unwrap();
    assert_eq!(it.events(), ["/tasks/exit", "/tasks/delete"]);
}

#[tokio::test]
async fn a_missing_command_is_no_missing_container() {
    let mut it = Fixture::new().await;
    it.start("").await.unwrap();
    it.guest.start_fails.send_replace(true);
    it.add_exec("e").await.unwrap();
    let error = it.start("e").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Internal);
    assert_eq!(error.chain(), "exec: \"nope\": not found");
    // It never ran: no exit, and it can be deleted.
    it.delete("e").await.unwrap();
    assert_eq!(it.events(), ["/tasks/start", "/tasks/exec-added"]);
}

#[tokio::test]
async fn a_container_whose_machine_dies_ends_once() {
    let mut it = Fixture::new().await;
    it.start("").await.unwrap();
    // The connection to the agent breaks.
    it.line.shutdown(Shutdown::Both).unwrap();
    assert_eq!(it.wait("").await.unwrap(), 255);
    assert_eq!(it.delete("").await.unwrap(), 255);
    assert_eq!(
        it.events(),
        ["/tasks/start", "/tasks/exit", "/tasks/delete"]
    );
}

#[tokio::test]
async fn a_sandbox_container_lives_without_a_process() {
    let mut it = Fixture::pause().await;
    assert_eq!(it.status("").await.unwrap(), Status::Created);
    it.start("").await.unwrap();
    assert_eq!(kind(it.start("").await), Kind::FailedPrecondition);
    assert_eq!(kind(it.delete("").await), Kind::FailedPrecondition);
    assert_eq!(kind(it.add_exec("e").await), Kind::Unimplemented);
    assert_eq!(kind(it.status("e").await), Kind::NotFound);
    it.freeze().await.unwrap();
    assert_eq!(it.status("").await.unwrap(), Status::Paused);
    it.thaw().await.unwrap();
    // A signal that the program wouldn't notice.
    it.kill("", 1).await.unwrap();
    assert_eq!(it.status("").await.unwrap(), Status::Running);
    it.kill("", 15).await.unwrap();
    assert_eq!(it.wait("").await.unwrap(), 0);
    assert_eq!(kind(it.kill("", 9).await), Kind::NotFound);
    assert_eq!(it.delete("").await.unwrap(), 0);
    assert!(it.registry.is_empty());
    assert_eq!(
        it.events(),
        ["start", "paused", "resumed", "exit", "delete"].map(|name| format!("/tasks/{name}"))
    );
}

#[tokio::test]
async fn a_sandbox_container_ends_with_its_machine() {
    let mut it = Fixture::pause().await;
    it.start("").await.unwrap();
    it.sandbox.kill().await;
    assert_eq!(it.wait("").await.unwrap(), 255);
    assert_eq!(it.events(), ["/tasks/start", "/tasks/exit"]);
}

#[tokio::test]
async fn a_sandbox_container_that_was_never_started_is_ended_and_deleted() {
    let mut it = Fixture::pause().await;
    assert_eq!(it.delete("").await.unwrap(), 137);
    assert!(it.sandbox.has_ended() || it.sandbox.was_stopped());
    assert_eq!(it.events(), ["/tasks/exit", "/tasks/delete"]);
}

/// A named pipe for a process's output: its folder, its path, and the streams that have it.
fn stdout_pipe() -> (tempfile::TempDir, PathBuf, Stdio) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stdout");
    mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let stdio = Stdio {
        stdout: path.display().to_string(),
        ..Stdio::default()
    };
    (folder, path, stdio)
}

#[tokio::test]
async fn an_end_is_told_once_its_output_was_taken() {
    const SAID: usize = 60_000;
    let it = Fixture::new().await;
    it.start("").await.unwrap();
    let (_folder, path, stdio) = stdout_pipe();
    it.add_exec_with("e", stdio).await.unwrap();
    *it.guest.output.lock().unwrap() = vec![b'x'; SAID];
    let look = OFlags::RDONLY | OFlags::NONBLOCK;
    let look = openat(CWD, &path, look, Mode::empty()).unwrap();
    let client = thread::spawn(move || {
        let mut pipe = File::open(&path).unwrap();
        let mut taken = 0;
        let mut part = [0; 4096];
        loop {
            match pipe.read(&mut part).unwrap() {
                0 => return taken,
                length => taken += length,
            }
            // As one who writes a log.
            thread::sleep(Duration::from_millis(5));
        }
    });
    it.start("e").await.unwrap();
    it.guest.exec.send_replace(Some(0));
    assert_eq!(it.wait("e").await.unwrap(), 0);
    assert_eq!(ioctl_fionread(&look).unwrap(), 0, "not taken");
    it.delete("e").await.unwrap();
    assert_eq!(client.join().unwrap(), SAID);
}

/// As the guest's connection does, this one breaks when the machine is ended.
async fn breaks_with_the_machine(it: &Fixture) {
    timeout(Duration::from_secs(5), it.sandbox.ended())
        .await
        .expect("the machine still runs");
    it.line.shutdown(Shutdown::Both).unwrap();
}

#[tokio::test]
async fn what_the_guest_does_not_kill_ends_with_its_machine() {
    for obeys in [Obeys::Never, Obeys::Denies, Obeys::Hangs, Obeys::Refuses] {
        let mut it = Fixture::new().await;
        it.start("").await.unwrap();
        *it.guest.obeys.lock().unwrap() = obeys;
        let (killed, ()) = tokio::join!(it.kill("", 9), breaks_with_the_machine(&it));
        match obeys {
            Obeys::Denies => assert_eq!(kind(killed), Kind::NotFound),
            _ => killed.unwrap(),
        }
        assert_eq!(it.wait("").await.unwrap(), 255, "{obeys:?}");
        assert_eq!(it.delete("").await.unwrap(), 255, "{obeys:?}");
        assert_eq!(
            it.events(),
            ["/tasks/start", "/tasks/exit", "/tasks/delete"]
        );
    }
}

#[tokio::test]
async fn a_container_that_was_never_started_is_deleted_whatever_the_guest_does() {
    for obeys in [Obeys::Never, Obeys::Hangs] {
        let mut it = Fixture::new().await;
        *it.guest.obeys.lock().unwrap() = obeys;
        let (deleted, ()) = tokio::join!(it.delete(""), breaks_with_the_machine(&it));
        assert_eq!(deleted.unwrap(), 255, "{obeys:?}");
        assert_eq!(it.events(), ["/tasks/exit", "/tasks/delete"]);
    }
}

#[tokio::test]
async fn a_machine_outlives_what_its_guest_kills() {
    let (_folder, path, stdio) = stdout_pipe();
    let it = Fixture::with_stdio(Actor::spawn, stdio).await;
    *it.guest.output.lock().unwrap() = vec![b'x'; 60_000];
    it.start("").await.unwrap();
    // Also of a container that is frozen, whose processes can be killed.
    it.freeze().await.unwrap();
    let waiting = {
        let (container, exec) = (it.container.clone(), String::new());
        tokio::spawn(async move { container.ask(|reply| Command::Wait { exec, reply }).await })
    };
    it.kill("", 9).await.unwrap();
    // Somebody takes the output, but too slowly for it to be gone when patience ends.
    let look = OFlags::RDONLY | OFlags::NONBLOCK;
    let client = openat(CWD, &path, look, Mode::empty()).unwrap();
    let until = tokio::time::Instant::now() + KILL_PATIENCE * 2;
    while tokio::time::Instant::now() < until {
        rustix::io::read(&client, &mut [0; 64]).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!waiting.is_finished(), "its output is still being taken");
    assert!(!it.sandbox.has_ended(), "its machine was ended");
    rustix::io::read(&client, &mut [0; 60_000]).unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().status, 137);
}

/// Waits for an exec's end while its container is deleted.
async fn end_with_the_container(it: &mut Fixture) -> u32 {
    let container = it.container.clone();
    let exec = "e".to_owned();
    let waiting =
        tokio::spawn(async move { container.ask(|reply| Command::Wait { exec, reply }).await });
    it.kill("", 9).await.unwrap();
    assert_eq!(it.wait("").await.unwrap(), 137);
    assert_eq!(it.delete("").await.unwrap(), 137);
    let events = [
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "exit",
        "delete",
    ];
    assert_eq!(it.events(), events.map(|name| format!("/tasks/{name}")));
    waiting.await.unwrap().unwrap().status
}

#[tokio::test]
async fn an_exec_ends_with_its_container_at_the_latest() {
    let mut it = Fixture::new().await;
    it.start("").await.unwrap();
    it.add_exec("e").await.unwrap();
    it.start("e").await.unwrap();
    assert_eq!(end_with_the_container(&mut it).await, 137);
}

#[tokio::test]
async fn an_exec_whose_output_is_not_taken_keeps_its_status() {
    let mut it = Fixture::new().await;
    it.start("").await.unwrap();
    let (_folder, _, stdio) = stdout_pipe();
    it.add_exec_with("e", stdio).await.unwrap();
    *it.guest.output.lock().unwrap() = vec![b'x'; 60_000];
    it.start("e").await.unwrap();
    it.guest.exec.send_replace(Some(42));
    // The end is known, if not told, once there is nothing to signal any more.
    while it.kill("e", 15).await.is_ok() {}
    assert_eq!(end_with_the_container(&mut it).await, 42);
}
