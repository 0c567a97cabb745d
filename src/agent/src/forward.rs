// SPDX-License-Identifier: Apache-2.0
//! Streams from the host to TCP servers of the pod, which take them for clients beside them: what
//! `kubectl port-forward` asks for.
//!
//! A connection to the vsock port is one stream. The host says a port's number in a line; the answer
//! is the line `OK`, or one that says why not. Then the bytes flow, and each direction ends by
//! itself.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use tracing::debug;

use crate::error::{Context as _, Result};

/// How long the host may take to name a port.
const REQUEST: Duration = Duration::from_secs(10);

/// The digits of a port's number.
const MAX_DIGITS: usize = 5;

/// Before the next try where no connection can be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves the vsock port from now on; must be called in the event loop.
///
/// # Errors
///
/// The kernel's: no vsock transport, or the port is taken.
pub(crate) fn start(port: u32) -> Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .context(|| format!("listen at vsock port {port}"))?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(async move {
                        if let Err(error) = serve(stream).await {
                            debug!(%error, "stream not forwarded");
                        }
                    });
                }
                Err(error) => {
                    debug!(%error, "no stream taken");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    Ok(())
}

async fn serve(mut host: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let port = timeout(REQUEST, read_port(&mut host)).await??;
    let mut server = match connect(port).await {
        Ok(server) => server,
        Err(error) => {
            host.write_all(format!("{error}\n").as_bytes()).await?;
            return Err(error);
        }
    };
    host.write_all(b"OK\n").await?;
    copy_bidirectional(&mut host, &mut server).await?;
    Ok(())
}

/// The number in the first line, byte by byte: what follows it is the server's.
async fn read_port(host: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
    let mut digits = String::new();
    loop {
        match host.read_u8().await? {
            b'\n' => return digits.parse().map_err(io::Error::other),
            byte if byte.is_ascii_digit() && digits.len() < MAX_DIGITS => {
                digits.push(char::from(byte));
            }
            byte => {
                let what = format!("{byte:#x} after {digits:?} is no port's number");
                return Err(io::Error::other(what));
            }
        }
    }
}

/// Any bytes as the first line of a stream.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use std::pin::pin;
    use std::task::{Context, Waker};
    let mut host = bytes;
    // All is there, so that one poll is enough.
    let mut context = Context::from_waker(Waker::noop());
    let read = pin!(read_port(&mut host));
    assert!(read.poll(&mut context).is_ready());
}

/// A server may listen for one family only; clients try IPv4 first.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => Ok(stream),
        Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
            .await
            .map_err(|_| error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;

    use super::*;

    fn begin() -> (DuplexStream, JoinHandle<io::Result<()>>) {
        let (host, guest) = duplex(64);
        (host, tokio::spawn(serve(guest)))
    }

    #[tokio::test]
    async fn a_stream_reaches_a_server_of_either_family_and_each_direction_ends_by_itself() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).await.unwrap();
                stream.write_all(text.to_uppercase().as_bytes()).await
            });
            let (mut host, served) = begin();
            let request = format!("{port}\nearly and ");
            host.write_all(request.as_bytes()).await.unwrap();
            let mut answer = [0; 3];
            host.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"OK\n");
            host.write_all(b"late").await.unwrap();
            host.shutdown().await.unwrap();
            let mut text = String::new();
            host.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "EARLY AND LATE", "{address}");
            server.await.unwrap().unwrap();
            served.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn what_cannot_be_forwarded_ends_in_words_or_at_once() {
        // Bound and not listening: nobody else gets it.
        let taken = tokio::net::TcpSocket::new_v4().unwrap();
        taken.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = taken.local_addr().unwrap().port();
        let (mut host, served) = begin();
        host.write_all(format!("{port}\n").as_bytes())
            .await
            .unwrap();
        let mut text = String::new();
        host.read_to_string(&mut text).await.unwrap();
        assert!(text.contains("refused") && text.ends_with('\n'), "{text:?}");
        served.await.unwrap().unwrap_err();

        for wrong in ["eighty\n", "123456\n", "65536\n", "\n", "-1\n"] {
            let (mut host, served) = begin();
            // It may hang up before all is written.
            let _ = host.write_all(wrong.as_bytes()).await;
            let mut text = String::new();
            host.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "", "{wrong:?}");
            served.await.unwrap().unwrap_err();
        }
    }
}
