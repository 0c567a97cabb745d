// SPDX-License-Identifier: Apache-2.0
//! The device behind its queues, driven as a guest's driver would.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use fuse_server::Options;
use fuse_server::protocol::{
    EntryOut, InHeader, InitIn, InitOut, OpenIn, OpenOut, OutHeader, ReadIn, Wire,
};
use tempfile::TempDir;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Fs, FsConfig, FsError};
use crate::devices::virtio::{Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice};

const SIZE: u16 = 64;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_LEN: u64 = 0x4_0000;

#[derive(Debug, Default)]
struct Interrupts {
    broken: AtomicBool,
}

impl Interrupt for Interrupts {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }

    fn device_needs_reset(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }
}

/// A driver with one chain a slot: request in the first half of the slot's buffer, reply in the
/// second.
struct Driver {
    memory: GuestMemoryMmap,
    kick: EventFd,
    interrupts: Arc<Interrupts>,
    device: Fs,
    available: u16,
    used: u16,
    directory: TempDir,
}

impl Driver {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = Fs::new(FsConfig {
            tag: "share".to_owned(),
            root: OwnedFd::from(File::open(directory.path()).unwrap()),
            options: Options::default(),
        })
        .unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x200_0000)]).unwrap();
        let mut driver = Self {
            memory,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupts: Arc::default(),
            device,
            available: 0,
            used: 0,
            directory,
        };
        driver.activate();
        driver
    }

    fn activate(&mut self) {
        let queue = |index: u16, kick: &EventFd| {
            let base = 0x1_0000 * (u32::from(index) + 1);
            let mut queue = Queue::new(512).unwrap();
            queue.set_size(SIZE);
            queue.set_desc_table_address(Some(base), Some(0));
            queue.set_avail_ring_address(Some(base + 0x1000), Some(0));
            queue.set_used_ring_address(Some(base + 0x2000), Some(0));
            queue.set_event_idx(true);
            queue.set_ready(true);
            let kick = kick.try_clone().unwrap();
            ActiveQueue::new(index, queue, kick)
        };
        let quiet = EventFd::new(EFD_NONBLOCK).unwrap();
        let activation = Activation {
            memory: GuestMemory::new(self.memory.clone()),
            features: 0,
            queues: vec![queue(0, &quiet), queue(1, &self.kick)],
            interrupt: Arc::clone(&self.interrupts) as Arc<dyn Interrupt>,
        };
        self.device.activate(activation).unwrap();
    }

    fn write_descriptor(&self, id: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        let at = GuestAddress(0x2_0000 + 16 * u64::from(id));
        self.memory.write_slice(&bytes, at).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % SIZE);
        let at = GuestAddress(0x2_1004 + 2 * slot);
        self.memory.write_obj(head, at).unwrap();
        self.available = self.available.wrapping_add(1);
        fence(Ordering::SeqCst);
        let at = GuestAddress(0x2_1002);
        self.memory.write_obj(self.available, at).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Waits for the next used chain: its head and the length that the device wrote.
    fn used(&mut self) -> (u16, usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            fence(Ordering::SeqCst);
            let index: u16 = self.memory.read_obj(GuestAddress(0x2_2002)).unwrap();
            if index != self.used {
                break;
            }
            assert!(Instant::now() < deadline, "the device doesn't answer");
            std::thread::sleep(Duration::from_micros(50));
        }
        let at = 0x2_2004 + 8 * u64::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let id: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        (id.try_into().unwrap(), length.try_into().unwrap())
    }

    /// Sends a request in slot `slot`, its reply room cut into pieces of a page.
    fn send(&mut self, slot: u16, request: &[u8], room: u32) {
        let buffer = BUFFERS + BUFFER_LEN * u64::from(slot / 16);
        let address = GuestAddress(buffer);
        self.memory.write_slice(request, address).unwrap();
        let length = u32::try_from(request.len()).unwrap();
        self.write_descriptor(slot, buffer, length, NEXT, slot + 1);
        let pieces = room.div_ceil(4096).max(1);
        let mut left = room;
        for piece in 0..pieces {
            let id = slot + 1 + u16::try_from(piece).unwrap();
            let last = piece + 1 == pieces;
            let address = buffer + BUFFER_LEN / 2 + 4096 * u64::from(piece);
            let flags = if last { WRITE } else { WRITE | NEXT };
            self.write_descriptor(id, address, left.min(4096), flags, id + 1);
            left -= left.min(4096);
        }
        self.offer(slot);
    }

    fn reply(&self, slot: u16, length: usize) -> Vec<u8> {
        let at = BUFFERS + BUFFER_LEN * u64::from(slot / 16) + BUFFER_LEN / 2;
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// One request and its reply's error and body.
    fn call(&mut self, opcode: u32, nodeid: u64, body: &[u8], room: u32) -> (i32, Vec<u8>) {
        self.send(0, &request(opcode, nodeid, 7, body), room);
        let (head, length) = self.used();
        assert_eq!(head, 0);
        let bytes = self.reply(0, length);
        let mut rest = bytes.as_slice();
        let header = OutHeader::take(&mut rest).unwrap();
        assert_eq!((header.len as usize, header.unique), (length, 7));
        (header.error, rest.to_vec())
    }

    fn init(&mut self) {
        let init = InitIn {
            major: 7,
            minor: 38,
            ..InitIn::default()
        };
        let (error, body) = self.call(26, 0, &bytes(&init), 80);
        assert_eq!((error, body.len()), (0, InitOut::SIZE));
    }

    fn open(&mut self, name: &str) -> u64 {
        let name = [name.as_bytes(), &[0]].concat();
        let (error, entry) = self.call(1, 1, &name, 144);
        assert_eq!(error, 0);
        let node = EntryOut::take(&mut entry.as_slice()).unwrap().nodeid;
        let (error, open) = self.call(14, node, &bytes(&OpenIn::default()), 32);
        assert_eq!(error, 0);
        OpenOut::take(&mut open.as_slice()).unwrap().fh
    }
}

