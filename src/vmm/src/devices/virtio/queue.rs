// SPDX-License-Identifier: Apache-2.0
//! A virtqueue as a device's worker uses it (virtio 1.2, section 2.7).

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceFault, Interrupt};

/// Offsets in the available ring: flags, then the index, then an entry a descriptor, and behind
/// them `used_event`.
const AVAIL_ENTRIES: u64 = 4;
const AVAIL_ENTRY: u64 = 2;

/// The driver wants no interrupts (without EVENT_IDX).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Offsets in the used ring: flags, the index, an entry a descriptor.
const USED_INDEX: u64 = 2;
const USED_ENTRIES: u64 = 4;
const USED_ENTRY: u64 = 8;

/// One queue of an activated device: frozen by the transport, owned by the device's worker.
#[derive(Debug)]
pub struct ActiveQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    /// The used index when the driver was last told.
    told: u16,
}

impl ActiveQueue {
    /// Queue `index` of a device: rings validated when the driver enabled them, `kick` readable
    /// when the driver has made buffers available.
    #[must_use]
    pub fn new(index: u16, queue: Queue, kick: EventFd) -> Self {
        let told = queue.next_used();
        Self {
            index,
            queue,
            kick,
            told,
        }
    }

    /// Its index among the device's queues.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The most chains that the driver can make available at a time.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The rings, for whoever serves them instead.
    #[must_use]
    pub fn rings(&self) -> &Queue {
        &self.queue
    }

    /// Readable when the driver has made buffers available.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Forgets the kicks so far. Nothing to forget is fine: what they announced was seen.
    pub fn forget_kicks(&self) {
        let _ = self.kick.read();
    }

    /// Kicks in the driver's place, so that the worker comes back when it has seen its other
    /// events.
    ///
    /// # Errors
    /// The kernel refused the write.
    pub fn kick_again(&self) -> Result<(), DeviceFault> {
        let what = "can't kick the queue again";
        let again = self.kick.write(1);
        again.map_err(|source| DeviceFault::Host { what, source })
    }

