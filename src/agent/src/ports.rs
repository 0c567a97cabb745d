// SPDX-License-Identifier: Apache-2.0
//! Ports of the guest beside the service's, which the host connects to: log, debug console, streams
//! of processes.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::time::sleep;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};
use tracing::debug;

use crate::error::{Context as _, Result};

/// Before the next try where no connection can be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Where ports are: vsock; where the service is at a Unix socket, paths like its own, with `_PORT`
/// after them, as the host's ends of vsock have them.
#[derive(Debug)]
pub(crate) struct Ports {
    path: Option<PathBuf>,
}

/// A port that listens.
#[derive(Debug)]
pub(crate) enum Door {
    Vsock(VsockListener),
    Unix(UnixListener),
}

/// A connection.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Ports {
    /// Those beside the service at `server`.
    pub(crate) fn beside(server: &str) -> Self {
        Self {
            path: server.strip_prefix("unix://").map(PathBuf::from),
        }
    }

    /// Listens at `port`; must be called in the event loop.
    ///
    /// # Errors
    ///
    /// The kernel's: no vsock transport, or the port is taken.
    pub(crate) fn listen(&self, port: u32) -> Result<Door> {
        let context = || format!("listen at port {port}");
        let Some(path) = &self.path else {
            let address = VsockAddr::new(VMADDR_CID_ANY, port);
            return VsockListener::bind(address)
                .map(Door::Vsock)
                .context(context);
        };
        let mut path = path.clone().into_os_string();
        path.push(format!("_{port}"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(context),
            _ => UnixListener::bind(&path).map(Door::Unix).context(context),
        }
    }
}

impl Door {
    /// The next connection of the host's, and its port there. What comes from inside of the guest
    /// is a container's, and hears nothing.
    pub(crate) async fn next(&self) -> (Box<dyn Stream>, u32) {
        loop {
            match self.accept().await {
                Ok(taken) => return taken,
                Err(error) => {
                    debug!(%error, "no connection taken");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<(Box<dyn Stream>, u32)> {
        match self {
            Self::Vsock(listener) => loop {
                let (stream, peer) = listener.accept().await?;
                if peer.cid() == VMADDR_CID_HOST {
                    return Ok((Box::new(stream), peer.port()));
                }
            },
            Self::Unix(listener) => {
                let (stream, peer) = listener.accept().await?;
                let name = peer.as_pathname().and_then(|path| path.to_str());
                let port = name.and_then(|name| name.rsplit_once('_')?.1.parse().ok());
                Ok((Box::new(stream), port.unwrap_or(0)))
            }
        }
    }
}
