// SPDX-License-Identifier: Apache-2.0
//! Packets from the guest: each chain is a header and a packet, which the tap takes as one write.

use std::fs::File;
use std::io;

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::{HEADER_LEN, MAX_PACKET, must_rest, pay};
use crate::devices::virtio::rate::RateLimiter;
use crate::devices::virtio::{ActiveQueue, DeviceFault, Interrupt};
use crate::sys::vectored;

/// Why the sender stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// There is nothing left; the driver will kick.
    All,
    /// The tap has no room for now. What is left stays in the ring.
    Blocked,
    /// A turn's worth; the queue was kicked for the rest.
    Turn,
    /// The limit asks for a rest first. What is left stays in the ring.
    Limited,
    /// The tap's interface is no more.
    Gone,
}

/// The transmit queue.
#[derive(Debug)]
pub(super) struct Transmitter {
    pub(super) queue: ActiveQueue,
}

impl Transmitter {
    pub(super) fn new(queue: ActiveQueue) -> Self {
        Self { queue }
    }

    /// Sends what the driver has made available, a queue's size of packets at most.
    pub(super) fn send(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        tap: &File,
        limit: Option<&RateLimiter>,
    ) -> Result<Sent, DeviceFault> {
        let mut slices = Vec::new();
        let mut left = self.queue.rings().size();
        let sent = loop {
            if left == 0 {
                self.queue.kick_again()?;
                break Sent::Turn;
            }
            if must_rest(limit) {
                break Sent::Limited;
            }
            let Some(chain) = self.queue.pop(memory)? else {
                if self.queue.arm(memory)? {
                    continue;
                }
                break Sent::All;
            };
            left = left.saturating_sub(1);
            let head = chain.head_index();
            slices.clear();
            // What is no packet, or what the tap doesn't take for one, is dropped, as a network
            // would: a bad header or an interface that is down is no reason to stop.
            if collect(memory, chain, &mut slices)? {
                match vectored::write(tap, &slices) {
                    Ok(len) => pay(limit, len.saturating_sub(HEADER_LEN)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.queue.unpop(1);
                        break Sent::Blocked;
                    }
                    Err(error) if is_gone(&error) => {
                        self.queue.unpop(1);
                        break Sent::Gone;
                    }
                    Err(_) => {}
                }
            }
            self.queue.complete(memory, head, 0)?;
        };
        self.queue.signal(memory, interrupt)?;
        Ok(sent)
    }

    /// Gives back what the driver has made available, unsent: there is no cable.
    pub(super) fn discard(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), DeviceFault> {
        self.queue.serve(memory, interrupt, |_| Ok(0))
    }
}

/// Whether an error of the tap means that its interface was removed.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

/// The readable parts of a chain, if they can be a packet.
fn collect<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    slices: &mut Vec<VolatileSlice<'m>>,
) -> Result<bool, DeviceFault> {
    let outside = |_| DeviceFault::Driver("a buffer lies outside of memory");
    let mut room = MAX_PACKET;
    for descriptor in chain.readable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let Some(rest) = room.checked_sub(len) else {
            return Ok(false);
        };
        room = rest;
        if len == 0 {
            continue;
        }
        let found = memory.get_slices(descriptor.addr(), len, Permissions::Read);
        for slice in found.map_err(outside)? {
            slices.push(slice.map_err(outside)?);
        }
        if slices.len() > vectored::MAX_BUFFERS {
            return Ok(false);
        }
    }
    Ok(!slices.is_empty())
}
