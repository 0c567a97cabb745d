// SPDX-License-Identifier: Apache-2.0
//! The service's connection as bytes: those of a call, and some that no client of ours would send.

use std::path::Path;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::rig::{Rig, eventually};

/// A frame of ttrpc begins with length, stream (both of big ends), type and flags.
const HEADER: usize = 10;
const REQUEST: u8 = 1;

/// Sends bytes; the result is what comes back until there are `length` or the end.
async fn exchange(socket: &Path, bytes: &[u8], length: usize) -> Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).await.context("connect")?;
    // It may hang up before it has all.
    let _ = stream.write_all(bytes).await;
    let mut answer = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match stream.read(&mut answer[filled..]).await {
            Ok(0) | Err(_) => break,
            Ok(more) => filled += more,
        }
    }
    answer.truncate(filled);
    Ok(answer)
}

fn frame(stream: u32, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = (body.len() as u32).to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, 0]);
    frame.extend(body);
    frame
}

/// A call of Health.Check, by hand: service 1, method 2, payload 3 (which is empty).
const CHECK: &[u8] = b"\x0a\x0bgrpc.Health\x12\x05Check";

#[tokio::test]
async fn a_call_is_these_bytes() -> Result<()> {
    let rig = Rig::bare().await?;
    let socket = rig.share("agent.sock");
    // The response: status 1 with nothing in it or left out, payload 2 with status 1 SERVING.
    let answer = exchange(&socket, &frame(1, REQUEST, CHECK), HEADER + 4 + 2).await?;
    let header = [0, 0, 0, (answer.len() - HEADER) as u8, 0, 0, 0, 1, 2, 0];
    assert_eq!(answer[..HEADER], header);
    let payload: &[u8] = b"\x12\x02\x08\x01";
    assert!(answer[HEADER..].ends_with(payload), "{answer:x?}");
    Ok(())
}

#[tokio::test]
async fn bytes_that_are_no_call_harm_nobody() -> Result<()> {
    let rig = Rig::bare().await?;
    let socket = rig.share("agent.sock");
    let mut unknown = CHECK.to_vec();
    unknown[2..13].copy_from_slice(b"grpc.Nobody");
    let huge = {
        let mut frame = frame(1, REQUEST, b"");
        frame[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        frame
    };
    // One byte more than the protocol allows, all of it sent.
    let large = frame(1, REQUEST, &vec![0; (4 << 20) + 1]);
    for (what, bytes, is_answered) in [
        ("no frame", b"GET / HTTP/1.1\r\n\r\n".to_vec(), false),
        ("half a header", vec![0, 0, 0], false),
        ("no request", frame(1, REQUEST, &[0xff; 100]), true),
        ("a service that is none", frame(1, REQUEST, &unknown), true),
        ("an answer", frame(1, 2, CHECK), false),
        ("a type that is none", frame(1, 77, CHECK), false),
        ("a huge length", huge, false),
        ("a large request", large, true),
    ] {
        let answer = if is_answered {
            exchange(&socket, &bytes, HEADER).await?
        } else {
            let mut stream = UnixStream::connect(&socket).await?;
            let _ = stream.write_all(&bytes).await;
            Vec::new()
        };
        assert_eq!(answer.is_empty(), !is_answered, "{what}");
        let check = protocols::agent::health::CheckRequest::default();
        let health = rig.health.check(crate::rig::ctx(), &check).await;
        assert_eq!(health?.status.value(), 1, "{what}");
    }
    // None of the broken connections is kept.
    eventually("descriptors are given back", async || {
        Ok(rig.descriptors()? < 40)
    })
    .await
}
