// SPDX-License-Identifier: Apache-2.0
//! As much of HTTP/1.1 (RFC 9112) as a socket needs on which a client asks once: a request with a
//! body of known length, an answer after which the connection closes.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The most that a request line and its headers take.
const MOST_HEAD: usize = 8 << 10;
/// The longest body.
const MOST_BODY: usize = 64 << 10;
/// What ends the head.
const END: &[u8] = b"\r\n\r\n";

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
}

impl Request {
    /// Reads one; a request that makes no sense is the reason why.
    ///
    /// # Errors
    /// The connection's own.
    pub(super) async fn read(
        stream: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Result<Self, String>> {
        let mut bytes = Vec::new();
        let head = loop {
            let end = bytes.windows(END.len()).position(|found| found == END);
            if end.unwrap_or(bytes.len()) > MOST_HEAD {
                return Ok(Err(format!("the head is longer than {MOST_HEAD} bytes")));
            }
            if let Some(end) = end {
                break end;
            }
            if stream.read_buf(&mut bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        let mut body = bytes.split_off(head.saturating_add(END.len()));
        let (method, path, length) = match parse(&bytes) {
            Ok(head) => head,
            Err(reason) => return Ok(Err(reason)),
        };
        while body.len() < length {
            if stream.read_buf(&mut body).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        body.truncate(length);
        Ok(Ok(Self { method, path, body }))
    }
}

/// Method, path and length of the body.
fn parse(head: &[u8]) -> Result<(String, String, usize), String> {
    let head = str::from_utf8(head).map_err(|_| "the head is no text".to_owned())?;
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default();
    let mut words = line.split(' ');
    let (Some(method), Some(path), Some("HTTP/1.1" | "HTTP/1.0"), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(format!("{line:?} is no request line"));
    };
    let mut length = 0;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err("bodies in chunks are not taken".to_owned());
        }
        if name.eq_ignore_ascii_case("content-length") {
            length = value
                .trim()
                .parse()
                .ok()
                .filter(|length| *length <= MOST_BODY)
                .ok_or_else(|| format!("a body of {} bytes is not taken", value.trim()))?;
        }
    }
    Ok((method.to_owned(), path.to_owned(), length))
}

/// Writes the answer.
///
/// # Errors
/// The connection's own.
pub(super) async fn answer(
    stream: &mut (impl AsyncWrite + Unpin),
    status: u16,
    body: &str,
) -> io::Result<()> {
    let reason = if status == 200 { "OK" } else { "Error" };
    let head = format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(mut bytes: &[u8]) -> io::Result<Result<Request, String>> {
        Request::read(&mut bytes).await
    }

    #[tokio::test]
    async fn a_request_has_a_path_and_a_body() {
        let request = b"POST /a HTTP/1.1\r\nHost: x\r\ncontent-length: 3\r\n\r\nabcdef";
        let request = read(request).await.unwrap().unwrap();
        assert_eq!((&*request.method, &*request.path), ("POST", "/a"));
        assert_eq!(request.body, b"abc");
        let request = read(b"GET / HTTP/1.0\r\n\r\n").await.unwrap().unwrap();
        assert!(request.body.is_empty());
    }

    #[tokio::test]
    async fn what_is_no_request_is_told_why() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MOST_HEAD));
        for (bytes, word) in [
            ("GET /\r\n\r\n", "no request line"),
            ("GET / HTTP/2\r\n\r\n", "no request line"),
            ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "-1"),
            ("GET / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", "65537"),
            (
                "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                "chunks",
            ),
            (long.as_str(), "longer"),
        ] {
            let reason = read(bytes.as_bytes()).await.unwrap().unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
        for cut in [
            "GET / HTTP/1.1\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 2\r\n\r\n1",
        ] {
            assert!(read(cut.as_bytes()).await.is_err());
        }
    }
}
