// SPDX-License-Identifier: Apache-2.0
//! Packet headers (virtio 1.2, section 5.10.6) and the guest's buffers that hold packets.
//!
//! A header is copied out of guest memory once; all that follows looks at the copy, so that the
//! guest can't change what was checked.

use std::ops::Deref;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Length of a header on the wire, in bytes.
pub(super) const HEADER_LEN: usize = 44;

/// The most bytes of data that a packet may carry, in either direction.
pub(super) const MAX_DATA: usize = 64 * 1024;

/// The most pieces of guest memory that a packet may be spread over: what one system call takes.
const MAX_SLICES: usize = 1024;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type of socket here.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    ReadWrite,
    CreditUpdate,
    CreditRequest,
}

impl Operation {
    fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::ReadWrite => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    fn from_code(code: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::ReadWrite,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|operation| operation.code() == code)
    }
}

/// The directions of a stream that its sender has closed: the flags of a SHUTDOWN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Closed {
    /// The sender will take no more data.
    pub(super) receive: bool,
    /// The sender will send no more data.
    pub(super) send: bool,
}

impl Closed {
    pub(super) const BOTH: Self = Self {
        receive: true,
        send: true,
    };

    const RECEIVE: u32 = 1;
    const SEND: u32 = 2;

    pub(super) fn from_flags(flags: u32) -> Self {
        Self {
            receive: flags & Self::RECEIVE != 0,
            send: flags & Self::SEND != 0,
        }
    }

    pub(super) fn flags(self) -> u32 {
        let receive = if self.receive { Self::RECEIVE } else { 0 };
        let send = if self.send { Self::SEND } else { 0 };
        receive | send
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self {
            receive: self.receive || other.receive,
            send: self.send || other.send,
        }
    }
}

/// A packet's header, in the host's byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data after the header.
    pub(super) len: u32,
    pub(super) socket_type: u16,
    /// As on the wire; `operation()` gives its meaning.
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.next()),
            dst_cid: u64::from_le_bytes(fields.next()),
            src_port: u32::from_le_bytes(fields.next()),
            dst_port: u32::from_le_bytes(fields.next()),
            len: u32::from_le_bytes(fields.next()),
            socket_type: u16::from_le_bytes(fields.next()),
            op: u16::from_le_bytes(fields.next()),
            flags: u32::from_le_bytes(fields.next()),
            buf_alloc: u32::from_le_bytes(fields.next()),
            fwd_cnt: u32::from_le_bytes(fields.next()),
        }
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend_from_slice(&self.src_cid.to_le_bytes());
        bytes.extend_from_slice(&self.dst_cid.to_le_bytes());
        bytes.extend_from_slice(&self.src_port.to_le_bytes());
        bytes.extend_from_slice(&self.dst_port.to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        bytes.extend_from_slice(&self.socket_type.to_le_bytes());
        bytes.extend_from_slice(&self.op.to_le_bytes());
        bytes.extend_from_slice(&self.flags.to_le_bytes());
        bytes.extend_from_slice(&self.buf_alloc.to_le_bytes());
        bytes.extend_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    pub(super) fn operation(&self) -> Option<Operation> {
        Operation::from_code(self.op)
    }

    pub(super) fn with_operation(self, operation: Operation) -> Self {
        Self {
            op: operation.code(),
            ..self
        }
    }

    /// The RST that answers this packet.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: TYPE_STREAM,
            ..Self::default()
        }
        .with_operation(Operation::Reset)
    }
}

/// Cuts a header into its fields.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.0.split_first_chunk() else {
            return [0; N];
        };
        self.0 = rest;
        *field
    }
}

/// What is wrong with a descriptor chain that should hold a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum PacketError {
    #[error("a buffer lies outside of the guest's memory")]
    Memory,
    #[error("the chain is too short for what it should hold")]
    TooShort,
    #[error("the packet is longer than {MAX_DATA} bytes or in too many pieces")]
    TooLong,
}

/// The guest memory behind one descriptor chain, in order: first the header's bytes, then the
/// data's.
#[derive(Debug, Default)]
pub(super) struct Buffers<'a> {
    slices: Vec<VolatileSlice<'a>>,
}

