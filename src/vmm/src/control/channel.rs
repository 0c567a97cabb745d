// SPDX-License-Identifier: Apache-2.0
//! A message channel over a `SOCK_SEQPACKET` Unix socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// A message's longest encoding, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// The most files beside one message; the kernel's own limit is 253 (`SCM_MAX_FD`).
const MAX_FILES: usize = 250;

/// Why a message could not be sent or received.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The other side has closed its end.
    #[error("the control channel is closed")]
    Closed,
    /// The system call failed.
    #[error("the control channel failed")]
    Io(#[from] io::Error),
    /// The packet is not a message of this protocol.
    #[error("the control channel carried no valid message")]
    Format(#[from] postcard::Error),
    /// The packet or its list of files did not fit.
    #[error("a control message was cut off")]
    Truncated,
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::Io(other.into()),
        }
    }
}

/// One end of the channel. Sending and receiving take `&self`: packets don't mix, so one thread
/// may send while another receives.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Takes a connected `SOCK_SEQPACKET` socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends a message with its files.
    ///
    /// # Errors
    /// The other side is gone, the message is too large, or the call failed.
    pub fn send<M: Serialize>(
        &self,
        message: &M,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.send_with(message, files, SendFlags::empty())
    }

    /// Sends a message with its files if the other side has room for it; never waits.
    ///
    /// # Errors
    /// As for `send`; with no room it is `ChannelError::Io` of kind `WouldBlock`.
    pub fn try_send<M: Serialize>(
        &self,
        message: &M,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.send_with(message, files, SendFlags::DONTWAIT)
    }

    fn send_with<M: Serialize>(
        &self,
        message: &M,
        files: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), ChannelError> {
        let bytes = postcard::to_stdvec(message)?;
        if bytes.len() > MAX_MESSAGE || files.len() > MAX_FILES {
            return Err(ChannelError::Truncated);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(ChannelError::Truncated);
        }
        rustix::io::retry_on_intr(|| {
            sendmsg(
                &self.socket,
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                flags | SendFlags::NOSIGNAL,
            )
        })?;
        Ok(())
    }

    /// Waits for a message; its files come close-on-exec.
    ///
    /// # Errors
    /// The other side is gone, the packet isn't a message, or the call failed.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        let mut files = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(ChannelError::Truncated);
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        let packet = bytes.get(..received.bytes).ok_or(ChannelError::Truncated)?;
        Ok((postcard::from_bytes(packet)?, files))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::control::{Event, Request};

    fn pair() -> (Channel, Channel) {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (Channel::new(one), Channel::new(other))
    }

    #[test]
    fn a_message_arrives_with_its_files() {
        let (one, other) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"kernel").unwrap();
        file.rewind().unwrap();
        one.send(&Event::Connection { port: 7 }, &[file.as_fd()])
            .unwrap();
        let (event, mut files): (Event, _) = other.receive().unwrap();
        assert_eq!(event, Event::Connection { port: 7 });
        let mut text = String::new();
        File::from(files.remove(0))
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "kernel");
    }

    #[test]
    fn a_closed_end_is_told_apart() {
        let (one, other) = pair();
        drop(other);
        assert!(matches!(one.receive::<Event>(), Err(ChannelError::Closed)));
        assert!(matches!(
            one.send(&Request::Stop, &[]),
            Err(ChannelError::Closed)
        ));
    }

    #[test]
    fn bytes_that_are_no_message_are_refused() {
        let (one, other) = pair();
        one.send(&[0xff_u8; 9], &[]).unwrap();
        assert!(matches!(
            other.receive::<Request>(),
            Err(ChannelError::Format(_))
        ));
    }
}
