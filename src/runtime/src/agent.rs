// SPDX-License-Identifier: Apache-2.0
//! The client of the guest's agent.
//!
//! Every call has a deadline but those that wait by their nature: a process's end, its streams,
//! and the next out-of-memory kill.

use std::os::fd::OwnedFd;
use std::time::Duration;

use protocols::agent::agent::{
    AddARPNeighborsRequest, CloseStdinRequest, CreateContainerRequest, CreateSandboxRequest,
    DestroySandboxRequest, ExecProcessRequest, GetOOMEventRequest, OnlineCPUMemRequest,
    PauseContainerRequest, ReadStreamRequest, RemoveContainerRequest, ResizeVolumeRequest,
    ResumeContainerRequest, Routes, SignalProcessRequest, StartContainerRequest,
    StatsContainerRequest, StatsContainerResponse, Storage, TtyWinResizeRequest,
    UpdateContainerRequest, UpdateEphemeralMountsRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, VolumeStatsRequest, WaitProcessRequest, WriteStreamRequest,
};
use protocols::agent::agent_ttrpc::AgentServiceClient;
use protocols::agent::csi::VolumeStatsResponse;
use protocols::agent::oci::LinuxResources;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{Shutdown, shutdown};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::warn;
use ttrpc::Code;
use ttrpc::context::Context as CallContext;

use crate::error::{Kind, Result, ShimError};
use crate::network::GuestNetwork;
use crate::sandbox::Ended;

/// How long after its streams broke a machine's end may be told.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// One of a process's output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Stdout,
    Stderr,
}

/// Names a process: a container, and the exec in it, empty for its init.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessName {
    pub(crate) container: String,
    pub(crate) exec: String,
}

/// A connection to the agent.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentServiceClient,
    deadline: Duration,
    /// The end of the machine that it runs in.
    machine: watch::Receiver<Option<Ended>>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Agent")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// Breaks the connection to the agent with the machine's end. It is broken by then, unless the monitor
/// is held by the kernel of the host and its files with it.
async fn break_at(mut end: watch::Receiver<Option<Ended>>, line: OwnedFd) {
    if end.wait_for(Option::is_some).await.is_ok() {
        // The only failure is that it is broken.
        let _ = shutdown(&line, Shutdown::Both);
    }
}

impl Agent {
    /// Speaks over a connected stream to the agent of a machine, whose end `machine` tells; must be
    /// called in the runtime.
    pub(crate) fn new(
        stream: UnixStream,
        deadline: Duration,
        machine: watch::Receiver<Option<Ended>>,
    ) -> Self {
        match fcntl_dupfd_cloexec(&stream, 0) {
            Ok(line) => drop(tokio::spawn(break_at(machine.clone(), line))),
            Err(error) => warn!(%error, "a call may outlive the machine"),
        }
        let client = ttrpc::r#async::Client::new(stream.into());
        Self {
            client: AgentServiceClient::new(client),
            deadline,
            machine,
        }
    }

    fn bounded(&self) -> CallContext {
        within(self.deadline)
    }

    /// An answer of the agent, or its silence, in the runtime's terms.
    async fn answer<T>(&self, what: &str, result: ttrpc::Result<T>) -> Result<T> {
        let error = match result {
            Ok(answer) => return Ok(answer),
            // What the agent says is a sentence of its own.
            Err(ttrpc::Error::RpcStatus(status)) => {
                return Err(ShimError::new(kind(status.code()), status.message));
            }
            Err(error) => error,
        };
        let late = matches!(&error, ttrpc::Error::Others(text)
            if text.contains("deadline") || text.contains("timeout"));
        let (kind, detail) = if late {
            let silence = "the agent did not answer in time".to_owned();
            (Kind::DeadlineExceeded, silence)
        } else if let Some(end) = self.machine_end().await {
            let end = format!("the virtual machine has ended: {}", end.describe());
            (Kind::Unavailable, end)
        } else {
            let end = format!("the connection to the agent failed: {error}");
            (Kind::Unavailable, end)
        };
        Err(ShimError::new(kind, format!("{what}: {detail}")))
    }

    /// How the machine ended, if that is why a connection to it broke.
    async fn machine_end(&self) -> Option<Ended> {
        let mut machine = self.machine.clone();
        let ended = timeout(END_PATIENCE, machine.wait_for(Option::is_some)).await;
        ended.ok()?.ok()?.clone()
    }

    pub(crate) async fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<()> {
        let result = self.client.create_sandbox(self.bounded(), request).await;
        self.answer("create the sandbox", result).await.map(drop)
    }

