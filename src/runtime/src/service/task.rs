// SPDX-License-Identifier: Apache-2.0
//! The Task service: every method answers, and with containerd's own status codes.

use std::process;
use std::sync::Arc;

use async_trait::async_trait;
use protobuf::MessageField;
use protobuf::well_known_types::empty::Empty;
use protocols::containerd::shim::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use protocols::containerd::shim_ttrpc::Task;
use protocols::containerd::task::{ProcessInfo, Status as TaskStatus};
use tokio::sync::oneshot;
use tracing::warn;
use ttrpc::r#async::TtrpcContext;

use super::shim::{Shim, to_its_end};
use super::{create, stats};
use crate::cli::check_id;
use crate::container::io::Stdio;
use crate::container::{Command, Handle, Status};
use crate::error::{Kind, Result, ShimError};
use crate::spec;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct TaskService {
    shim: Arc<Shim>,
}

impl TaskService {
    pub(crate) fn new(shim: Arc<Shim>) -> Self {
        Self { shim }
    }

    fn container(&self, id: &str) -> Result<Handle> {
        self.shim.registry.find(id)
    }

    async fn ask<T>(
        &self,
        id: &str,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command,
    ) -> Result<T> {
        self.container(id)?.ask(command).await
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let id = request.id.clone();
        let pid = to_its_end(create::create(Arc::clone(&self.shim), request))
            .await
            .inspect_err(|error| warn!(container = id, error = error.chain(), "not created"))?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let exec = request.exec_id;
        let pid = self
            .ask(&request.id, |reply| Command::Start { exec, reply })
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let exec = request.exec_id.clone();
        let state = self
            .ask(&request.id, |reply| Command::State { exec, reply })
            .await?;
        let (status, exit) = match state.status {
            Status::Created => (TaskStatus::CREATED, None),
            Status::Running => (TaskStatus::RUNNING, None),
            Status::Paused => (TaskStatus::PAUSED, None),
            Status::Stopped(exit) => (TaskStatus::STOPPED, Some(exit)),
        };
        Ok(StateResponse {
            id: request.id,
            bundle: state.bundle,
            pid: state.pid,
            status: status.into(),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        check_id("exec id", &request.exec_id)?;
        let mut process: spec::Process = spec::read_any(request.spec.as_ref(), "exec spec")?;
        spec::amend_process(&mut process)?;
        let command = |reply| Command::Exec {
            exec: request.exec_id,
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            spec: Box::new(process.into()),
            reply,
        };
        self.ask(&request.id, command).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let command = |reply| Command::Kill {
            exec: request.exec_id,
            signal: request.signal,
            all: request.all,
            reply,
        };
        self.ask(&request.id, command).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exec = request.exec_id;
        let exit = self
            .ask(&request.id, |reply| Command::Wait { exec, reply })
            .await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let exec = request.exec_id;
        if exec.is_empty() {
            // Who creates it gave up, and comes back no more: the answer below says that it is
            // being created, and once it is, it is undone.
            self.shim.registry.cancel(&request.id);
        }
        let (pid, exit) = self
            .ask(&request.id, |reply| Command::Delete { exec, reply })
            .await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let exec = String::new();
        let state = self
            .ask(&request.id, |reply| Command::State { exec, reply })
            .await?;
        // The host sees one process for all that run in the guest.
        let info = ProcessInfo {
            pid: state.pid,
            ..Default::default()
        };
        let runs = !matches!(state.status, Status::Stopped(_));
        Ok(PidsResponse {
            processes: if runs { vec![info] } else { Vec::new() },
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.ask(&request.id, |reply| Command::Pause { reply })
            .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.ask(&request.id, |reply| Command::Resume { reply })
            .await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.container(&request.id)?;
        Err(ShimError::new(
            Kind::Unimplemented,
            "a container in a virtual machine can't be checkpointed",
        )
        .into())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let command = |reply| Command::Resize {
            exec: request.exec_id,
            rows: request.height,
            columns: request.width,
            reply,
        };
        self.ask(&request.id, command).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            let exec = request.exec_id;
            self.ask(&request.id, |reply| Command::CloseStdin { exec, reply })
                .await?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = spec::read_any(request.resources.as_ref(), "resources")?;
        let (resources, cpus) = spec::resources(resources)?;
        let resources = Box::new(resources);
        let command = |reply| Command::Update {
            resources,
            cpus,
            reply,
        };
        self.ask(&request.id, command).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let statistics = self
            .ask(&request.id, |reply| Command::Stats { reply })
            .await?;
        let metrics = match self.shim.sandbox(&request.id) {
            // The task that stands for a pod: what the machine costs around its containers, too.
            Ok(sandbox) if sandbox.plan().pod.is_some() => stats::of_machine(&sandbox).await?,
            _ => stats::metrics(&statistics),
        };
        Ok(StatsResponse {
            stats: MessageField::some(stats::encode(&metrics)?),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let exec = String::new();
        let task = match self.container(&request.id) {
            Ok(container) => container
                .ask(|reply| Command::State { exec, reply })
                .await
                .ok(),
            // containerd connects before there is a task, too.
            Err(_) => None,
        };
        Ok(ConnectResponse {
            shim_pid: process::id(),
            task_pid: task.map_or(0, |task| task.pid),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let shim = Arc::clone(&self.shim);
        to_its_end(async move {
            if request.now {
                shim.shut_down().await;
            } else {
                shim.shut_down_if_idle().await;
            }
            Ok(Empty::new())
        })
        .await
        .map_err(Into::into)
    }
}
