// SPDX-License-Identifier: Apache-2.0
//! A guest's driver for tests and fuzzing: rings in plain memory, driven as Linux drives them.

#![expect(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that can't go on should stop"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::packet::{HEADER_LEN, Header};
use super::{ConnectionSink, HOST_CID};
use crate::devices::virtio::{ActiveQueue, GuestMemory, Interrupt};

pub(super) const GUEST_CID: u64 = 3;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One ring with a buffer for each of its descriptors.
#[derive(Debug)]
pub(super) struct Ring {
    memory: GuestMemoryMmap,
    index: u16,
    base: u64,
    size: u16,
    buffer_len: u32,
    available: u16,
    used: u16,
    pub(super) kick: EventFd,
}

impl Ring {
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFERS: u64 = 0x4000;

    fn new(memory: GuestMemoryMmap, index: u16, base: u64, size: u16, buffer_len: u32) -> Self {
        Self {
            memory,
            index,
            base,
            size,
            buffer_len,
            available: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    pub(super) fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(self.size);
        let low = |offset: u64| Some(u32::try_from(self.base + offset).unwrap());
        queue.set_desc_table_address(low(0), Some(0));
        queue.set_avail_ring_address(low(Self::AVAIL), Some(0));
        queue.set_used_ring_address(low(Self::USED), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        ActiveQueue::new(self.index, queue, self.kick.try_clone().unwrap())
    }

    fn buffer(&self, id: u16) -> GuestAddress {
        let offset = u64::from(id) * u64::from(self.buffer_len);
        GuestAddress(self.base + Self::BUFFERS + offset)
    }

    /// Writes a descriptor.
    pub(super) fn describe(&self, id: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        let at = self.base + 16 * u64::from(id);
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that starts at `id` available, and kicks if the device wants it.
    pub(super) fn offer(&mut self, id: u16) {
        self.offer_quietly(id);
        let at = self.base + Self::USED + 4 + 8 * u64::from(self.size);
        let wanted: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        if wanted == self.available.wrapping_sub(1) {
            self.kick.write(1).unwrap();
        }
    }

    fn offer_quietly(&mut self, id: u16) {
        let slot = u64::from(self.available % self.size);
        let at = self.base + Self::AVAIL + 4 + 2 * slot;
        self.memory.write_obj(id, GuestAddress(at)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Sets the available index as it is, sensible or not.
    pub(super) fn set_available(&self, index: u16) {
        fence(Ordering::SeqCst);
        let at = GuestAddress(self.base + Self::AVAIL + 2);
        self.memory.write_obj(index, at).unwrap();
        fence(Ordering::SeqCst);
    }

    /// The next chain that the device is done with, and how much it has written.
    fn take_used(&mut self) -> Option<(u16, u32)> {
        fence(Ordering::SeqCst);
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(self.base + Self::USED + 2))
            .unwrap();
        if index == self.used {
            return None;
        }
        let slot = u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let at = self.base + Self::USED + 4 + 8 * slot;
        let id: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(id).unwrap(), len))
    }
}

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

/// Interrupts that nobody waits for.
#[derive(Debug)]
pub(super) struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }

    fn device_needs_reset(&self) {}
}