    /// Gives the guest what is new of its network. Waits for the interfaces to appear.
    pub(crate) async fn update_network(&self, network: &GuestNetwork) -> Result<()> {
        for interface in &network.interfaces {
            let request = UpdateInterfaceRequest {
                interface: Some(interface.clone()).into(),
                ..Default::default()
            };
            let result = self.client.update_interface(self.bounded(), &request).await;
            let what = format!("set up the interface {}", interface.name);
            self.answer(&what, result).await?;
        }
        if let Some(routes) = &network.routes {
            let request = UpdateRoutesRequest {
                routes: Some(Routes {
                    Routes: routes.clone(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            };
            let result = self.client.update_routes(self.bounded(), &request).await;
            self.answer("set the routes", result).await?;
        }
        if let Some(neighbours) = &network.neighbours {
            let request = AddARPNeighborsRequest {
                neighbors: Some(neighbours.clone()).into(),
                ..Default::default()
            };
            let client = &self.client;
            let result = client.add_arp_neighbors(self.bounded(), &request).await;
            self.answer("add the neighbours", result).await?;
        }
        Ok(())
    }

    /// Ends everything in the guest and writes its file systems out.
    pub(crate) async fn destroy_sandbox(&self, limit: Duration) -> Result<()> {
        let request = DestroySandboxRequest::default();
        let result = self.client.destroy_sandbox(within(limit), &request).await;
        self.answer("end the sandbox", result).await.map(drop)
    }

    pub(crate) async fn create_container(&self, request: &CreateContainerRequest) -> Result<()> {
        let result = self.client.create_container(self.bounded(), request).await;
        let answer = self.answer("create the container", result).await;
        answer.map(drop).map_err(begin_failed)
    }

    pub(crate) async fn start_container(&self, container: &str) -> Result<()> {
        let request = StartContainerRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let result = self.client.start_container(self.bounded(), &request).await;
        let answer = self.answer("start the container", result).await;
        answer.map(drop).map_err(begin_failed)
    }

    /// Has a storage that is mounted follow a change on the host.
    pub(crate) async fn update_storage(&self, storage: Storage) -> Result<()> {
        let request = UpdateEphemeralMountsRequest {
            storages: vec![storage],
            ..Default::default()
        };
        let client = &self.client;
        let result = client.update_ephemeral_mounts(self.bounded(), &request);
        self.answer("update the volume", result.await)
            .await
            .map(drop)
    }

    pub(crate) async fn remove_container(&self, container: &str) -> Result<()> {
        let request = RemoveContainerRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let result = self.client.remove_container(self.bounded(), &request).await;
        self.answer("remove the container", result).await.map(drop)
    }

    pub(crate) async fn exec(&self, request: &ExecProcessRequest) -> Result<()> {
        let result = self.client.exec_process(self.bounded(), request).await;
        let answer = self.answer("exec", result).await;
        answer.map(drop).map_err(begin_failed)
    }

    pub(crate) async fn signal(&self, process: &ProcessName, signal: u32) -> Result<()> {
        let request = SignalProcessRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            signal,
            ..Default::default()
        };
        let result = self.client.signal_process(self.bounded(), &request).await;
        self.answer("signal the process", result).await.map(drop)
    }

    /// Waits for a process's end; its exit status.
    pub(crate) async fn wait(&self, process: &ProcessName) -> Result<u32> {
        let request = WaitProcessRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            ..Default::default()
        };
        let result = self
            .client
            .wait_process(CallContext::default(), &request)
            .await;
        let answer = self.answer("wait for the process", result).await;
        answer.map(|response| response.status.cast_unsigned())
    }

    pub(crate) async fn update(&self, container: &str, resources: LinuxResources) -> Result<()> {
        let request = UpdateContainerRequest {
            container_id: container.to_owned(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        let result = self.client.update_container(self.bounded(), &request).await;
        self.answer("update the container", result).await.map(drop)
    }

    /// Brings plugged CPUs up; waits for `count` of them. Memory comes up by itself.
    pub(crate) async fn online_cpus(&self, count: u32) -> Result<()> {
        let request = OnlineCPUMemRequest {
            wait: true,
            nb_cpus: count,
            cpu_only: true,
            ..Default::default()
        };
        let result = self.client.online_cpu_mem(self.bounded(), &request).await;
        self.answer("bring CPUs up", result).await.map(drop)
    }

    pub(crate) async fn stats(&self, container: &str) -> Result<StatsContainerResponse> {
        let request = StatsContainerRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let result = self.client.stats_container(self.bounded(), &request).await;
        self.answer("read the container's statistics", result).await
    }

    pub(crate) async fn pause(&self, container: &str) -> Result<()> {
        let request = PauseContainerRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let result = self.client.pause_container(self.bounded(), &request).await;
        self.answer("pause the container", result).await.map(drop)
    }

    pub(crate) async fn resume(&self, container: &str) -> Result<()> {
        let request = ResumeContainerRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let result = self.client.resume_container(self.bounded(), &request).await;
        self.answer("resume the container", result).await.map(drop)
    }

    /// Waits for output; empty at its end.
    pub(crate) async fn read(
        &self,
        process: &ProcessName,
        stream: Output,
        length: u32,
    ) -> Result<Vec<u8>> {
        let request = ReadStreamRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            len: length,
            ..Default::default()
        };
        let context = CallContext::default();
        let result = match stream {
            Output::Stdout => self.client.read_stdout(context, &request).await,
            Output::Stderr => self.client.read_stderr(context, &request).await,
        };
        let answer = self.answer("read the output", result).await;
        answer.map(|response| response.data)
    }

    /// Writes input; how many bytes the process's stream took.
    pub(crate) async fn write(&self, process: &ProcessName, data: Vec<u8>) -> Result<usize> {
        let request = WriteStreamRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            data,
            ..Default::default()
        };
        let result = self
            .client
            .write_stdin(CallContext::default(), &request)
            .await;
        let answer = self.answer("write the input", result).await;
        answer.map(|response| usize::try_from(response.len).unwrap_or(usize::MAX))
    }

    pub(crate) async fn close_stdin(&self, process: &ProcessName) -> Result<()> {
        let request = CloseStdinRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            ..Default::default()
        };
        let result = self.client.close_stdin(self.bounded(), &request).await;
        self.answer("close the input", result).await.map(drop)
    }

