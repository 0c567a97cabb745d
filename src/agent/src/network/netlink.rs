// SPDX-License-Identifier: Apache-2.0
//! The kernel's routing socket (rtnetlink(7)): a header, a fixed structure, attributes. The kernel
//! answers within the call that sends a request, so nothing waits here but for events.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto,
    socket_with,
};
/// `struct nlmsghdr`: length, type, flags, sequence number, port.
const HEADER: usize = 16;
/// `struct rtattr`: length and type.
const ATTRIBUTE: usize = 4;
/// The kernel fills at most this much at once.
const BUFFER: usize = 64 << 10;
/// How often a listing is asked for again when the kernel changed it meanwhile.
const TRIES: usize = 5;

// linux/netlink.h
/// `NETLINK_ROUTE` is 0, which `socket(2)` takes for no protocol in particular.
const ROUTING: Option<Protocol> = None;
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const DUMP_INTERRUPTED: u16 = 0x10;
const DUMP: u16 = 0x300;
/// An object that exists is changed.
pub(super) const REPLACE: u16 = 0x100;
/// An object that does not exist is made.
pub(super) const CREATE: u16 = 0x400;
/// The object comes after others of the same key.
pub(super) const APPEND: u16 = 0x800;
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// A routing socket of the current network namespace.
#[derive(Debug)]
pub(super) struct Netlink(OwnedFd);

/// A message to the kernel or from it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Message {
    kind: u16,
    body: Vec<u8>,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            ROUTING,
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Has the kernel do something. `flags` are [`CREATE`] and the like.
    pub(super) fn request(&self, message: &Message, flags: u16) -> io::Result<()> {
        self.send(message, REQUEST | ACKNOWLEDGE | flags)?;
        loop {
            let received = self.receive()?;
            for (kind, _, body) in split(&received) {
                if kind == ERROR {
                    return status(body);
                }
            }
        }
    }

    /// Lists what matches `message`.
    pub(super) fn list(&self, message: &Message) -> io::Result<Vec<Message>> {
        for _ in 1..TRIES {
            if let Some(found) = self.list_once(message)? {
                return Ok(found);
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// `None` when the list changed while it was read.
    fn list_once(&self, message: &Message) -> io::Result<Option<Vec<Message>>> {
        self.send(message, REQUEST | DUMP)?;
        let mut found = Vec::new();
        let mut steady = true;
        loop {
            let received = self.receive()?;
            for (kind, flags, body) in split(&received) {
                steady &= flags & DUMP_INTERRUPTED == 0;
                match kind {
                    DONE => return Ok(steady.then_some(found)),
                    ERROR => status(body)?,
                    _ => found.push(Message {
                        kind,
                        body: body.to_vec(),
                    }),
                }
            }
        }
    }

    fn send(&self, message: &Message, flags: u16) -> io::Result<()> {
        let length = HEADER.saturating_add(message.body.len());
        let mut frame = Vec::with_capacity(length);
        frame.extend(
            u32::try_from(length)
                .map_err(io::Error::other)?
                .to_ne_bytes(),
        );
        frame.extend(message.kind.to_ne_bytes());
        frame.extend(flags.to_ne_bytes());
        // One request at a time: answers need no number to be told apart.
        frame.extend([0; 8]);
        frame.extend(&message.body);
        sendto(
            &self.0,
            &frame,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; BUFFER];
        let (length, _) = recv(&self.0, &mut *buffer, RecvFlags::empty())?;
        buffer.truncate(length);
        Ok(buffer)
    }
}

impl Message {
    /// A message of type `kind` (`RTM_*`) with its fixed structure.
    pub(super) fn new(kind: u16, fixed: &[u8]) -> Self {
        Self {
            kind,
            body: fixed.to_vec(),
        }
    }

    /// A message of the kernel's, whatever it holds.
    #[cfg(any(test, fuzzing))]
    pub(super) fn received(kind: u16, body: &[u8]) -> Self {
        Self {
            kind,
            body: body.to_vec(),
        }
    }

    /// The same object in a message of another type.
    pub(super) fn with_kind(mut self, kind: u16) -> Self {
        self.kind = kind;
        self
    }

    pub(super) fn kind(&self) -> u16 {
        self.kind
    }

    /// Appends an attribute. Those of this agent are names and addresses: far below 64 KiB.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = ATTRIBUTE.saturating_add(value.len());
        self.body
            .extend(u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }

    /// Byte `at` of the fixed structure; 0 past its end.
    pub(super) fn byte(&self, at: usize) -> u8 {
        self.body.get(at).copied().unwrap_or(0)
    }

    /// The number at byte `at` of the fixed structure; 0 past its end.
    pub(super) fn number(&self, at: usize) -> u32 {
        u32_at(&self.body, at).unwrap_or(0)
    }

    /// The attribute of type `kind`, after a fixed structure of `fixed` bytes.
    pub(super) fn attribute(&self, fixed: usize, kind: u16) -> Option<&[u8]> {
        attributes(self.body.get(fixed..)?)
            .find(|(found, _)| *found == kind)
            .map(|(_, value)| value)
    }
}

/// Attributes of a body, or of an attribute that holds others.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// The two upper bits are flags (`NLA_F_NESTED`).
    const KIND: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & KIND;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A number that is an attribute's value.
pub(super) fn number(value: &[u8]) -> Option<u32> {
    u32_at(value, 0)
}

/// Messages of a datagram: type, flags, body.
pub(super) fn split(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let (kind, flags) = (u16_at(bytes, 4)?, u16_at(bytes, 6)?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, flags, body))
    })
}

/// `struct nlmsgerr` begins with the negative error number, 0 for success.
fn status(body: &[u8]) -> io::Result<()> {
    match u32_at(body, 0).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back() {
        let message = Message::new(16, &[1, 0, 0, 0, 9, 0, 0, 0])
            .with(3, b"eth0\0")
            .with(4, &1500_u32.to_ne_bytes());
        assert_eq!(message.byte(0), 1);
        assert_eq!(message.number(4), 9);
        assert_eq!(message.attribute(8, 3), Some(&b"eth0\0"[..]));
        assert_eq!(message.attribute(8, 4).and_then(number), Some(1500));
        assert_eq!(message.attribute(8, 5), None);
    }

    #[test]
    fn lengths_that_lie_end_the_list() {
        for bytes in [&[2, 0, 1, 0][..], &[9, 0, 1, 0, 1], &[0, 0, 0, 0], &[4]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert_eq!(split(&[200, 0, 0, 0, 3, 0, 0, 0]).count(), 0);
    }

    #[test]
    fn answers_of_the_kernel() {
        assert!(status(&[0; 20]).is_ok());
        let error = status(&(-17_i32).to_ne_bytes()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(17));
        status(&[]).unwrap_err();
    }

    #[test]
    fn the_kernel_lists_loopback() {
        let netlink = Netlink::open().unwrap();
        // RTM_GETLINK, struct ifinfomsg
        let links = netlink.list(&Message::new(18, &[0; 16])).unwrap();
        let names: Vec<_> = links
            .iter()
            .filter_map(|link| link.attribute(16, 3))
            .collect();
        assert!(names.contains(&&b"lo\0"[..]), "{names:?}");
    }
}
