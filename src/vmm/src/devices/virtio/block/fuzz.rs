// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, made of a fuzzer's bytes: requests that are mostly right and sometimes not, served in turn
//! or by a ring of the kernel's.

#![expect(clippy::expect_used, reason = "a fuzzer that can't go on should stop")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BlockDevice;
use super::device::{FEATURE_DISCARD, FEATURE_FLUSH, FEATURE_WRITE_ZEROES};
use super::engine::{Engine, Served};
use super::request::{Disk, IO_ERROR, OK, Request, SECTOR, UNSUPPORTED};
use crate::devices::virtio::fuzz_input::Input;
use crate::devices::virtio::test_ring::{NEXT, NoInterrupt, Ring, WRITE};
use crate::sys::uring;

const MEMORY: usize = 0x10_0000;
const SECTORS: u64 = 64;
const SIZE: u16 = 16;
const BUFFER: u32 = 0x2000;
/// What a status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xee;
/// What the disk holds at first.
const FILL: u8 = 0xd5;

/// The types that there are, and one that there is not.
const KINDS: [u32; 7] = [0, 1, 4, 8, 11, 13, 14];

impl Input<'_> {
    /// A number below `limit`, or any.
    fn below(&mut self, limit: u32) -> u32 {
        match self.byte() {
            0 => self.word(),
            1 => u32::MAX,
            byte => u32::from(byte).checked_rem(limit).unwrap_or_default(),
        }
    }

    /// A header, and the ranges that some requests carry.
    fn content(&mut self) -> Vec<u8> {
        let kind = usize::from(self.byte());
        let kind = KINDS.iter().cycle().nth(kind).copied().unwrap_or_default();
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(u64::from(self.below(64)).to_le_bytes());
        for _ in 0..self.byte() % 4 {
            bytes.extend(u64::from(self.below(64)).to_le_bytes());
            bytes.extend(self.below(16).to_le_bytes());
            bytes.extend(u32::from(self.byte() % 3).to_le_bytes());
        }
        bytes
    }

    /// The descriptors of a chain: most often a header, data and a status.
    fn block_chain(&mut self, ring: &Ring) {
        let count = match self.byte() % 8 {
            0 => 1,
            1 => 5,
            2 => 2,
            _ => 3,
        };
        for id in 0..count {
            let last = id + 1 == count;
            let own = ring.buffer(id).0;
            let (address, len) = match (self.byte(), id) {
                (0, _) => (u64::from(self.word()) << 16, self.word()),
                (1, _) => (own, self.word() % (2 * BUFFER)),
                (2..=9, 0) => (own, 16 + 16 * u32::from(self.byte() % 4)),
                (_, 0) => (own, 16),
                (byte, _) if !last => (own, u32::from(byte % 16) * 512),
                _ => (own, 1),
            };
            let write = match self.byte() {
                0..=3 => id == 0,
                byte => last || id > 0 && byte.is_multiple_of(2),
            };
            let flags = if last { 0 } else { NEXT } | if write { WRITE } else { 0 };
            ring.describe(id, address, len, flags, id + 1);
        }
    }
}

/// Serves what `bytes` say, until they are used up or the device gives up.
pub fn guest_requests(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let memory = Arc::new(memory);
    let choices = input.byte();
    let read_only = choices & 1 != 0;
    let disk = device(read_only).disk;
    let mut engine = match uring::Ring::new(&disk.file, SIZE) {
        Ok(ring) if choices & 2 != 0 => Engine::Ring(Box::new(ring)),
        _ => Engine::InTurn,
    };
    let features = if choices & 4 != 0 {
        0
    } else {
        FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES
    };
    let mut ring = Ring::new(GuestMemoryMmap::clone(&memory), 0, 0, SIZE, BUFFER);
    let mut queue = ring.active();
    while !input.is_empty() {
        let content = input.content();
        memory
            .write_slice(&content, ring.buffer(0))
            .expect("a buffer");
        input.block_chain(&ring);
        ring.offer(0);
        let mut served: Vec<Served> = Vec::new();
        let left = queue.serve(&memory, &NoInterrupt, |chain| {
            let head = chain.head_index();
            let request = Request::of(&memory, chain)?;
            let status = request.status;
            memory.write_obj(UNTOUCHED, status).expect("a status");
            if engine.start(&disk, &memory, head, &request) {
                engine.submit()?;
                engine.settle(&disk, &memory, features, &mut served)?;
            } else {
                served.push((head, disk.serve(&memory, request, features)?));
            }
            let status: u8 = memory.read_obj(status).expect("a status");
            assert!([OK, IO_ERROR, UNSUPPORTED].contains(&status), "{status}");
            Ok(served.last().map_or(0, |(_, written)| *written))
        });
        check(&disk);
        if left.is_err() {
            return;
        }
        while ring.take_used().is_some() {}
    }
}

fn device(read_only: bool) -> BlockDevice {
    let file: File = memfd_create("disk", MemfdFlags::CLOEXEC)
        .expect("a file in memory")
        .into();
    let content = vec![FILL; usize::try_from(SECTORS * SECTOR).unwrap_or_default()];
    file.write_all_at(&content, 0).expect("a disk's content");
    BlockDevice::new("disk", file, read_only, 1).expect("a disk")
}

/// No request makes a disk larger or smaller, and none changes one that is read-only.
fn check(disk: &Disk) {
    let len = disk.file.metadata().expect("the disk's size").len();
    assert_eq!(len, SECTORS * SECTOR, "the disk has another size");
    if disk.read_only {
        let mut content = vec![0; usize::try_from(len).unwrap_or_default()];
        disk.file.read_exact_at(&mut content, 0).expect("the disk");
        let changed = content.iter().any(|byte| *byte != FILL);
        assert!(!changed, "a read-only disk was written to");
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
