// SPDX-License-Identifier: Apache-2.0
//! The ttrpc server: services `grpc.AgentService` and `grpc.Health`.

mod files;
mod guest;
mod health;
mod iptables;
mod metrics;
mod readiness;
mod service;
mod volumes;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use protocols::agent::{agent_ttrpc, health_ttrpc};
use ttrpc::asynchronous::Server;

pub(crate) use readiness::Announcement;

use crate::error::{AgentError, Context as _, Result};
use crate::sandbox::Sandbox;
use crate::sys;

/// The version of the agent protocol, as Kata's agents of this protocol answer it.
pub(crate) const PROTOCOL_VERSION: &str = "0.0.1";

/// A socket that listens: connections queue in the kernel until the server serves them.
#[derive(Debug)]
pub(crate) enum Listener {
    /// vsock, made before anything else of the boot.
    Vsock(OwnedFd),
    /// A Unix socket, for tests on a host.
    Unix(String),
}

impl Listener {
    /// Listens at `vsock://CID:PORT` (CID -1: any) or `unix:///PATH`.
    ///
    /// # Errors
    ///
    /// An address of another form, or the kernel's reason.
    pub(crate) fn bind(address: &str) -> Result<Self> {
        if let Some(path) = address.strip_prefix("unix://") {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(AgentError::io(format!("remove {path:?}"), error));
                }
                _ => return Ok(Self::Unix(address.to_owned())),
            }
        }
        let (cid, port) = vsock_address(address)
            .ok_or_else(|| AgentError::invalid(format!("server address {address:?}")))?;
        let socket = sys::vsock::listen(cid, port).context(|| format!("listen at {address}"))?;
        Ok(Self::Vsock(socket))
    }

    /// Serves `sandbox` from now on.
    ///
    /// # Errors
    ///
    /// When the socket can't be served.
    pub(crate) async fn serve(self, sandbox: Arc<Sandbox>) -> Result<Server> {
        let agent = Arc::new(service::Agent::new(sandbox));
        let server = Server::new()
            .register_service(agent_ttrpc::create_agent_service(agent))
            .register_service(health_ttrpc::create_health(Arc::new(health::Health)));
        let bound = match self {
            Self::Vsock(socket) => sys::vsock::serve(server, socket),
            Self::Unix(address) => server.bind(&address),
        };
        let mut server = bound.map_err(|error| AgentError::internal(format!("server: {error}")))?;
        server
            .start()
            .await
            .map_err(|error| AgentError::internal(format!("server: {error}")))?;
        Ok(server)
    }
}

fn vsock_address(address: &str) -> Option<(u32, u32)> {
    let (cid, port) = address.strip_prefix("vsock://")?.split_once(':')?;
    let cid = match cid {
        "" | "-1" => libc::VMADDR_CID_ANY,
        cid => cid.parse().ok()?,
    };
    Some((cid, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_katas_addresses() {
        assert_eq!(vsock_address("vsock://-1:1024"), Some((u32::MAX, 1024)));
        assert_eq!(vsock_address("vsock://3:9"), Some((3, 9)));
        for wrong in ["vsock://1024", "tcp://1:2", "vsock://x:1", "vsock://-1:"] {
            assert_eq!(vsock_address(wrong), None, "{wrong}");
        }
    }
}