impl<'a> Buffers<'a> {
    /// The parts of `chain` that the device reads.
    pub(super) fn readable<M>(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<Self, PacketError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let parts = chain.readable().map(|part| (part.addr(), part.len()));
        Self::collect(memory, parts, Permissions::Read)
    }

    /// The parts of `chain` that the device writes.
    pub(super) fn writable<M>(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<Self, PacketError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let parts = chain.writable().map(|part| (part.addr(), part.len()));
        Self::collect(memory, parts, Permissions::Write)
    }

    fn collect(
        memory: &'a GuestMemoryMmap,
        parts: impl Iterator<Item = (vm_memory::GuestAddress, u32)>,
        access: Permissions,
    ) -> Result<Self, PacketError> {
        let mut room = HEADER_LEN.saturating_add(MAX_DATA);
        let mut slices = Vec::with_capacity(2);
        for (address, len) in parts {
            let len = usize::try_from(len).map_or(room, |len| len.min(room));
            if len == 0 {
                continue;
            }
            for slice in memory
                .get_slices(address, len, access)
                .map_err(|_| PacketError::Memory)?
            {
                slices.push(slice.map_err(|_| PacketError::Memory)?);
            }
            if slices.len() > MAX_SLICES {
                return Err(PacketError::TooLong);
            }
            room = room.saturating_sub(len);
        }
        Ok(Self { slices })
    }

    pub(super) fn slices(&self) -> &[VolatileSlice<'a>] {
        &self.slices
    }

    /// Bytes in all.
    pub(super) fn len(&self) -> usize {
        total(&self.slices)
    }

    /// Cuts off the first `len` bytes and gives them; `self` keeps the rest.
    pub(super) fn split_front(&mut self, len: usize) -> Result<Buffers<'a>, PacketError> {
        let mut front = Vec::with_capacity(1);
        let mut rest = Vec::with_capacity(self.slices.len());
        let mut wanted = len;
        for slice in self.slices.drain(..) {
            let here = wanted.min(slice.len());
            let (head, tail) = slice.split_at(here).map_err(|_| PacketError::TooShort)?;
            wanted = wanted.saturating_sub(here);
            if !head.is_empty() {
                front.push(head);
            }
            if !tail.is_empty() {
                rest.push(tail);
            }
        }
        self.slices = rest;
        if wanted > 0 {
            return Err(PacketError::TooShort);
        }
        Ok(Buffers { slices: front })
    }

    /// Copies the bytes out, as many as `bytes` takes.
    fn copy_to(&self, bytes: &mut [u8]) {
        let mut rest = bytes;
        for slice in &self.slices {
            let copied = slice.copy_to(rest);
            rest = rest.get_mut(copied..).unwrap_or_default();
        }
    }

    /// Copies `bytes` in, as many as there is room for.
    pub(super) fn copy_from(&self, bytes: &[u8]) {
        let mut rest = bytes;
        for slice in &self.slices {
            let here = rest.len().min(slice.len());
            let (now, later) = rest.split_at_checked(here).unwrap_or((rest, &[]));
            // Can't fail: the range lies within the slice.
            let _ = slice.write_slice(now, 0);
            rest = later;
        }
    }
}

/// Bytes in `slices`.
pub(super) fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices
        .iter()
        .fold(0, |sum: usize, slice| sum.saturating_add(slice.len()))
}

/// A packet that the guest sent.
#[derive(Debug)]
pub(super) struct Packet<'a> {
    pub(super) header: Header,
    /// Exactly the header's `len` bytes, or why there are none.
    pub(super) data: Result<Buffers<'a>, PacketError>,
}

impl<'a> Packet<'a> {
    /// Reads the header, once, and finds the data.
    ///
    /// # Errors
    /// There is not even a header.
    pub(super) fn new(mut buffers: Buffers<'a>) -> Result<Self, PacketError> {
        let mut bytes = [0; HEADER_LEN];
        buffers.split_front(HEADER_LEN)?.copy_to(&mut bytes);
        let header = Header::from_bytes(&bytes);
        let data = match usize::try_from(header.len) {
            Ok(len) if len <= MAX_DATA => buffers.split_front(len),
            _ => Err(PacketError::TooLong),
        };
        Ok(Self { header, data })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn header() -> Header {
        Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1111_2222,
            dst_port: 0x3333_4444,
            len: 5,
            socket_type: TYPE_STREAM,
            op: 5,
            flags: 3,
            buf_alloc: 0x5555_6666,
            fwd_cnt: 0x7777_8888,
        }
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap()
    }