    pub(crate) async fn resize(&self, process: &ProcessName, row: u32, column: u32) -> Result<()> {
        let request = TtyWinResizeRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            row,
            column,
            ..Default::default()
        };
        let result = self.client.tty_win_resize(self.bounded(), &request).await;
        self.answer("resize the terminal", result).await.map(drop)
    }

    /// What the file system of a volume holds.
    pub(crate) async fn volume_stats(&self, point: &str) -> Result<VolumeStatsResponse> {
        let request = VolumeStatsRequest {
            volume_guest_path: point.to_owned(),
            ..Default::default()
        };
        let result = self.client.get_volume_stats(self.bounded(), &request).await;
        let answer = self.answer("read the volume's statistics", result).await;
        answer.map_err(begin_failed)
    }

    /// The guest looks at what is gone from a shared tree. So it learns that it is, and forgets all below.
    pub(crate) async fn look_at_gone(&self, path: &str) {
        let request = VolumeStatsRequest {
            volume_guest_path: path.to_owned(),
            ..Default::default()
        };
        // That it isn't there is the right answer.
        let _ = self.client.get_volume_stats(self.bounded(), &request).await;
    }

    /// The file system of a volume takes `size` bytes of its disk.
    pub(crate) async fn resize_volume(&self, point: &str, size: u64) -> Result<()> {
        let request = ResizeVolumeRequest {
            volume_guest_path: point.to_owned(),
            size,
            ..Default::default()
        };
        let result = self.client.resize_volume(self.bounded(), &request).await;
        let answer = self.answer("resize the volume", result).await;
        answer.map(drop).map_err(begin_failed)
    }

    /// Waits for a container to run out of memory; which one.
    pub(crate) async fn out_of_memory(&self) -> Result<String> {
        let request = GetOOMEventRequest::default();
        let result = self
            .client
            .get_oom_event(CallContext::default(), &request)
            .await;
        let answer = self.answer("wait for out-of-memory events", result).await;
        answer.map(|event| event.container_id)
    }
}

/// The agent's status in the runtime's terms.
fn kind(code: Code) -> Kind {
    match code {
        Code::NOT_FOUND => Kind::NotFound,
        Code::ALREADY_EXISTS => Kind::AlreadyExists,
        Code::INVALID_ARGUMENT => Kind::InvalidArgument,
        Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
        Code::UNIMPLEMENTED => Kind::Unimplemented,
        Code::UNAVAILABLE => Kind::Unavailable,
        Code::DEADLINE_EXCEEDED => Kind::DeadlineExceeded,
        _ => Kind::Internal,
    }
}

fn within(limit: Duration) -> CallContext {
    ttrpc::context::with_timeout(i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX))
}

/// For calls whose "not found" is about something in the guest, a command or a user or a mount, and
/// must not tell containerd that the task is gone, nor `kata-ctl` that another sandbox has the volume.
fn begin_failed(error: ShimError) -> ShimError {
    match error.kind() {
        Kind::NotFound => ShimError::new(Kind::Internal, error.chain()),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent whose connection breaks, and where its machine's end is told.
    fn broken() -> (Agent, watch::Sender<Option<Ended>>) {
        let (ours, _) = UnixStream::pair().unwrap();
        let (end, machine) = watch::channel(None);
        (Agent::new(ours, Duration::from_secs(5), machine), end)
    }

    #[tokio::test]
    async fn a_call_that_a_machine_s_end_broke_says_how_it_ended() {
        let (agent, end) = broken();
        let (answer, ()) = tokio::join!(agent.start_container("c"), async {
            end.send_replace(Some(Ended::for_test("a triple fault")));
        });
        let error = answer.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert_eq!(
            error.chain(),
            "start the container: the virtual machine has ended: a triple fault"
        );
    }

    #[tokio::test]
    async fn a_connection_may_break_while_the_machine_runs() {
        let (agent, _end) = broken();
        let error = agent.stats("c").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(
            error.chain().starts_with(
                "read the container's statistics: the connection to the agent failed: "
            ),
            "{}",
            error.chain()
        );
    }
}
