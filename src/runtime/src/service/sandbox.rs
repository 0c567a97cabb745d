// SPDX-License-Identifier: Apache-2.0
//! The Sandbox service: a pod's sandbox without a container that stands for it.
//!
//! Its life is that of such a container, so the same actor lives it; only that nobody sees a task,
//! and that no event of one is published.

use std::path::Path;
use std::process;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use protocols::containerd::cri::PodSandboxConfig;
use protocols::containerd::metric::Metric;
use protocols::containerd::platform::Platform;
use protocols::containerd::sandbox::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use protocols::containerd::sandbox_ttrpc::Sandbox as Service;
use tokio::time::timeout;
use tracing::warn;
use ttrpc::r#async::TtrpcContext;

use super::shim::{Shim, Standing, to_its_end};
use super::{create, stats};
use crate::cli::check_id;
use crate::config::Config;
use crate::container::io::Stdio;
use crate::container::{Command, Exit, Parts, Pause, Snapshot, Status};
use crate::error::{Context, Kind, Result, ShimError};
use crate::events::Publisher;
use crate::hooks::Hooks;
use crate::sandbox::{Plan, PodFiles, Sandbox};
use crate::spec::Spec;

/// Name of the pod's configuration on the wire.
const POD_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// What `SandboxStatus` says, in CRI's words.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// How long a sandbox may take to stop where containerd doesn't say.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

const SIGKILL: u32 = 9;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct SandboxService {
    shim: Arc<Shim>,
}

impl SandboxService {
    pub(crate) fn new(shim: Arc<Shim>) -> Self {
        Self { shim }
    }
}

impl Standing {
    async fn state(&self) -> Result<Snapshot> {
        let exec = String::new();
        self.handle
            .ask(|reply| Command::State { exec, reply })
            .await
    }

    async fn wait(&self) -> Result<Exit> {
        let exec = String::new();
        self.handle.ask(|reply| Command::Wait { exec, reply }).await
    }

    /// Ends the sandbox, if it hasn't ended.
    async fn stop(&self) -> Result<()> {
        let killed = self.handle.ask(|reply| Command::Kill {
            exec: String::new(),
            signal: SIGKILL,
            all: true,
            reply,
        });
        match killed.await {
            Err(error) if error.kind() != Kind::NotFound => Err(error),
            _ => self.wait().await.map(drop),
        }
    }
}

async fn create(shim: Arc<Shim>, request: CreateSandboxRequest) -> Result<()> {
    let id = &request.sandbox_id;
    check_id("sandbox id", id)?;
    if shim.any_sandbox(id).is_ok() {
        return Err(ShimError::new(
            Kind::AlreadyExists,
            format!("sandbox {id} exists already"),
        ));
    }
    // The task API's lock on names: two creates at once are one too many.
    let _reservation = shim.registry.reserve(id)?;
    let pod = pod_config(request.options.as_ref())?;
    let config = Config::for_sandbox(shim.options.as_ref(), &pod.annotations)?;
    let bundle = Path::new(&request.bundle_path);
    let mut plan = Plan::of_config(id, &pod, &request.netns_path, &config)?;
    if let Some(plan) = &mut plan.pod {
        plan.files = Some(PodFiles::write(bundle, &pod, &plan.dns)?);
    }
    let (sandbox, _) = create::boot(&shim, id, config, plan, Vec::new(), |_| Ok(())).await?;
    stand(&shim, id, &request.bundle_path, sandbox)
}

/// Begins the life of a sandbox that stands by itself.
pub(super) fn stand(shim: &Shim, id: &str, bundle: &str, sandbox: Arc<Sandbox>) -> Result<()> {
    let stdio = Stdio::default();
    let hooks = Hooks::new(&Spec::default(), id, Path::new(bundle), shim.host.clone());
    shim.let_stand(Pause::spawn(Parts {
        id: id.to_owned(),
        bundle: bundle.to_owned(),
        pid: sandbox.pid(),
        streams: stdio.open()?,
        stdio,
        sandbox,
        owns_sandbox: true,
        events: Publisher::to_nobody(),
        registry: Arc::clone(&shim.registry),
        hooks,
    }));
    Ok(())
}

