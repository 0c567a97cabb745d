// SPDX-License-Identifier: Apache-2.0
//! A guest's driver for tests and fuzzing.

#![expect(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that can't go on should stop"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::packet::{HEADER_LEN, Header};
use super::{ConnectionSink, HOST_CID};
use crate::devices::virtio::GuestMemory;
pub(super) use crate::devices::virtio::test_ring::NoInterrupt;
use crate::devices::virtio::test_ring::{NEXT, Ring, WRITE};

pub(super) const GUEST_CID: u64 = 3;

/// The driver.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) memory: GuestMemoryMmap,
    pub(super) receive: Ring,
    pub(super) transmit: Ring,
    pub(super) event: Ring,
    free: Vec<u16>,
}

impl Driver {
    const TRANSMIT_SLOTS: u16 = 32;
    const RECEIVE_SLOTS: u16 = 64;
    pub(super) const RECEIVE_LEN: u32 = 4096;

    pub(super) fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x80_0000)]).unwrap();
        let ring = |index, base, size, len| Ring::new(memory.clone(), index, base, size, len);
        Self {
            receive: ring(0, 0x10_0000, Self::RECEIVE_SLOTS, Self::RECEIVE_LEN),
            transmit: ring(1, 0x20_0000, Self::TRANSMIT_SLOTS, 0x1_1000),
            event: ring(2, 0x50_0000, 8, 16),
            free: (0..Self::TRANSMIT_SLOTS).collect(),
            memory,
        }
    }

    pub(super) fn guest_memory(&self) -> GuestMemory {
        GuestMemory::new(self.memory.clone())
    }

    /// Offers the receive buffer of this number.
    pub(super) fn offer_buffer(&mut self, id: u16) {
        let buffer = self.receive.buffer(id);
        self.receive
            .describe(id, buffer.0, Self::RECEIVE_LEN, WRITE, 0);
        self.receive.offer(id);
    }

    /// Offers all receive buffers, and one for events.
    pub(super) fn offer_buffers(&mut self) {
        for id in 0..Self::RECEIVE_SLOTS {
            self.offer_buffer(id);
        }
        self.event.describe(0, self.event.buffer(0).0, 16, WRITE, 0);
        self.event.offer(0);
    }

    /// Sends a packet; false while the queue is full.
    pub(super) fn send(&mut self, header: &Header, data: &[u8]) -> bool {
        let Some(id) = self.prepare(header, data) else {
            return false;
        };
        self.transmit.offer(id);
        true
    }

    /// Sends packets without data, all seen by the device at once.
    pub(super) fn send_together(&mut self, headers: &[Header]) {
        for header in headers {
            let id = self.prepare(header, &[]).unwrap();
            self.transmit.offer_quietly(id);
        }
        self.transmit.kick.write(1).unwrap();
    }

    fn prepare(&mut self, header: &Header, data: &[u8]) -> Option<u16> {
        self.transmit_in_use();
        let id = self.free.pop()?;
        let mut bytes = header.to_bytes();
        bytes.extend_from_slice(data);
        let buffer = self.transmit.buffer(id);
        self.memory.write_slice(&bytes, buffer).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.transmit.describe(id, buffer.0, len, 0, 0);
        Some(id)
    }

    /// How many packets the device has not taken yet.
    pub(super) fn transmit_in_use(&mut self) -> usize {
        while let Some((id, _)) = self.transmit.take_used() {
            // Descriptors of raw chains were never taken from here.
            if !self.free.contains(&id) {
                self.free.push(id);
            }
        }
        usize::from(Self::TRANSMIT_SLOTS) - self.free.len()
    }

    /// Sends a chain of descriptors as they are.
    pub(super) fn send_raw(&mut self, descriptors: &[(u64, u32, u16)]) {
        let last = descriptors.len().saturating_sub(1);
        for (index, (address, len, flags)) in descriptors.iter().enumerate() {
            let id = u16::try_from(index).unwrap();
            let next = if index == last { 0 } else { NEXT };
            self.transmit
                .describe(id, *address, *len, flags | next, id + 1);
        }
        self.transmit.offer(0);
    }

    /// Writes guest memory.
    pub(super) fn memory_write(&self, address: u64, bytes: &[u8]) {
        let at = GuestAddress(address);
        self.memory.write_slice(bytes, at).unwrap();
    }

    /// The next packet from the host; its buffer is offered again.
    pub(super) fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        loop {
            let (id, len) = self.receive.take_used()?;
            let len = usize::try_from(len).unwrap();
            let mut bytes = vec![0; len];
            let buffer = self.receive.buffer(id);
            self.memory.read_slice(&mut bytes, buffer).unwrap();
            self.offer_buffer(id);
            if len == 0 {
                continue;
            }
            let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
            return Some((header, bytes.split_off(HEADER_LEN)));
        }
    }

    /// The next event.
    pub(super) fn receive_event(&mut self) -> Option<Vec<u8>> {
        let (id, len) = self.event.take_used()?;
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        let buffer = self.event.buffer(id);
        self.memory.read_slice(&mut bytes, buffer).unwrap();
        Some(bytes)
    }
}

/// A header from the guest, with a large buffer behind it.
pub(super) fn from_guest(guest_port: u32, host_port: u32, op: u16, len: usize) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: u32::try_from(len).unwrap(),
        socket_type: 1,
        op,
        flags: 0,
        buf_alloc: 256 * 1024,
        fwd_cnt: 0,
    }
}

/// Keeps what the guest connects to.
#[derive(Debug, Default)]
pub(super) struct Sink {
    streams: Mutex<Vec<(u32, OwnedFd)>>,
}

impl Sink {
    /// A port that this sink refuses at once.
    pub(super) const REFUSED: u32 = 99;

    pub(super) fn take(&self) -> Option<(u32, OwnedFd)> {
        self.streams.lock().unwrap().pop()
    }
}

impl ConnectionSink for Sink {
    fn connect(&self, port: u32, stream: OwnedFd) -> io::Result<()> {
        if port == Self::REFUSED {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.streams.lock().unwrap().push((port, stream));
        Ok(())
    }
}
