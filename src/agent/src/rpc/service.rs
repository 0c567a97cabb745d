// SPDX-License-Identifier: Apache-2.0
//! `grpc.AgentService`: every method of the protocol, in its order. What this agent does not do
//! answers UNIMPLEMENTED with a reason; the generated default would answer NOT_FOUND, which a
//! runtime takes for a container that is gone.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use protobuf::well_known_types::empty::Empty;
use protocols::agent::agent::{
    AddARPNeighborsRequest, AddSwapPathRequest, AddSwapRequest, CloseStdinRequest, CopyFileRequest,
    CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest, ExecProcessRequest,
    GetDiagnosticDataRequest, GetDiagnosticDataResponse, GetIPTablesRequest, GetIPTablesResponse,
    GetMetricsRequest, GetOOMEventRequest, GuestDetailsRequest, GuestDetailsResponse, Interfaces,
    ListInterfacesRequest, ListRoutesRequest, MemAgentCompactConfig, MemAgentMemcgConfig,
    MemHotplugByProbeRequest, Metrics, OOMEvent, OnlineCPUMemRequest, PauseContainerRequest,
    ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest,
    RemoveStaleVirtiofsShareMountsRequest, ReseedRandomDevRequest, ResizeVolumeRequest,
    ResumeContainerRequest, Routes, SetGuestDateTimeRequest, SetIPTablesRequest,
    SetIPTablesResponse, SetPolicyRequest, SignalProcessRequest, StartContainerRequest,
    StatsContainerRequest, StatsContainerResponse, TtyWinResizeRequest, UpdateContainerRequest,
    UpdateEphemeralMountsRequest, UpdateInterfaceRequest, UpdateRoutesRequest, VolumeStatsRequest,
    WaitProcessRequest, WaitProcessResponse, WriteStreamRequest, WriteStreamResponse,
};
use protocols::agent::agent_ttrpc::AgentService;
use protocols::agent::csi::VolumeStatsResponse;
use protocols::agent::types::Interface;
use ttrpc::asynchronous::TtrpcContext;

use super::{files, guest, iptables, metrics, volumes};
use crate::container::{self, Output};
use crate::error::{AgentError, Result};
use crate::network;
use crate::sandbox::Sandbox;
use crate::storage;
use crate::task::blocking;

/// The service of one sandbox.
#[derive(Debug)]
pub(super) struct Agent {
    sandbox: Arc<Sandbox>,
}

impl Agent {
    pub(super) fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }

    fn sandbox(&self) -> Arc<Sandbox> {
        Arc::clone(&self.sandbox)
    }
}

/// Runs `work` to its end even when the caller's deadline passes or its connection breaks, which
/// drops the handler: half a container must not stay behind.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(AgentError::internal(format!("task: {error}"))),
    }
}

fn unimplemented<T>(what: &str) -> ttrpc::Result<T> {
    Err(AgentError::unsupported(format!("not implemented: {what}")).into())
}

