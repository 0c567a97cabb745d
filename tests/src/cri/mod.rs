// SPDX-License-Identifier: Apache-2.0
//! Kubernetes' container runtime interface, as a kubelet speaks it: gRPC over containerd's socket.
//!
//! A call is one HTTP/2 request on a connection of its own, so that calls of several threads never
//! wait for each other.

mod stream;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use h2::client;
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::time::timeout;

use crate::ctr::CRI_NAMESPACE;
use crate::process::one_line;

pub use stream::{Forward, Session};

/// Messages of the interface.
#[allow(
    clippy::all,
    clippy::restriction,
    clippy::pedantic,
    missing_docs,
    missing_debug_implementations,
    nonstandard_style,
    unreachable_pub,
    unused,
    reason = "generated"
)]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

/// For a call that is to end by itself. The dev VM is slow, and its host may be busy.
pub const LIMIT: Duration = Duration::from_secs(120);

/// gRPC's frame: a byte for compression and four for the length.
const PREFIX: usize = 5;

/// What a call that the service refused ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// gRPC's code.
    pub code: u32,
    /// The service's words.
    pub message: String,
}

impl Status {
    /// Fails unless the message is one line with each of `words` and no internals of programs.
    pub fn one_line(&self, words: &[&str]) -> Result<()> {
        one_line(&self.message, words)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "code {}: {}", self.code, self.message)
    }
}

impl std::error::Error for Status {}

/// A client of one containerd.
#[derive(Debug, Clone)]
pub struct Cri {
    address: PathBuf,
}

impl Cri {
    /// For the containerd that listens here.
    #[must_use]
    pub fn at(address: &Path) -> Self {
        Self {
            address: address.to_owned(),
        }
    }

    /// Calls a method of the runtime service. A refusal is an error whose cause is a [`Status`].
    pub fn runtime<T: Message>(&self, method: &str, request: &impl Message) -> Result<T> {
        self.call(&format!("/runtime.v1.RuntimeService/{method}"), request)
    }

    /// Calls a method of the image service.
    pub fn image<T: Message>(&self, method: &str, request: &impl Message) -> Result<T> {
        self.call(&format!("/runtime.v1.ImageService/{method}"), request)
    }

    /// Calls a method of containerd's own service for tasks, in the namespace of the CRI plugin.
    pub fn task<T: Message>(&self, method: &str, request: &impl Message) -> Result<T> {
        self.call(
            &format!("/containerd.services.tasks.v1.Tasks/{method}"),
            request,
        )
    }

    fn call<T: Message>(&self, path: &str, request: &impl Message) -> Result<T> {
        let bytes = request.write_to_bytes()?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let answer = runtime
            .block_on(async { timeout(LIMIT, unary(&self.address, path, &bytes)).await })
            .with_context(|| format!("{path}: no answer within {LIMIT:?}"))?
            .with_context(|| path.to_owned())?;
        T::parse_from_bytes(&answer).with_context(|| format!("{path}: a broken answer"))
    }
}

/// One request, one answer.
async fn unary(address: &Path, path: &str, message: &[u8]) -> Result<Vec<u8>> {
    let socket = UnixStream::connect(address)
        .await
        .with_context(|| format!("connecting to {}", address.display()))?;
    let (client, connection) = client::handshake(socket).await?;
    // It ends with the runtime, after the answer.
    tokio::spawn(connection);
    let mut client = client.ready().await?;
    let head = Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        // Read by containerd's own services.
        .header("containerd-namespace", CRI_NAMESPACE)
        .body(())?;
    let (answer, mut out) = client.send_request(head, false)?;
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len())?.to_be_bytes());
    frame.extend(message);
    out.send_data(frame.into(), true)?;

    let (head, mut body) = answer.await?.into_parts();
    ensure!(head.status.is_success(), "HTTP status {}", head.status);
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
    }
    // An answer of words only has them in its head.
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    refusal(&trailers)?;
    ensure!(bytes.len() >= PREFIX, "an answer without a message");
    Ok(bytes.split_off(PREFIX))
}

fn refusal(trailers: &HeaderMap) -> Result<()> {
    let text = |name: &str| trailers.get(name).map(|value| value.as_bytes());
    let Some(code) = text("grpc-status") else {
        bail!("an answer without a status");
    };
    let code = String::from_utf8_lossy(code).parse()?;
    if code == 0 {
        return Ok(());
    }
    Err(Status {
        code,
        message: percent_decoded(text("grpc-message").unwrap_or_default()),
    }
    .into())
}

/// gRPC writes everything but printable ASCII as `%XX`.
fn percent_decoded(text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, tail)) = rest.split_first() {
        let escaped = (*byte == b'%')
            .then(|| tail.split_at_checked(2))
            .flatten()
            .and_then(|(digits, tail)| {
                let digits = std::str::from_utf8(digits).ok()?;
                Some((u8::from_str_radix(digits, 16).ok()?, tail))
            });
        let (byte, tail) = escaped.unwrap_or((*byte, tail));
        bytes.push(byte);
        rest = tail;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read_from_the_trailers() {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        refusal(&trailers).unwrap();
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert("grpc-message", "no %22pod%22: 100%".parse().unwrap());
        let error = refusal(&trailers).unwrap_err();
        let status = error.downcast_ref::<Status>().unwrap();
        assert_eq!(
            (status.code, status.message.as_str()),
            (5, "no \"pod\": 100%")
        );
    }
}
