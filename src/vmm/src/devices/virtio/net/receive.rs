// SPDX-License-Identifier: Apache-2.0
//! Packets to the guest: the tap writes each straight into buffers that the driver has offered.
//!
//! How long a packet is, nobody knows before it is read. So each read is given all buffers there
//! are, up to the longest packet, and behind them memory of our own: a packet that the guest has
//! no room for yet waits there in part until the driver offers more, and none is cut off.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::transmit::is_gone;
use super::{HEADER_LEN, MAX_PACKET, must_rest, pay};
use crate::devices::virtio::rate::RateLimiter;
use crate::devices::virtio::{ActiveQueue, DeviceFault, Interrupt};
use crate::sys::vectored;

/// Packets taken between two looks at what else there is to do.
const MAX_PACKETS: usize = 256;

/// Parts of guest memory that a read is given at most; one more is our own.
const MAX_PARTS: usize = vectored::MAX_BUFFERS - 1;

/// Parts after which no further chain is taken, and the most that one chain may have. Linux makes
/// chains of one part, or of 19.
const ENOUGH_PARTS: usize = MAX_PARTS / 2;

/// Where `num_buffers` is in the header: how many chains the packet takes (section 5.1.6.1).
const NUM_BUFFERS: usize = 10;

/// Why the receiver stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// The tap holds nothing more.
    All,
    /// The driver has offered no buffer for what comes; it will kick.
    Starved,
    /// A turn's worth; the tap is still readable.
    Turn,
    /// The limit asks for a rest first; the tap is still readable.
    Limited,
    /// The tap's interface is no more.
    Gone,
}

/// A piece of guest memory.
#[derive(Debug, Clone, Copy)]
struct Part {
    address: GuestAddress,
    len: usize,
}

/// A chain that was popped, with as many of the parts.
#[derive(Debug, Clone, Copy)]
struct Chain {
    head: u16,
    parts: usize,
    len: usize,
}

/// The receive queue and the buffers taken from it.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) queue: ActiveQueue,
    /// Whether a packet may take several chains.
    mergeable: bool,
    chains: VecDeque<Chain>,
    /// Those of all chains, in order.
    parts: VecDeque<Part>,
    /// Bytes in all parts.
    room: usize,
    /// Takes what the parts don't.
    spill: Box<[u8]>,
    /// A packet that was read and waits for more room: its bytes in the parts, and in `spill`.
    waiting: Option<(usize, usize)>,
}

impl Receiver {
    pub(super) fn new(queue: ActiveQueue, mergeable: bool) -> Self {
        Self {
            queue,
            mergeable,
            chains: VecDeque::new(),
            parts: VecDeque::new(),
            room: 0,
            spill: vec![0; MAX_PACKET].into_boxed_slice(),
            waiting: None,
        }
    }