fn pod_config(options: Option<&Any>) -> Result<PodSandboxConfig> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(PodSandboxConfig::new());
    };
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    if name != POD_CONFIG {
        return Err(ShimError::new(
            Kind::InvalidArgument,
            format!("sandbox options of type {name:?}: wants {POD_CONFIG}"),
        ));
    }
    PodSandboxConfig::parse_from_bytes(&any.value)
        .context(Kind::InvalidArgument, || "sandbox options".to_owned())
}

#[async_trait]
impl Service for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let id = request.sandbox_id.clone();
        to_its_end(create(Arc::clone(&self.shim), request))
            .await
            .inspect_err(|error| warn!(sandbox = id, error = error.chain(), "not created"))?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let sandbox = self.shim.standing(&request.sandbox_id)?;
        let exec = String::new();
        let pid = sandbox
            .handle
            .ask(|reply| Command::Start { exec, reply })
            .await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: MessageField::some(sandbox.created.into()),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        Ok(PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".to_owned(),
                architecture: "amd64".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let sandbox = self.shim.standing(&request.sandbox_id)?;
        let limit = match request.timeout_secs {
            0 => STOP_TIMEOUT,
            seconds => Duration::from_secs(seconds.into()),
        };
        timeout(limit, sandbox.stop())
            .await
            .context(Kind::DeadlineExceeded, || {
                format!("stop sandbox {}", request.sandbox_id)
            })??;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.shim.standing(&request.sandbox_id)?.wait().await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let standing = self.shim.standing(&request.sandbox_id)?;
        let state = standing.state().await?;
        let (name, exit) = match state.status {
            Status::Running | Status::Paused => (READY, None),
            Status::Created => (NOT_READY, None),
            Status::Stopped(exit) => (NOT_READY, Some(exit)),
        };
        let mut response = SandboxStatusResponse {
            pid: state.pid,
            state: name.to_owned(),
            created_at: MessageField::some(standing.created.into()),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            ..Default::default()
        };
        if request.verbose {
            let sandbox = self.shim.any_sandbox(&request.sandbox_id)?;
            let size = sandbox.size();
            response.info = [
                ("shimPid", process::id().to_string()),
                ("vcpus", size.vcpus.to_string()),
                ("memoryMiB", size.memory_mib.to_string()),
                ("guestKernel", sandbox.config().kernel.display().to_string()),
                ("guestImage", sandbox.config().image.display().to_string()),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        }
        response.sandbox_id = request.sandbox_id;
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        self.shim.standing(&request.sandbox_id)?;
        self.shim.sandbox(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let shim = Arc::clone(&self.shim);
        to_its_end(async move {
            // Also for a sandbox that could not be created: its shim is to go.
            if let Ok(sandbox) = shim.standing(&request.sandbox_id) {
                sandbox.stop().await?;
            }
            shim.shut_down().await;
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let sandbox = self.shim.sandbox(&request.sandbox_id)?;
        let metrics = stats::of_machine(&sandbox).await?;
        Ok(SandboxMetricsResponse {
            metrics: MessageField::some(Metric {
                timestamp: MessageField::some(SystemTime::now().into()),
                id: request.sandbox_id,
                data: MessageField::some(stats::encode(&metrics)?),
                ..Default::default()
            }),
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn a_shutdown_goes_on_without_its_client() {
        let shim = Arc::new(Shim::standing_for_test());
        let service = SandboxService::new(Arc::clone(&shim));
        let context = TtrpcContext::default();
        let request = ShutdownSandboxRequest {
            sandbox_id: "test".to_owned(),
            ..Default::default()
        };
        {
            let mut request = pin!(service.shutdown_sandbox(&context, request));
            // Begun, and then dropped as if the connection had broken.
            poll_fn(|task| {
                assert!(request.as_mut().poll(task).is_pending());
                Poll::Ready(())
            })
            .await;
        }
        timeout(Duration::from_secs(5), shim.finished())
            .await
            .expect("the shim stays");
    }
}
