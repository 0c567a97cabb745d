// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, made of a fuzzer's bytes: pages for the balloon and ranges that are free, mostly of its
//! memory and sometimes not.

#![expect(clippy::expect_used, reason = "a fuzzer that can't go on should stop")]

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::{inflate, report};
use crate::devices::virtio::fuzz_input::Input;
use crate::devices::virtio::test_ring::{NEXT, NoInterrupt, Ring, WRITE};

/// Two regions with a hole between them.
const FIRST: usize = 0x2_0000;
const SECOND: u64 = 0x4_0000;
const SIZE: u16 = 16;

impl Input<'_> {
    fn page(&mut self) -> u32 {
        match self.byte() {
            0 => self.word(),
            byte => u32::from(byte) % 0x50,
        }
    }

    /// A chain whose buffers hold page numbers, or are what is given away.
    fn balloon_chain(&mut self, ring: &Ring, reports: bool) {
        let count = 1 + u16::from(self.byte() % 4);
        for id in 0..count {
            let page = u64::from(self.page()) << 12;
            let (address, len) = match self.byte() {
                0 => (u64::MAX - u64::from(self.byte()), self.word()),
                1 => (page | u64::from(self.byte()), self.word() % 0x3000),
                byte if reports => (page, u32::from(byte % 4) << 12),
                byte => (ring.buffer(id).0, 4 * u32::from(byte % 8)),
            };
            let write = if self.byte() == 0 { !reports } else { reports };
            let next = if id + 1 == count { 0 } else { NEXT };
            let flags = next | if write { WRITE } else { 0 };
            ring.describe(id, address, len, flags, id + 1);
        }
    }
}

/// Serves what `bytes` say, until they are used up or the device gives up.
pub fn guest_requests(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let ranges = [(GuestAddress(0), FIRST), (GuestAddress(SECOND), FIRST)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("a guest's memory");
    // The ring lies in what the guest may give away as well: then it reads as zeroes.
    let mut ring = Ring::new(memory.clone(), 0, SECOND, SIZE, 0x100);
    let mut queue = ring.active();
    while !input.is_empty() {
        let reports = input.byte().is_multiple_of(2);
        for number in 0..8 {
            let page = input.page();
            let at = GuestAddress(ring.buffer(0).0 + 4 * number);
            memory.write_obj(page, at).expect("a buffer");
        }
        input.balloon_chain(&ring, reports);
        ring.offer(0);
        let served = queue.serve(&memory, &NoInterrupt, |chain| {
            if reports {
                report(&memory, chain)
            } else {
                inflate(&memory, chain)
            }
        });
        if served.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::fuzz_input::feed;

    #[test]
    fn random_guests_do_no_harm() {
        feed(500, guest_requests);
    }
}
