// SPDX-License-Identifier: Apache-2.0
//! Connections into the guest.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Context, Kind, Result};

/// The longest line of an answer.
const MAX_LINE: usize = 256;

/// How long a connection to a listening agent may take.
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to a port of the agent.
pub(super) async fn dial(path: &Path, port: u32) -> Result<UnixStream> {
    let context = || format!("connect to the agent's port {port} at {}", path.display());
    timeout(DIAL_TIMEOUT, connect(path, port))
        .await
        .context(Kind::DeadlineExceeded, context)?
        .context(Kind::Unavailable, context)
}

/// Connects to a port of the guest over the hybrid vsock: `CONNECT port`, answered by `OK port`.
/// Where nobody listens there, the stream ends without an answer.
pub(crate) async fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let line = read_line(&mut stream).await?;
    if line.starts_with("OK ") {
        Ok(stream)
    } else {
        Err(io::Error::other(format!(
            "CONNECT was answered by {line:?}"
        )))
    }
}

/// The next line, byte by byte: what follows it is somebody else's.
pub(super) async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            _ if line.len() > MAX_LINE => return Err(io::Error::other("the answer is too long")),
            byte => line.push(byte),
        }
    }
}
