// SPDX-License-Identifier: Apache-2.0
//! What the agent says of itself: one call over the guest's vsock, by hand.
//!
//! A ttrpc message is a header (length and stream in big endian, kind, flags) and a protobuf
//! message: of a request, the fields 1 and 2 name service and method.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::pattern::read_line;

const SERVICE: &str = "grpc.AgentService";
const METHOD: &str = "GetMetrics";
const RESIDENT: &str = "kata_agent_total_rss";
const LIMIT: Duration = Duration::from_secs(10);

/// Resident bytes of the agent in the guest of a sandbox.
pub(crate) fn resident(sandbox: &str) -> Result<u64> {
    let socket = Path::new("/run/kata")
        .join(sandbox)
        .join("root/kata.hvsock");
    let text = metrics(&socket).with_context(|| format!("asking {}", socket.display()))?;
    let value = text.lines().find_map(|line| line.strip_prefix(RESIDENT));
    let value = value.with_context(|| format!("no {RESIDENT} among the metrics"))?;
    Ok(value.trim().parse()?)
}

fn metrics(socket: &Path) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"CONNECT 1024\n")?;
    let answer = read_line(&mut stream)?;
    ensure!(answer.starts_with("OK "), "{answer:?}");

    let mut request = Vec::new();
    for (tag, text) in [(0x0a, SERVICE), (0x12, METHOD)] {
        request.extend([tag, u8::try_from(text.len())?]);
        request.extend(text.as_bytes());
    }
    let mut message = u32::try_from(request.len())?.to_be_bytes().to_vec();
    message.extend([0, 0, 0, 1, 1, 0]);
    message.extend(request);
    stream.write_all(&message)?;

    let mut header = [0; 10];
    stream.read_exact(&mut header)?;
    let [a, b, c, d, ..] = header;
    let mut response = vec![0; usize::try_from(u32::from_be_bytes([a, b, c, d]))?];
    stream.read_exact(&mut response)?;
    // The metrics are lines of text within it.
    Ok(String::from_utf8_lossy(&response).into_owned())
}
