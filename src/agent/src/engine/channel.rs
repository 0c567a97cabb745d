// SPDX-License-Identifier: Apache-2.0
//! Messages with descriptors over a stream socket: a length, then the message (postcard). Both
//! ends are this binary, but a message from a process that already sees the container is checked
//! like any other input.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// A plan is at most as large as the request that it came in (4 MiB), but for the file names of
/// its encoding.
const LONGEST: usize = 8 << 20;
const HEADER: usize = 4;
/// Descriptors in one message: cgroup, pidfd, three streams, six namespaces.
const MOST_DESCRIPTORS: usize = 16;

/// The end of a helper or of the process that it made: calls wait.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends one message.
    pub(super) fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let frame = encode(message)?;
        let mut sent = send_some(self.0.as_fd(), &frame, descriptors)?;
        while let Some(rest) = frame.get(sent..).filter(|rest| !rest.is_empty()) {
            // Plain writes: a seccomp filter of the container may already be in force.
            let written = rustix::io::write(&self.0, rest)?;
            sent = sent.saturating_add(written);
        }
        Ok(())
    }

    /// Sends one message by `write(2)` alone, the one call that no filter forbids.
    pub(super) fn send_plain<T: Serialize>(&self, message: &T) -> io::Result<()> {
        let frame = encode(message)?;
        rustix::io::write(&self.0, &frame)
            .map(drop)
            .map_err(Into::into)
    }

    /// Receives one message; the end of the stream is an error here.
    pub(super) fn receive<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        let mut frame = Frame::default();
        loop {
            frame.receive_some(self.0.as_fd())?;
            if let Some(message) = frame.take()? {
                return Ok(message);
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sends one message from the event loop.
pub(super) async fn send<T: Serialize>(
    stream: &UnixStream,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let frame = encode(message)?;
    let mut sent = 0_usize;
    while let Some(rest) = frame.get(sent..).filter(|rest| !rest.is_empty()) {
        let along = if sent == 0 { descriptors } else { &[] };
        let some = stream
            .async_io(Interest::WRITABLE, || {
                send_some(stream.as_fd(), rest, along)
            })
            .await?;
        sent = sent.saturating_add(some);
    }
    Ok(())
}

/// Receives one message in the event loop; `None` at the end of the stream.
pub(super) async fn receive<T: DeserializeOwned>(
    stream: &UnixStream,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut frame = Frame::default();
    loop {
        let received = stream
            .async_io(Interest::READABLE, || frame.receive_some(stream.as_fd()))
            .await;
        match received {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && frame.is_empty() => {
                return Ok(None);
            }
            other => other?,
        }
        if let Some(message) = frame.take()? {
            return Ok(Some(message));
        }
    }
}

fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; HEADER];
    frame = postcard::to_extend(message, frame).map_err(io::Error::other)?;
    let length = frame.len().saturating_sub(HEADER);
    if length > LONGEST {
        return Err(io::Error::other("message is too long"));
    }
    let length = u32::try_from(length).map_err(io::Error::other)?;
    if let Some(header) = frame.first_chunk_mut::<HEADER>() {
        *header = length.to_le_bytes();
    }
    Ok(frame)
}

/// A message under way.
#[derive(Debug, Default)]
struct Frame {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Frame {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes are still to come; messages are never read past their end, since the next
    /// one's descriptors would come along.
    fn missing(&self) -> io::Result<usize> {
        let Some(header) = self.bytes.first_chunk::<HEADER>() else {
            return Ok(HEADER.saturating_sub(self.bytes.len()));
        };
        let length = usize::try_from(u32::from_le_bytes(*header)).map_err(io::Error::other)?;
        if length > LONGEST {
            return Err(io::Error::other("message is too long"));
        }
        Ok(length
            .saturating_add(HEADER)
            .saturating_sub(self.bytes.len()))
    }

    fn receive_some(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        let room = self.missing()?.min(buffer.len());
        let Some(room) = buffer.get_mut(..room) else {
            return Ok(());
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            socket,
            &mut [IoSliceMut::new(room)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                self.descriptors.extend(descriptors);
            }
        }
        if message.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes
            .extend(buffer.get(..message.bytes).unwrap_or_default());
        Ok(())
    }

    fn take<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        if self.missing()? > 0 {
            return Ok(None);
        }
        let Some(body) = self.bytes.get(HEADER..) else {
            return Ok(None);
        };
        let message = postcard::from_bytes(body).map_err(io::Error::other)?;
        self.bytes = Vec::new();
        Ok(Some((message, core::mem::take(&mut self.descriptors))))
    }
}

fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (Channel::new(a), Channel::new(b))
    }

    #[test]
    fn carries_large_messages_and_their_descriptors() {
        let (a, b) = pair();
        let text = "x".repeat(1 << 20);
        let expected = text.clone();
        let sender = thread::spawn(move || {
            let null = std::fs::File::open("/dev/null").unwrap();
            a.send(&text, &[null.as_fd(), null.as_fd()]).unwrap();
            a.send(&7_u32, &[null.as_fd()]).unwrap();
        });
        let (received, descriptors) = b.receive::<String>().unwrap();
        assert!(received == expected && descriptors.len() == 2);
        let (number, descriptors) = b.receive::<u32>().unwrap();
        assert_eq!((number, descriptors.len()), (7, 1));
        sender.join().unwrap();
    }

    #[test]
    fn refuses_a_length_that_no_message_has() {
        let (a, b) = pair();
        rustix::io::write(&a, &u32::MAX.to_le_bytes()).unwrap();
        b.receive::<u32>().unwrap_err();
    }

    #[test]
    fn a_closed_socket_is_an_error_to_the_waiting_end() {
        let (a, b) = pair();
        drop(a);
        let error = b.receive::<u32>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
