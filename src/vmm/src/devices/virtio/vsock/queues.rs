// SPDX-License-Identifier: Apache-2.0
//! The receive queue as the place where packets to the guest go.

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::packet::{Buffers, HEADER_LEN, Header};
use crate::devices::virtio::{ActiveQueue, DeviceFault};

/// The receive queue while it is being filled: where packets to the guest go.
#[derive(Debug)]
pub(super) struct Receiver<'q, 'm> {
    queue: &'q mut ActiveQueue,
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
    pub(super) fn new(queue: &'q mut ActiveQueue, memory: &'m GuestMemoryMmap) -> Self {
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