    /// Takes the next chain that the driver made available.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, DeviceFault> {
        self.ring(|queue| Ok(queue.iter(memory)?.next()))
    }

    /// Puts the last `count` popped chains back.
    pub fn unpop(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Gives a chain back to the driver, with `len` bytes written to it.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        len: u32,
    ) -> Result<(), DeviceFault> {
        self.complete_all(memory, &[(head, len)])
    }

    /// Gives several chains back at once: the driver sees all of them or none.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn complete_all(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), DeviceFault> {
        self.ring(|queue| {
            let base = GuestAddress(queue.used_ring());
            let mut next = Wrapping(queue.next_used());
            for (head, len) in chains {
                let slot = next.0.checked_rem(queue.size()).unwrap_or_default();
                let offset = u64::from(slot)
                    .saturating_mul(USED_ENTRY)
                    .saturating_add(USED_ENTRIES);
                let entry = u64::from(*len) << 32 | u64::from(*head);
                let at = offset_from(base, offset)?;
                memory
                    .write_slice(&entry.to_le_bytes(), at)
                    .map_err(Error::GuestMemory)?;
                next += 1;
            }
            let at = offset_from(base, USED_INDEX)?;
            memory
                .store(next.0.to_le(), at, Ordering::Release)
                .map_err(Error::GuestMemory)?;
            queue.set_next_used(next.0);
            Ok(())
        })
    }

    /// Asks the driver to kick; true if it has made buffers available meanwhile.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn arm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceFault> {
        self.ring(|queue| queue.enable_notification(memory))
    }

    /// Lets the driver know that no kick is needed, as far as the ring can say so.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn disarm(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceFault> {
        self.ring(|queue| queue.disable_notification(memory))
    }

    /// Interrupts the driver if it has got chains back since it was last told, and wants to know.
    ///
    /// # Errors
    /// The ring is broken, or the interrupt could not be raised.
    pub fn signal(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), DeviceFault> {
        let told = std::mem::replace(&mut self.told, self.queue.next_used());
        if self.told == told || !self.ring(|queue| wants_interrupt(queue, memory, told))? {
            return Ok(());
        }
        let what = "can't interrupt the driver";
        interrupt
            .signal_queue(self.index)
            .map_err(|source| DeviceFault::Host { what, source })
    }

    /// Serves the chains that the driver has made available, a queue's size of them at most, and
    /// interrupts the driver if it wants to know. `serve` returns the bytes it wrote.
    ///
    /// Reads the kick first, so call it when the kick is readable. If chains may be left, it
    /// kicks itself: the worker sees its other events in between.
    ///
    /// # Errors
    /// The ring is broken, `serve` failed, or the interrupt could not be raised.
    pub fn serve<F>(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        mut serve: F,
    ) -> Result<(), DeviceFault>
    where
        F: FnMut(DescriptorChain<&GuestMemoryMmap>) -> Result<u32, DeviceFault>,
    {
        self.serve_while(|| true, memory, interrupt, |chain| serve(chain).map(Some))
            .map(drop)
    }

    /// The same as long as `ready` says so; a chain of which `serve` says nothing is completed later. True if
    /// it was not ready to the end: chains may be left, and must be asked for again, kick or no kick.
    ///
    /// # Errors
    /// As for `serve`.
    pub fn serve_while<F>(
        &mut self,
        ready: impl Fn() -> bool,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        mut serve: F,
    ) -> Result<bool, DeviceFault>
    where
        F: FnMut(DescriptorChain<&GuestMemoryMmap>) -> Result<Option<u32>, DeviceFault>,
    {
        self.forget_kicks();
        let mut budget = self.queue.size();
        loop {
            self.disarm(memory)?;
            while budget > 0 {
                if !ready() {
                    self.signal(memory, interrupt)?;
                    return Ok(true);
                }
                let Some(chain) = self.pop(memory)? else {
                    break;
                };
                let head = chain.head_index();
                if let Some(written) = serve(chain)? {
                    self.complete(memory, head, written)?;
                }
                budget = budget.saturating_sub(1);
            }
            let more = self.arm(memory)?;
            if !more || budget == 0 {
                break;
            }
        }
        if budget == 0 {
            self.kick_again()?;
        }
        self.signal(memory, interrupt)?;
        Ok(false)
    }

    fn ring<T>(
        &mut self,
        operation: impl FnOnce(&mut Queue) -> Result<T, Error>,
    ) -> Result<T, DeviceFault> {
        let queue = self.index;
        operation(&mut self.queue).map_err(|source| DeviceFault::Queue { queue, source })
    }
}

/// Whether the driver wants an interrupt for the chains that it got back since the used index was
/// `told` (section 2.7.7.2).
fn wants_interrupt(queue: &Queue, memory: &GuestMemoryMmap, told: u16) -> Result<bool, Error> {
    // The driver sees what it got back before we see what it wants.
    fence(Ordering::SeqCst);
    let base = GuestAddress(queue.avail_ring());
    let load = |at| -> Result<u16, Error> {
        let value = memory.load(at, Ordering::Relaxed);
        Ok(u16::from_le(value.map_err(Error::GuestMemory)?))
    };
    if !queue.event_idx_enabled() {
        return Ok(load(base)? & AVAIL_NO_INTERRUPT == 0);
    }
    let offset = u64::from(queue.size())
        .saturating_mul(AVAIL_ENTRY)
        .saturating_add(AVAIL_ENTRIES);
    let wanted = Wrapping(load(offset_from(base, offset)?)?);
    let (now, told) = (Wrapping(queue.next_used()), Wrapping(told));
    Ok(now - wanted - Wrapping(1) < now - told)
}

