// SPDX-License-Identifier: Apache-2.0
//! A blocking netlink socket for requests of the family route (rtnetlink(7)), and one that hears
//! what changes.
//!
//! A socket belongs to the namespace in which it was opened, whichever thread uses it: opened
//! once, it makes further visits unnecessary.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// The kernel fills no more than this at once (netlink(7)).
const BUFFER: usize = 32 * 1024;

/// "The dump is inconsistent": something changed meanwhile.
const DUMP_INTERRUPTED: u16 = 0x10;

/// How often a dump is begun again.
const DUMP_ATTEMPTS: usize = 16;

/// The groups that tell of links, addresses and routes (`RTMGRP_*`).
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

/// A socket for requests.
#[derive(Debug)]
pub(super) struct Socket {
    file: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens it in the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            file: socket(SocketFlags::CLOEXEC, 0)?,
            sequence: 0,
        })
    }

    /// Asks for a change, and waits until it is made.
    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_ACK | flags)?;
        loop {
            for answer in self.receive()? {
                if let NetlinkPayload::Error(error) = answer.payload {
                    return error.code.map_or(Ok(()), |_| Err(error.to_io()));
                }
            }
        }
    }

    /// Lists objects.
    pub(super) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(list) = self.try_dump(message.clone())? {
                return Ok(list);
            }
        }
        Err(io::Error::other("the namespace changes all the time"))
    }

    fn try_dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        self.send(message, NLM_F_DUMP)?;
        let mut list = Vec::new();
        let mut consistent = true;
        loop {
            for answer in self.receive()? {
                consistent &= answer.header.flags & DUMP_INTERRUPTED == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => list.push(message),
                    NetlinkPayload::Done(_) => return Ok(consistent.then_some(list)),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(&self.file, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// The next messages that answer the last request.
    fn receive(&self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let mut buffer = Vec::with_capacity(BUFFER);
        let (_, length) = rustix::io::retry_on_intr(|| {
            recv(&self.file, spare_capacity(&mut buffer), RecvFlags::TRUNC)
        })?;
        if length > BUFFER {
            return Err(io::Error::other("a netlink message is too long"));
        }
        let mut messages = Vec::new();
        let mut rest = buffer.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(io::Error::other)?;
            let length = usize::try_from(message.header.length).map_err(io::Error::other)?;
            // Messages begin at multiples of four.
            let length = length.max(1).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            if message.header.sequence_number == self.sequence {
                messages.push(message);
            }
        }
        Ok(messages)
    }
}

/// A socket that becomes readable when links, addresses or routes have changed.
#[derive(Debug)]
pub(crate) struct Changes {
    file: OwnedFd,
}

impl Changes {
    /// Opens it in the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(Self {
            file: socket(flags, GROUPS)?,
        })
    }

    /// Whether there was any change since the last call. What it was is for a scan to say.
    pub(super) fn drain(&self) -> io::Result<bool> {
        let mut any = false;
        loop {
            let mut byte = [0_u8; 1];
            match recv(&self.file, &mut byte, RecvFlags::TRUNC) {
                Ok(_) => any = true,
                Err(Errno::AGAIN) => return Ok(any),
                // More has changed than the socket could hold.
                Err(Errno::NOBUFS) => any = true,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn socket(flags: SocketFlags, groups: u32) -> io::Result<OwnedFd> {
    let file = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&file, &SocketAddrNetlink::new(0, groups))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    #[test]
    fn links_are_listed() {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let links = Socket::open().unwrap().dump(&request).unwrap();
        let loopback = LinkAttribute::IfName("lo".to_owned());
        assert!(links.iter().any(|message| match message {
            RouteNetlinkMessage::NewLink(link) => link.attributes.contains(&loopback),
            _ => false,
        }));
    }

    #[test]
    fn a_refusal_is_an_error_with_its_number() {
        let mut link = LinkMessage::default();
        link.header.index = u32::MAX >> 1;
        let mut socket = Socket::open().unwrap();
        let error = socket
            .change(RouteNetlinkMessage::SetLink(link), 0)
            .unwrap_err();
        // Nobody but root gets as far as to the missing interface.
        assert!(
            matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)),
            "{error}"
        );
        // The socket goes on.
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        assert!(!socket.dump(&request).unwrap().is_empty());
    }
}
