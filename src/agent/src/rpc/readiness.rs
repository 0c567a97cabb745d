// SPDX-License-Identifier: Apache-2.0
//! Tells the host that the server listens, so that nobody needs to poll for it: one connection
//! to the port of `agent.ready_vport`, closed as soon as it stands.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::Interest;
use tokio::time::timeout;
use tracing::warn;

use crate::error::{Context as _, Result};
use crate::sys;

/// The host's answer takes microseconds; this only bounds a host that never answers.
const ANSWER: Duration = Duration::from_secs(10);

/// The announcement under way. It is sent before there is an event loop: from here on requests
/// queue in the kernel, and the host's way to the first one overlaps with the rest of the boot.
#[derive(Debug)]
pub(crate) struct Announcement {
    port: u32,
    call: Result<OwnedFd>,
}

impl Announcement {
    /// Calls `port` of the host.
    pub(crate) fn send(port: u32) -> Self {
        let call = sys::vsock::connect_host(port).context(|| "call the host");
        Self { port, call }
    }

    /// Hangs up once the host has answered. Nothing waits for that.
    pub(crate) fn finish(self) {
        let port = self.port;
        let watched = self.call.and_then(|call| {
            sys::watch::watch(call, Interest::WRITABLE).context(|| "watch the call")
        });
        match watched {
            Ok(call) => {
                tokio::spawn(async move {
                    if timeout(ANSWER, call.writable()).await.is_err() {
                        warn!(port, "the host does not answer the readiness call");
                    }
                });
            }
            Err(error) => warn!(port, error = error.line(), "readiness"),
        }
    }
}