    fn buffers<'a>(memory: &'a GuestMemoryMmap, parts: &[(u64, u32)]) -> Buffers<'a> {
        let parts = parts
            .iter()
            .map(|(address, len)| (GuestAddress(*address), *len));
        Buffers::collect(memory, parts, Permissions::Read).unwrap()
    }

    #[test]
    fn a_header_has_the_layout_of_the_standard() {
        let bytes = header().to_bytes();
        assert_eq!(bytes.len(), HEADER_LEN);
        assert_eq!(bytes[..8], 0x0102_0304_0506_0708_u64.to_le_bytes());
        assert_eq!(bytes[16..20], 0x1111_2222_u32.to_le_bytes());
        assert_eq!(bytes[24..28], 5_u32.to_le_bytes());
        assert_eq!(bytes[28..30], 1_u16.to_le_bytes());
        assert_eq!(bytes[30..32], 5_u16.to_le_bytes());
        assert_eq!(bytes[40..44], 0x7777_8888_u32.to_le_bytes());
        let bytes: [u8; HEADER_LEN] = bytes.try_into().unwrap();
        assert_eq!(Header::from_bytes(&bytes), header());
    }

    #[test]
    fn only_the_seven_operations_are_known() {
        for op in 0..=u16::MAX {
            let header = Header {
                op,
                ..Header::default()
            };
            assert_eq!(header.operation().is_some(), (1..=7).contains(&op));
        }
    }

    #[test]
    fn a_packet_may_be_cut_anywhere() {
        let memory = memory();
        let mut bytes = header().to_bytes();
        bytes.extend_from_slice(b"hello and more");
        memory
            .write_slice(&bytes[..30], GuestAddress(0x100))
            .unwrap();
        memory
            .write_slice(&bytes[30..46], GuestAddress(0x200))
            .unwrap();
        memory
            .write_slice(&bytes[46..], GuestAddress(0x300))
            .unwrap();
        let chain = buffers(
            &memory,
            &[(0x100, 30), (0x200, 16), (0x280, 0), (0x300, 12)],
        );
        let packet = Packet::new(chain).unwrap();
        assert_eq!(packet.header, header());
        let mut data = [0; 5];
        let found = packet.data.unwrap();
        assert_eq!(found.len(), 5);
        found.copy_to(&mut data);
        assert_eq!(&data, b"hello");
    }

    #[test]
    fn a_length_beyond_the_chain_or_the_limit_is_refused() {
        let memory = memory();
        let parts = [(0x100, 48)];
        memory
            .write_slice(&header().to_bytes(), GuestAddress(0x100))
            .unwrap();
        let packet = Packet::new(buffers(&memory, &parts)).unwrap();
        assert_eq!(packet.data.unwrap_err(), PacketError::TooShort);

        let mut long = header();
        long.len = u32::MAX;
        memory
            .write_slice(&long.to_bytes(), GuestAddress(0x100))
            .unwrap();
        let packet = Packet::new(buffers(&memory, &parts)).unwrap();
        assert_eq!(packet.data.unwrap_err(), PacketError::TooLong);

        let short = Packet::new(buffers(&memory, &[(0x100, 43)]));
        assert_eq!(short.unwrap_err(), PacketError::TooShort);
    }

    #[test]
    fn buffers_outside_of_memory_or_in_too_many_pieces_are_refused() {
        let memory = memory();
        for (address, len) in [(0x3ffff, 2), (0x50000, 1), (u64::MAX, 44)] {
            let parts = [(GuestAddress(address), len)].into_iter();
            let found = Buffers::collect(&memory, parts, Permissions::Read);
            assert_eq!(found.unwrap_err(), PacketError::Memory);
        }
        let many = (0..2000).map(|address| (GuestAddress(address), 1));
        let found = Buffers::collect(&memory, many, Permissions::Read);
        assert_eq!(found.unwrap_err(), PacketError::TooLong);
    }
}
