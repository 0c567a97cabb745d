// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, made of a fuzzer's bytes: requests that are mostly right and sometimes not, and
//! a host that changes its mind.

#![expect(clippy::expect_used, reason = "a fuzzer that can't go on should stop")]

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::region::{BLOCK, Region};
use super::request::{ANSWER, REQUEST, serve};
use crate::devices::virtio::fuzz_input::Input;
use crate::devices::virtio::test_ring::{NEXT, NoInterrupt, Ring, WRITE};

const MEMORY: usize = 0x10_0000;
const START: u64 = 4 * BLOCK;
const BLOCKS: u64 = 8;
const SIZE: u16 = 16;
const RING: u64 = 0x1_0000;

impl Input<'_> {
    /// A type, an address and a number of blocks, mostly of the region.
    fn request(&mut self) -> [u8; REQUEST] {
        let mut request = [0; REQUEST];
        let kind = u16::from(self.byte() % 5);
        let address = match self.byte() {
            0 => u64::from(self.word()) << 32 | u64::from(self.word()),
            1 => START.wrapping_add(u64::from(self.word())),
            byte => START + u64::from(byte) % (BLOCKS + 1) * BLOCK,
        };
        let count = match self.byte() {
            0 => u16::MAX,
            byte => u16::from(byte) % 5,
        };
        let fields = kind.to_le_bytes().into_iter().chain([0; 6]);
        let fields = fields.chain(address.to_le_bytes());
        let fields = fields.chain(count.to_le_bytes());
        for (to, from) in request.iter_mut().zip(fields) {
            *to = from;
        }
        request
    }

    /// Where a buffer lies, and how long it is.
    fn buffer(&mut self, ring: &Ring, id: u16, len: usize) -> (u64, u32) {
        let len = u32::try_from(len).unwrap_or_default();
        match self.byte() {
            0 => (u64::from(self.word()) << 16, self.word()),
            1 => (ring.buffer(id).0, u32::from(self.byte())),
            _ => (ring.buffer(id).0, len),
        }
    }
}

/// Serves what `bytes` say, until they are used up or the device gives up.
pub fn guest_requests(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let size = usize::try_from(BLOCKS * BLOCK).unwrap_or_default();
    let ranges = [(GuestAddress(0), MEMORY), (GuestAddress(START), size)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("a guest's memory");
    let mut region = Region::new(&(START..START + BLOCKS * BLOCK));
    let mut ring = Ring::new(memory.clone(), 0, RING, SIZE, 0x100);
    let mut queue = ring.active();
    while !input.is_empty() {
        region.request(u64::from(input.byte() % 12) * BLOCK / 2);
        let request = input.request();
        let at = ring.buffer(0);
        memory.write_slice(&request, at).expect("a buffer");
        let (address, len) = input.buffer(&ring, 0, REQUEST);
        ring.describe(0, address, len, NEXT, 1);
        let (address, len) = input.buffer(&ring, 1, ANSWER);
        let flags = if input.byte() == 0 { NEXT } else { 0 };
        ring.describe(1, address, len, flags | WRITE, 0);
        ring.offer(0);
        let before = region.plugged();
        let served = queue.serve(&memory, &NoInterrupt, |chain| {
            serve(&mut region, &memory, chain)
        });
        let (plugged, requested) = (region.plugged(), region.requested());
        assert_eq!(
            plugged,
            region.count(),
            "what is counted is not what is there"
        );
        assert!(
            plugged <= before || plugged <= requested,
            "more than is offered"
        );
        if served.is_err() {
            return;
        }
        while ring.take_used().is_some() {}
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
