// SPDX-License-Identifier: Apache-2.0
//! `grpc.Health`.

use async_trait::async_trait;
use protocols::agent::health::health_check_response::ServingStatus;
use protocols::agent::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use protocols::agent::health_ttrpc;
use ttrpc::asynchronous::TtrpcContext;

use super::PROTOCOL_VERSION;

/// Answers as long as the event loop runs, which is what a health check asks.
#[derive(Debug)]
pub(super) struct Health;

#[async_trait]
impl health_ttrpc::Health for Health {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        Ok(HealthCheckResponse {
            status: ServingStatus::SERVING.into(),
            ..HealthCheckResponse::default()
        })
    }

    async fn version(
        &self,
        _: &TtrpcContext,
        _: CheckRequest,
    ) -> ttrpc::Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: PROTOCOL_VERSION.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..VersionCheckResponse::default()
        })
    }
}
