// SPDX-License-Identifier: Apache-2.0
//! What the device needs of its virtqueues.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{Buffers, HEADER_LEN, Header};
use crate::devices::virtio::{ActiveQueue, DeviceFault, Interrupt};

/// One of the device's queues.
#[derive(Debug)]
pub(super) struct VirtQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    /// Whether buffers went back to the driver since it was last told.
    completed: bool,
}

impl VirtQueue {
    pub(super) fn new(active: ActiveQueue) -> Self {
        Self {
            index: active.index,
            queue: active.queue,
            kick: active.kick,
            completed: false,
        }
    }

    /// Readable when the driver made buffers available.
    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the next chain that the driver made available.
    pub(super) fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, DeviceFault> {
        match self.queue.iter(memory) {
            Ok(mut chains) => Ok(chains.next()),
            Err(source) => Err(self.fault(source)),
        }
    }

    /// Puts the last `count` popped chains back.
    pub(super) fn unpop(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Gives a chain back to the driver, with `len` bytes written to it.
    pub(super) fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        len: u32,
    ) -> Result<(), DeviceFault> {
        self.completed = true;
        self.queue
            .add_used(memory, head, len)
            .map_err(|source| self.fault(source))
    }

    /// Asks the driver to kick; true if it has made buffers available meanwhile.
    pub(super) fn arm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceFault> {
        self.queue
            .enable_notification(memory)
            .map_err(|source| self.fault(source))
    }

    /// Interrupts the driver if it has got buffers back and wants to know.
    pub(super) fn signal(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), DeviceFault> {
        if !std::mem::take(&mut self.completed) {
            return Ok(());
        }
        let needed = self
            .queue
            .needs_notification(memory)
            .map_err(|source| self.fault(source))?;
        if !needed {
            return Ok(());
        }
        let what = "can't interrupt the driver";
        interrupt
            .signal_queue(self.index)
            .map_err(|source| DeviceFault::Host { what, source })
    }

    fn fault(&self, source: virtio_queue::Error) -> DeviceFault {
        DeviceFault::Queue {
            queue: self.index,
            source,
        }
    }
}

/// The receive queue while it is being filled: where packets to the guest go.
#[derive(Debug)]
pub(super) struct Receiver<'q, 'm> {
    queue: &'q mut VirtQueue,
    memory: &'m GuestMemoryMmap,
}

/// A buffer of the guest that waits for a packet.
#[derive(Debug)]
pub(super) struct ReceiveBuffer<'m> {
    head: u16,
    header: Buffers<'m>,
    data: Buffers<'m>,
}

impl<'m> ReceiveBuffer<'m> {
    /// Where the packet's data goes; never empty.
    pub(super) fn data(&self) -> &[VolatileSlice<'m>] {
        self.data.slices()
    }

    /// How many bytes of data fit.
    pub(super) fn room(&self) -> usize {
        self.data.len()
    }
}

impl<'q, 'm> Receiver<'q, 'm> {
    pub(super) fn new(queue: &'q mut VirtQueue, memory: &'m GuestMemoryMmap) -> Self {
        Self { queue, memory }
    }

    /// The next buffer, if the guest has offered one. A chain with no room for a header and some
    /// data goes back empty.
    pub(super) fn next(&mut self) -> Result<Option<ReceiveBuffer<'m>>, DeviceFault> {
        while let Some(chain) = self.queue.pop(self.memory)? {
            let head = chain.head_index();
            if let Ok(mut data) = Buffers::writable(self.memory, chain)
                && let Ok(header) = data.split_front(HEADER_LEN)
                && data.len() > 0
            {
                return Ok(Some(ReceiveBuffer { head, header, data }));
            }
            self.queue.complete(self.memory, head, 0)?;
        }
        Ok(None)
    }

    /// Puts the last `count` buffers back, unused.
    pub(super) fn give_back(&mut self, count: usize) {
        self.queue.unpop(count);
    }

    /// Hands a packet to the guest; its data is in the buffer already.
    pub(super) fn deliver(
        &mut self,
        buffer: &ReceiveBuffer<'_>,
        header: &Header,
    ) -> Result<(), DeviceFault> {
        buffer.header.copy_from(&header.to_bytes());
        let header_len = u32::try_from(HEADER_LEN).unwrap_or(u32::MAX);
        let len = header_len.saturating_add(header.len);
        self.queue.complete(self.memory, buffer.head, len)
    }
}