fn offset_from(base: GuestAddress, offset: u64) -> Result<GuestAddress, Error> {
    let address = base.0.checked_add(offset).ok_or(Error::AddressOverflow)?;
    Ok(GuestAddress(address))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[derive(Debug, Default)]
    struct Told(Mutex<usize>);

    impl Interrupt for Told {
        fn signal_queue(&self, queue: u16) -> std::io::Result<()> {
            assert_eq!(queue, 3);
            *self.0.lock().unwrap() += 1;
            Ok(())
        }

        fn signal_config(&self) -> std::io::Result<()> {
            Ok(())
        }

        fn device_needs_reset(&self) {}
    }

    const SIZE: u16 = 4;

    struct Fixture {
        memory: GuestMemoryMmap,
        queue: ActiveQueue,
        told: Told,
    }

    impl Fixture {
        fn new(event_idx: bool) -> Self {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
            let mut queue = Queue::new(SIZE).unwrap();
            queue.set_desc_table_address(Some(0x1000), None);
            queue.set_avail_ring_address(Some(0x2000), None);
            queue.set_used_ring_address(Some(0x3000), None);
            queue.set_event_idx(event_idx);
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            let queue = ActiveQueue::new(3, queue, kick);
            let told = Told::default();
            Self {
                memory,
                queue,
                told,
            }
        }

        fn used_index(&self) -> u16 {
            let at = GuestAddress(self.queue.queue.used_ring() + USED_INDEX);
            self.memory.read_obj(at).unwrap()
        }

        fn used(&self, slot: u64) -> (u32, u32) {
            let at = self.queue.queue.used_ring() + USED_ENTRIES + slot * USED_ENTRY;
            let id = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            (id, len)
        }

        fn signal(&mut self) -> usize {
            self.queue.signal(&self.memory, &self.told).unwrap();
            std::mem::take(&mut self.told.0.lock().unwrap())
        }

        fn want(&self, used_event: u16) {
            let at = self.queue.queue.avail_ring() + AVAIL_ENTRIES + 2 * u64::from(SIZE);
            self.memory.write_obj(used_event, GuestAddress(at)).unwrap();
        }
    }

    #[test]
    fn several_chains_go_back_at_once_around_the_rings_end() {
        let mut fixture = Fixture::new(true);
        let memory = fixture.memory.clone();
        for head in 0..3 {
            fixture.queue.complete(&memory, head, 9).unwrap();
        }
        let chains = [(3, 100), (1, 200), (2, 300)];
        fixture.queue.complete_all(&memory, &chains).unwrap();
        assert_eq!(fixture.used_index(), 6);
        assert_eq!(fixture.used(3), (3, 100));
        assert_eq!(fixture.used(0), (1, 200));
        assert_eq!(fixture.used(1), (2, 300));
        assert_eq!(fixture.used(2), (2, 9));
    }

    #[test]
    fn the_driver_is_told_when_its_mark_is_passed() {
        let mut fixture = Fixture::new(true);
        let memory = fixture.memory.clone();
        assert_eq!(fixture.signal(), 0);
        fixture.want(1);
        fixture.queue.complete(&memory, 0, 0).unwrap();
        assert_eq!(fixture.signal(), 0);
        // Passed in the middle of several.
        let chains = [(1, 0), (2, 0), (3, 0)];
        fixture.queue.complete_all(&memory, &chains).unwrap();
        assert_eq!(fixture.signal(), 1);
        assert_eq!(fixture.signal(), 0);
        fixture.queue.complete(&memory, 0, 0).unwrap();
        assert_eq!(fixture.signal(), 0);
    }

    #[test]
    fn a_driver_without_marks_has_a_flag() {
        let mut fixture = Fixture::new(false);
        let memory = fixture.memory.clone();
        fixture.queue.complete(&memory, 0, 0).unwrap();
        assert_eq!(fixture.signal(), 1);
        let flags = GuestAddress(fixture.queue.queue.avail_ring());
        memory.write_obj(AVAIL_NO_INTERRUPT, flags).unwrap();
        fixture.queue.complete(&memory, 1, 0).unwrap();
        assert_eq!(fixture.signal(), 0);
    }
}
