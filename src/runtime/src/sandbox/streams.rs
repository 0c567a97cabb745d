// SPDX-License-Identifier: Apache-2.0
//! Streams of processes that the monitor moves by itself (Kata's passfd): the runtime hands it a
//! pipe's end, and no byte crosses the runtime or a call to the agent.

use std::future::pending;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::dial::{DIAL_TIMEOUT, read_line};
use super::ended::Ended;
use crate::error::{Context, Kind, Result};

/// Where a guest's agent takes streams.
#[derive(Debug, Clone)]
pub(crate) struct StreamDoor {
    vsock: Arc<Path>,
    port: u32,
    /// The machine's end.
    machine: watch::Receiver<Option<Ended>>,
}

/// A stream between the guest and what was passed, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Passed {
    control: UnixStream,
    /// The name under which the agent knows it.
    pub(crate) port: u32,
    /// The machine's end.
    machine: watch::Receiver<Option<Ended>>,
}

impl StreamDoor {
    pub(super) fn new(vsock: &Path, port: u32, machine: watch::Receiver<Option<Ended>>) -> Self {
        Self {
            vsock: vsock.into(),
            port,
            machine,
        }
    }

    /// Has the monitor connect `file` to the agent: what a pipe's writing end takes is what the guest
    /// says, and the other way round.
    pub(crate) async fn pass(&self, file: impl AsFd) -> Result<Passed> {
        let context = || {
            let path = self.vsock.display();
            format!("pass a stream to the agent's port {} at {path}", self.port)
        };
        timeout(DIAL_TIMEOUT, self.hand_over(file.as_fd()))
            .await
            .context(Kind::DeadlineExceeded, context)?
            .context(Kind::Unavailable, context)
    }

    /// `passfd`, then the port with the descriptor; the answer names the host's port.
    async fn hand_over(&self, file: BorrowedFd<'_>) -> io::Result<Passed> {
        let mut control = UnixStream::connect(&self.vsock).await?;
        control.write_all(b"passfd\n").await?;
        let text = format!("{} keep", self.port);
        let sent = control
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                let files = [file];
                ancillary.push(SendAncillaryMessage::ScmRights(&files));
                let text = [IoSlice::new(text.as_bytes())];
                Ok(sendmsg(
                    &control,
                    &text,
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )?)
            })
            .await?;
        let line = read_line(&mut control).await?;
        let port = line.strip_prefix("OK ").and_then(|port| port.parse().ok());
        match port {
            Some(port) if sent == text.len() => Ok(Passed {
                control,
                port,
                machine: self.machine.clone(),
            }),
            _ => Err(io::Error::other(format!("passfd was answered by {line:?}"))),
        }
    }
}

impl Passed {
    /// Waits for the stream's end: the guest has closed it, and all that it said is in the pipe. At the
    /// latest it ends with the machine.
    pub(crate) async fn ended(&mut self) {
        let closed = async {
            // Nothing is said there any more; an error is an end as well.
            while matches!(self.control.read(&mut [0; 16]).await, Ok(1..)) {}
        };
        let over = async {
            if self.machine.wait_for(Option::is_some).await.is_err() {
                pending::<()>().await;
            }
        };
        tokio::select! {
            () = closed => {}
            () = over => {}
        }
    }

    #[cfg(test)]
    pub(crate) fn for_test(control: UnixStream) -> Self {
        let (_, machine) = watch::channel(None);
        Self {
            control,
            port: 1,
            machine,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSliceMut, Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
    use std::thread;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    /// The monitor's part, by the protocol's words; what was passed.
    fn take(listener: &UnixListener, answer: &str) -> (StdUnixStream, OwnedFd) {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = [0; 7];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"passfd\n");
        let mut text = [0; 32];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut window = [IoSliceMut::new(&mut text)];
        let message = recvmsg(&stream, &mut window, &mut ancillary, RecvFlags::empty()).unwrap();
        assert_eq!(&text[..message.bytes], b"1027 keep");
        let RecvAncillaryMessage::ScmRights(mut files) = ancillary.drain().next().unwrap() else {
            panic!("no descriptor");
        };
        stream.write_all(answer.as_bytes()).unwrap();
        (stream, files.next().unwrap())
    }

    #[tokio::test]
    async fn a_descriptor_is_passed_and_its_end_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let monitor = thread::spawn(move || {
            let (stream, file) = take(&listener, "OK 77\n");
            std::fs::File::from(file).write_all(b"words").unwrap();
            drop(stream);
            drop(take(&listener, "NO\n"));
        });
        let (_sender, machine) = watch::channel(None);
        let door = StreamDoor::new(&path, 1027, machine);
        let (mut reader, writer) = io::pipe().unwrap();
        let mut passed = door.pass(&writer).await.unwrap();
        assert_eq!(passed.port, 77);
        passed.ended().await;
        drop(writer);
        let mut all = String::new();
        reader.read_to_string(&mut all).unwrap();
        assert_eq!(all, "words");

        let error = door.pass(&reader).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.chain().contains("1027"), "{}", error.chain());
        monitor.join().unwrap();
    }
}