    /// Hands the tap's packets to the driver, `MAX_PACKETS` of them at most.
    pub(super) fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        tap: &File,
        limit: Option<&RateLimiter>,
    ) -> Result<Received, DeviceFault> {
        let mut received = Received::Turn;
        for _ in 0..MAX_PACKETS {
            if must_rest(limit) {
                received = Received::Limited;
                break;
            }
            if let Some(stop) = self.receive_one(memory, tap, limit)? {
                received = stop;
                break;
            }
            // At once and not at the end: the guest works on the first while we read the next.
            self.queue.signal(memory, interrupt)?;
        }
        self.queue.signal(memory, interrupt)?;
        Ok(received)
    }

    fn receive_one(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: &File,
        limit: Option<&RateLimiter>,
    ) -> Result<Option<Received>, DeviceFault> {
        let full = self.gather(memory)?;
        if let Some((placed, spilled)) = self.waiting {
            let len = placed.saturating_add(spilled);
            if len > self.room {
                if !full {
                    return Ok(Some(Received::Starved));
                }
                // There won't be more room, ever.
                self.waiting = None;
                return Ok(None);
            }
            self.place_spill(memory, placed, spilled)?;
            self.waiting = None;
            return self.deliver(memory, len).map(|()| None);
        }
        if self.room == 0 {
            return Ok(Some(Received::Starved));
        }
        let room = self.room;
        let len = match self.read(memory, tap)? {
            Ok(len) => len,
            Err(error) if is_gone(&error) => return Ok(Some(Received::Gone)),
            // Any other error is about a packet or an interface that is down: there is none.
            Err(_) => return Ok(Some(Received::All)),
        };
        let Some(packet) = len.checked_sub(HEADER_LEN) else {
            // Not even a header, though that is what we asked the tap for.
            return Ok(Some(Received::All));
        };
        pay(limit, packet);
        if len <= room {
            return self.deliver(memory, len).map(|()| None);
        }
        if self.mergeable {
            self.waiting = Some((room, len.saturating_sub(room)));
        }
        // Else the driver has chosen buffers that are too small for it.
        Ok(None)
    }

    /// Takes buffers until the longest packet has room, or the driver has no more. True if more
    /// buffers would not help, because as many as can be are here.
    fn gather(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceFault> {
        let size = self.queue.rings().size();
        // Counted, because a chain may be of no use and go straight back.
        for _ in 0..size {
            if !self.wants_more() {
                return Ok(true);
            }
            if let Some(chain) = self.queue.pop(memory)? {
                self.take(memory, chain)?;
            } else if !self.queue.arm(memory)? {
                return Ok(self.chains.len() >= usize::from(size));
            }
        }
        let full = !self.wants_more() || self.chains.len() >= usize::from(size);
        if !full {
            self.queue.kick_again()?;
        }
        Ok(full)
    }

    fn wants_more(&self) -> bool {
        if self.mergeable {
            self.room < MAX_PACKET && self.parts.len() < ENOUGH_PARTS
        } else {
            self.chains.is_empty()
        }
    }

    fn take(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<(), DeviceFault> {
        let head = chain.head_index();
        let before = self.parts.len();
        let mut room: usize = 0;
        for descriptor in chain.writable() {
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            // Nothing needs more than the longest packet.
            let len = len.min(MAX_PACKET.saturating_sub(room));
            if len > 0 {
                let address = descriptor.addr();
                self.parts.push_back(Part { address, len });
                room = room.saturating_add(len);
            }
        }
        let parts = self.parts.len().saturating_sub(before);
        if parts > ENOUGH_PARTS {
            return Err(DeviceFault::Driver("a buffer has too many parts"));
        }
        if room == 0 {
            return self.queue.complete(memory, head, 0);
        }
        self.room = self.room.saturating_add(room);
        let len = room;
        self.chains.push_back(Chain { head, parts, len });
        Ok(())
    }

    /// Reads a packet into the parts and, as far as it is longer, into the spill.
    fn read(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: &File,
    ) -> Result<io::Result<usize>, DeviceFault> {
        let mut slices = Vec::with_capacity(self.parts.len().saturating_add(1));
        for part in &self.parts {
            collect(memory, *part, &mut slices)?;
        }
        if slices.len() > MAX_PARTS {
            // Each of them lies across memory regions: a guest's whim.
            return Err(DeviceFault::Driver("buffers have too many parts"));
        }
        slices.push(VolatileSlice::from(&mut *self.spill));
        Ok(vectored::read(tap, &slices))
    }

    /// Copies the spilled end of the waiting packet behind its beginning.
    fn place_spill(
        &self,
        memory: &GuestMemoryMmap,
        placed: usize,
        spilled: usize,
    ) -> Result<(), DeviceFault> {
        let bytes = self.spill.get(..spilled).unwrap_or_default();
        self.write(memory, placed, bytes)
    }

    /// Writes `bytes` to the parts from `offset` on.
    fn write(
        &self,
        memory: &GuestMemoryMmap,
        mut offset: usize,
        mut bytes: &[u8],
    ) -> Result<(), DeviceFault> {
        for part in &self.parts {
            if bytes.is_empty() {
                break;
            }
            let Some(rest) = part.len.checked_sub(offset).filter(|rest| *rest > 0) else {
                offset = offset.saturating_sub(part.len);
                continue;
            };
            let (now, later) = bytes.split_at(rest.min(bytes.len()));
            let skip = u64::try_from(offset).unwrap_or(u64::MAX);
            let address = part.address.0.checked_add(skip).ok_or(OUTSIDE)?;
            let written = memory.write_slice(now, GuestAddress(address));
            written.map_err(|_| OUTSIDE)?;
            (bytes, offset) = (later, 0);
        }
        Ok(())
    }

    /// Gives the packet of `len` bytes at the front to the driver.
    fn deliver(&mut self, memory: &GuestMemoryMmap, len: usize) -> Result<(), DeviceFault> {
        let mut used = Vec::with_capacity(1);
        let mut left = len;
        let mut parts: usize = 0;
        for chain in &self.chains {
            if left == 0 {
                break;
            }
            let here = left.min(chain.len);
            used.push((chain.head, u32::try_from(here).unwrap_or(u32::MAX)));
            parts = parts.saturating_add(chain.parts);
            self.room = self.room.saturating_sub(chain.len);
            left = left.saturating_sub(here);
        }
        // The tap leaves the field as it was; without mergeable buffers it is 1 as well.
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        self.write(memory, NUM_BUFFERS, &count.to_le_bytes())?;
        self.queue.complete_all(memory, &used)?;
        self.chains.drain(..used.len());
        self.parts.drain(..parts);
        Ok(())
    }
}

const OUTSIDE: DeviceFault = DeviceFault::Driver("a buffer lies outside of memory");

fn collect<'m>(
    memory: &'m GuestMemoryMmap,
    part: Part,
    slices: &mut Vec<VolatileSlice<'m>>,
) -> Result<(), DeviceFault> {
    let found = memory.get_slices(part.address, part.len, Permissions::Write);
    for slice in found.map_err(|_| OUTSIDE)? {
        slices.push(slice.map_err(|_| OUTSIDE)?);
    }
    Ok(())
}
