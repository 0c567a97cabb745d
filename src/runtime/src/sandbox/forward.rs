// SPDX-License-Identifier: Apache-2.0
//! Connections to the loopback interface of the pod's namespace, passed on to the guest's own: what
//! `kubectl port-forward` asks for. Servers hear them as if the client were in the pod, whatever
//! address they listen at.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio::{select, spawn};
use tracing::{debug, warn};

use super::Sandbox;
use super::dial::{DIAL_TIMEOUT, dial, read_line};
use crate::error::{Context, Kind, Result, ShimError};
use crate::network::{Loopback, Network};

/// The agent's vsock port for streams to TCP ports of the guest, as `agent.forward_vport` says.
pub(super) const FORWARD_PORT: u32 = 1028;

/// What the agent says once it is connected.
const CONNECTED: &str = "OK";

/// Before the next try where no connection can be taken: there are too many open files, say.
const PAUSE: Duration = Duration::from_millis(100);

/// Who takes the connections. Needs no process and no thread, and costs two open files.
#[derive(Debug)]
pub(super) struct Forwarder {
    listener: TcpListener,
    _lookup: OwnedFd,
    vsock: PathBuf,
}

impl Forwarder {
    /// Begins to take connections; must be called in the runtime. A host that can't do it runs its
    /// pods without.
    pub(super) fn new(network: &Network, vsock: PathBuf) -> Option<Self> {
        let listen = |loopback: Loopback| {
            io::Result::Ok(Self {
                listener: TcpListener::from_std(loopback.listener)?,
                _lookup: loopback.lookup,
                vsock,
            })
        };
        network
            .loopback()
            .and_then(listen)
            .inspect_err(|error| warn!(%error, "ports of the pod can't be forwarded"))
            .ok()
    }

    async fn serve(self) {
        let vsock: Arc<Path> = self.vsock.into();
        loop {
            let (client, port) = match self.listener.accept().await {
                Ok((client, _)) => match client.local_addr() {
                    Ok(address) => (client, address.port()),
                    // It is gone again.
                    Err(_) => continue,
                },
                Err(error) => {
                    debug!(%error, "no connection taken");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            let vsock = Arc::clone(&vsock);
            spawn(async move {
                if let Err(error) = forward(client, port, &vsock).await {
                    debug!(port, error = error.chain(), "not forwarded");
                }
            });
        }
    }
}

impl Sandbox {
    /// Forwards connections until the machine ends.
    pub(crate) async fn forward_ports(self: Arc<Self>) {
        let forwarder = self.forwarder.lock().await.take();
        if let Some(forwarder) = forwarder {
            select! {
                _ = self.ended() => {}
                () = forwarder.serve() => {}
            }
        }
    }
}

async fn forward(mut client: TcpStream, port: u16, vsock: &Path) -> Result<()> {
    let context = || format!("forward to port {port}");
    let connected = async {
        let server = dial(vsock, FORWARD_PORT).await?;
        timeout(DIAL_TIMEOUT, connect(server, port))
            .await
            .context(Kind::DeadlineExceeded, context)?
    };
    let mut server = match connected.await {
        Ok(server) => server,
        Err(error) => {
            // A reset is the client's error; an ordinary end would be an empty answer.
            client.set_zero_linger().internal(context)?;
            return Err(error);
        }
    };
    copy_bidirectional(&mut client, &mut server)
        .await
        .map(drop)
        .internal(context)
}

/// Has the agent connect the stream to a port.
async fn connect(mut stream: UnixStream, port: u16) -> Result<UnixStream> {
    let context = || format!("connect to port {port} of the guest");
    stream
        .write_all(format!("{port}\n").as_bytes())
        .await
        .context(Kind::Unavailable, context)?;
    let answer = read_line(&mut stream)
        .await
        .context(Kind::Unavailable, context)?;
    if answer != CONNECTED {
        return Err(ShimError::new(
            Kind::Unavailable,
            format!("{}: {answer}", context()),
        ));
    }
    Ok(stream)
}