#[async_trait]
impl AgentService for Agent {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox();
        finish(async move { container::create(&sandbox, request).await }).await?;
        Ok(Empty::new())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        finish(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox();
        finish(async move {
            sandbox
                .remove_container(&request.container_id, request.timeout)
                .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox();
        finish(async move { container::exec(&sandbox, request).await }).await?;
        Ok(Empty::new())
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        container::signal(&self.sandbox, &request)?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let status = container::wait(&self.sandbox, &request).await?;
        Ok(WaitProcessResponse {
            status,
            ..Default::default()
        })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        container::update(&self.sandbox, request).await?;
        Ok(Empty::new())
    }

    async fn update_ephemeral_mounts(
        &self,
        _: &TtrpcContext,
        request: UpdateEphemeralMountsRequest,
    ) -> ttrpc::Result<Empty> {
        for storage in request.storages {
            self.sandbox.storages.update(storage).await?;
        }
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: StatsContainerRequest,
    ) -> ttrpc::Result<StatsContainerResponse> {
        Ok(container::stats(&self.sandbox, &request)?)
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> ttrpc::Result<Empty> {
        container::freeze(&self.sandbox, &request.container_id, true).await?;
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> ttrpc::Result<Empty> {
        container::freeze(&self.sandbox, &request.container_id, false).await?;
        Ok(Empty::new())
    }

    async fn remove_stale_virtiofs_share_mounts(
        &self,
        _: &TtrpcContext,
        _: RemoveStaleVirtiofsShareMountsRequest,
    ) -> ttrpc::Result<Empty> {
        blocking(storage::remove_stale).await?;
        Ok(Empty::new())
    }

    async fn get_diagnostic_data(
        &self,
        _: &TtrpcContext,
        request: GetDiagnosticDataRequest,
    ) -> ttrpc::Result<GetDiagnosticDataResponse> {
        let sandbox = self.sandbox();
        let data = blocking(move || container::termination_log(&sandbox, &request)).await?;
        Ok(GetDiagnosticDataResponse {
            data,
            ..Default::default()
        })
    }

    async fn write_stdin(
        &self,
        _: &TtrpcContext,
        request: WriteStreamRequest,
    ) -> ttrpc::Result<WriteStreamResponse> {
        let len = container::write_stdin(&self.sandbox, &request).await?;
        Ok(WriteStreamResponse {
            len,
            ..Default::default()
        })
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        request: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        let data = container::read(&self.sandbox, &request, Output::Stdout).await?;
        Ok(ReadStreamResponse {
            data,
            ..Default::default()
        })
    }

    async fn read_stderr(
        &self,
        _: &TtrpcContext,
        request: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        let data = container::read(&self.sandbox, &request, Output::Stderr).await?;
        Ok(ReadStreamResponse {
            data,
            ..Default::default()
        })
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: CloseStdinRequest,
    ) -> ttrpc::Result<Empty> {
        container::close_stdin(&self.sandbox, &request).await?;
        Ok(Empty::new())
    }

    async fn tty_win_resize(
        &self,
        _: &TtrpcContext,
        request: TtyWinResizeRequest,
    ) -> ttrpc::Result<Empty> {
        container::resize(&self.sandbox, &request)?;
        Ok(Empty::new())
    }

    async fn update_interface(
        &self,
        _: &TtrpcContext,
        request: UpdateInterfaceRequest,
    ) -> ttrpc::Result<Interface> {
        let patience = self.sandbox.hotplug_timeout;
        let interface = request.interface.get_or_default();
        Ok(network::update_interface(interface, patience).await?)
    }

    async fn update_routes(
        &self,
        _: &TtrpcContext,
        request: UpdateRoutesRequest,
    ) -> ttrpc::Result<Routes> {
        let routes = network::update_routes(&request.routes.get_or_default().Routes)?;
        Ok(Routes {
            Routes: routes,
            ..Default::default()
        })
    }

    async fn list_interfaces(
        &self,
        _: &TtrpcContext,
        _: ListInterfacesRequest,
    ) -> ttrpc::Result<Interfaces> {
        Ok(Interfaces {
            Interfaces: network::list_interfaces()?,
            ..Default::default()
        })
    }

    async fn list_routes(&self, _: &TtrpcContext, _: ListRoutesRequest) -> ttrpc::Result<Routes> {
        Ok(Routes {
            Routes: network::list_routes()?,
            ..Default::default()
        })
    }

    async fn add_arp_neighbors(
        &self,
        _: &TtrpcContext,
        request: AddARPNeighborsRequest,
    ) -> ttrpc::Result<Empty> {
        network::add_neighbours(&request.neighbors.get_or_default().ARPNeighbors)?;
        Ok(Empty::new())
    }

    async fn get_ip_tables(
        &self,
        _: &TtrpcContext,
        request: GetIPTablesRequest,
    ) -> ttrpc::Result<GetIPTablesResponse> {
        let sandbox = self.sandbox();
        let data = finish(async move { iptables::get(&sandbox.reaper, request.is_ipv6).await });
        Ok(GetIPTablesResponse {
            data: data.await?,
            ..Default::default()
        })
    }

    async fn set_ip_tables(
        &self,
        _: &TtrpcContext,
        request: SetIPTablesRequest,
    ) -> ttrpc::Result<SetIPTablesResponse> {
        let sandbox = self.sandbox();
        let data = finish(async move { iptables::set(&sandbox.reaper, &request).await });
        Ok(SetIPTablesResponse {
            data: data.await?,
            ..Default::default()
        })
    }

    async fn get_metrics(&self, _: &TtrpcContext, _: GetMetricsRequest) -> ttrpc::Result<Metrics> {
        Ok(Metrics {
            metrics: metrics::text(),
            ..Default::default()
        })
    }

    async fn mem_agent_memcg_set(
        &self,
        _: &TtrpcContext,
        _: MemAgentMemcgConfig,
    ) -> ttrpc::Result<Empty> {
        unimplemented("this agent has no mem-agent")
    }

    async fn mem_agent_compact_set(
        &self,
        _: &TtrpcContext,
        _: MemAgentCompactConfig,
    ) -> ttrpc::Result<Empty> {
        unimplemented("this agent has no mem-agent")
    }

    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox();
        finish(async move { sandbox.create(request).await }).await?;
        Ok(Empty::new())
    }

    async fn destroy_sandbox(
        &self,
        _: &TtrpcContext,
        _: DestroySandboxRequest,
    ) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox();
        finish(async move { sandbox.destroy().await }).await?;
        Ok(Empty::new())
    }

    async fn online_cpu_mem(
        &self,
        _: &TtrpcContext,
        request: OnlineCPUMemRequest,
    ) -> ttrpc::Result<Empty> {
        guest::online(&request, self.sandbox.hotplug_timeout).await?;
        Ok(Empty::new())
    }

    async fn reseed_random_dev(
        &self,
        _: &TtrpcContext,
        request: ReseedRandomDevRequest,
    ) -> ttrpc::Result<Empty> {
        guest::reseed(&request.data)?;
        Ok(Empty::new())
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        request: GuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetailsResponse> {
        Ok(guest::details(&request)?)
    }

    async fn mem_hotplug_by_probe(
        &self,
        _: &TtrpcContext,
        _: MemHotplugByProbeRequest,
    ) -> ttrpc::Result<Empty> {
        unimplemented("the guest kernel learns of memory from the machine, not from probing")
    }

    async fn set_guest_date_time(
        &self,
        _: &TtrpcContext,
        request: SetGuestDateTimeRequest,
    ) -> ttrpc::Result<Empty> {
        guest::set_clock(&request)?;
        Ok(Empty::new())
    }

    async fn copy_file(&self, _: &TtrpcContext, request: CopyFileRequest) -> ttrpc::Result<Empty> {
        blocking(move || files::copy(&request)).await?;
        Ok(Empty::new())
    }

    async fn get_oom_event(
        &self,
        _: &TtrpcContext,
        _: GetOOMEventRequest,
    ) -> ttrpc::Result<OOMEvent> {
        let container_id = self.sandbox.next_oom().await;
        Ok(OOMEvent {
            container_id,
            ..Default::default()
        })
    }

    async fn add_swap(&self, _: &TtrpcContext, _: AddSwapRequest) -> ttrpc::Result<Empty> {
        unimplemented("the guest kernel has no swap")
    }

    async fn add_swap_path(&self, _: &TtrpcContext, _: AddSwapPathRequest) -> ttrpc::Result<Empty> {
        unimplemented("the guest kernel has no swap")
    }

    async fn get_volume_stats(
        &self,
        _: &TtrpcContext,
        request: VolumeStatsRequest,
    ) -> ttrpc::Result<VolumeStatsResponse> {
        Ok(blocking(move || volumes::stats(&request.volume_guest_path)).await?)
    }

    async fn resize_volume(
        &self,
        _: &TtrpcContext,
        request: ResizeVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let patience = self.sandbox.hotplug_timeout;
        let resize = volumes::resize(request.volume_guest_path, request.size, patience);
        finish(resize).await?;
        Ok(Empty::new())
    }

    async fn set_policy(&self, _: &TtrpcContext, _: SetPolicyRequest) -> ttrpc::Result<Empty> {
        unimplemented("this agent has no policy engine")
    }
}