fn bytes(value: &impl Wire) -> Vec<u8> {
    let mut bytes = Vec::new();
    value.put(&mut bytes);
    bytes
}

fn request(opcode: u32, nodeid: u64, unique: u64, body: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: u32::try_from(InHeader::SIZE + body.len()).unwrap(),
        opcode,
        unique,
        nodeid,
        ..InHeader::default()
    };
    [bytes(&header), body.to_vec()].concat()
}

fn read(fh: u64, offset: u64, size: u32) -> Vec<u8> {
    bytes(&ReadIn {
        fh,
        offset,
        size,
        ..ReadIn::default()
    })
}

#[test]
fn a_file_is_read_into_scattered_guest_memory() {
    let mut driver = Driver::new();
    let data: Vec<u8> = (0_u32..15_000).flat_map(u32::to_le_bytes).collect();
    fs::write(driver.directory.path().join("data"), &data).unwrap();
    driver.init();
    let fh = driver.open("data");
    let (error, got) = driver.call(15, 0, &read(fh, 4, 50_000), 50_016);
    assert_eq!(error, 0);
    assert!(got == data[4..50_004], "wrong data");
    let (error, tail) = driver.call(15, 0, &read(fh, 59_990, 4096), 4112);
    assert_eq!((error, tail.len()), (0, 10));
}

#[test]
fn requests_offered_together_are_all_served() {
    let mut driver = Driver::new();
    fs::write(driver.directory.path().join("data"), vec![5; 8192]).unwrap();
    driver.init();
    let fh = driver.open("data");
    for round in 0..200 {
        for slot in [0_u16, 16, 32, 48] {
            let unique = round * 100 + u64::from(slot);
            driver.send(slot, &request(15, 0, unique, &read(fh, 0, 4096)), 4112);
        }
        let mut heads: Vec<_> = (0..4).map(|_| driver.used()).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 16, 32, 48].map(|slot| (slot, 4112)));
    }
}

#[test]
fn chains_that_hold_no_request_go_back_empty() {
    let mut driver = Driver::new();
    driver.init();
    // Outside of guest memory.
    driver.write_descriptor(0, 0xffff_ffff_0000, 64, 0, 0);
    driver.offer(0);
    assert_eq!(driver.used(), (0, 0));
    // Shorter than a header.
    driver.send(0, &[0; 39], 4096);
    assert_eq!(driver.used(), (0, 0));
    // No room for a reply.
    driver.write_descriptor(0, BUFFERS, 64, 0, 0);
    driver.offer(0);
    assert_eq!(driver.used(), (0, 0));
    // A header that speaks of more than there is gets an error.
    let mut lie = request(3, 1, 7, &[0; 16]);
    lie[0] = 0xff;
    driver.send(0, &lie, 4096);
    let (_, length) = driver.used();
    let reply = driver.reply(0, length);
    let header = OutHeader::take(&mut reply.as_slice()).unwrap();
    assert_eq!((length, header.error), (16, -22));
    // And the device still works.
    driver.init();
    assert!(!driver.interrupts.broken.load(Ordering::SeqCst));
}

#[test]
fn a_broken_ring_marks_the_device_and_a_reset_mends_it() {
    let mut driver = Driver::new();
    driver.init();
    // 1000 chains in a ring of 64.
    let at = GuestAddress(0x2_1002);
    driver.memory.write_obj(1000_u16, at).unwrap();
    driver.kick.write(1).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !driver.interrupts.broken.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "the fault goes unnoticed");
        std::thread::yield_now();
    }
    driver.device.reset();
    for at in [0x2_1002, 0x2_2002] {
        driver.memory.write_obj(0_u16, GuestAddress(at)).unwrap();
    }
    (driver.available, driver.used) = (0, 0);
    driver.activate();
    // The session went with the reset.
    let (error, _) = driver.call(3, 1, &[0; 16], 4096);
    assert_eq!(error, -22);
    driver.init();
}

#[test]
fn the_configuration_names_the_share() {
    let driver = Driver::new();
    let mut config = [0xff; 48];
    driver.device.read_config(0, &mut config);
    assert_eq!(&config[..6], b"share\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut past = [1];
    driver.device.read_config(u64::MAX, &mut past);
    assert_eq!(past, [0]);
}

#[test]
fn a_tag_must_fit_its_field() {
    for tag in [String::new(), "x".repeat(37)] {
        let root = OwnedFd::from(File::open("/").unwrap());
        let options = Options::default();
        let made = Fs::new(FsConfig { tag, root, options });
        assert!(matches!(made, Err(FsError::Tag(_))));
    }
}
