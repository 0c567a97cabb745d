// SPDX-License-Identifier: Apache-2.0
//! A driver's side of a ring for tests and fuzzing: in plain memory, driven as Linux drives it.

#![expect(
    clippy::arithmetic_side_effects,
    clippy::unwrap_used,
    reason = "a test that can't go on should stop"
)]

use std::io;
use std::sync::atomic::{Ordering, fence};

#[cfg(test)]
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, Interrupt};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// One ring with a buffer for each of its descriptors.
#[derive(Debug)]
pub(crate) struct Ring {
    memory: GuestMemoryMmap,
    index: u16,
    base: u64,
    size: u16,
    buffer_len: u32,
    available: u16,
    used: u16,
    pub(crate) kick: EventFd,
}

impl Ring {
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFERS: u64 = 0x4000;

    pub(crate) fn new(
        memory: GuestMemoryMmap,
        index: u16,
        base: u64,
        size: u16,
        buffer_len: u32,
    ) -> Self {
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

    pub(crate) fn active(&self) -> ActiveQueue {
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

    pub(crate) fn buffer(&self, id: u16) -> GuestAddress {
        let offset = u64::from(id) * u64::from(self.buffer_len);
        GuestAddress(self.base + Self::BUFFERS + offset)
    }

    /// Writes a descriptor.
    pub(crate) fn describe(&self, id: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        let at = self.base + 16 * u64::from(id);
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that starts at `id` available, and kicks if the device wants it.
    pub(crate) fn offer(&mut self, id: u16) {
        self.offer_quietly(id);
        let at = self.base + Self::USED + 4 + 8 * u64::from(self.size);
        let wanted: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        if wanted == self.available.wrapping_sub(1) {
            self.kick.write(1).unwrap();
        }
    }

    /// The same without a kick.
    pub(crate) fn offer_quietly(&mut self, id: u16) {
        let slot = u64::from(self.available % self.size);
        let at = self.base + Self::AVAIL + 4 + 2 * slot;
        self.memory.write_obj(id, GuestAddress(at)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Sets the available index as it is, sensible or not.
    pub(crate) fn set_available(&self, index: u16) {
        fence(Ordering::SeqCst);
        let at = GuestAddress(self.base + Self::AVAIL + 2);
        self.memory.write_obj(index, at).unwrap();
        fence(Ordering::SeqCst);
    }

    /// The next chain that the device is done with, and how much it has written.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
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

/// A chain's descriptors, of (address, length, flags) each.
#[cfg(test)]
pub(crate) fn descriptors(buffers: &[(u64, u32, u16)]) -> Vec<RawDescriptor> {
    let numbered = (1..).zip(buffers);
    let describe = |(following, (address, len, flags)): (u16, &(u64, u32, u16))| {
        let more = usize::from(following) < buffers.len();
        let next = if more { NEXT } else { 0 };
        Descriptor::new(*address, *len, flags | next, following).into()
    };
    numbered.map(describe).collect()
}

/// Interrupts that nobody waits for.
#[derive(Debug)]
pub(crate) struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }

    fn device_needs_reset(&self) {}
}
