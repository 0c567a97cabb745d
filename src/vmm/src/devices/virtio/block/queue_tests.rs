// SPDX-License-Identifier: Apache-2.0
//! The device with its workers: several queues, fewer than there are, and none any more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::device::{FEATURE_FLUSH, FEATURE_MQ};
use super::direct_tests::open_direct;
use super::{BlockDevice, BlockError};
use crate::devices::virtio::test_ring::{NEXT, NoInterrupt, Ring, WRITE};
use crate::devices::virtio::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};

const PATIENCE: Duration = Duration::from_secs(30);
const SECTORS: u64 = 64;
/// Descriptors of a ring, of which a request takes three.
const SIZE: u16 = 16;

const IN: u32 = 0;
const OUT: u32 = 1;

struct Fixture {
    memory: GuestMemoryMmap,
    rings: Vec<Ring>,
    device: BlockDevice,
    file: File,
}

impl Fixture {
    /// A device with this many queues, and a ring for each.
    fn new(queues: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(SECTORS * 512).unwrap();
        let device = BlockDevice::new("disk", file.try_clone().unwrap(), false, queues).unwrap();
        let rings = (0..queues).map(|index| ring(&memory, index)).collect();
        Self {
            memory,
            rings,
            device,
            file,
        }
    }

    /// The same, in both ways that a disk can be served.
    fn both(queues: u16) -> [Self; 2] {
        let mut beside = Self::new(queues);
        beside.device.use_io_uring();
        [Self::new(queues), beside]
    }

    /// Starts the device for a driver that has enabled these queues.
    fn activate(
        &mut self,
        features: u64,
        enabled: &[usize],
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), ActivateError> {
        self.device.activate(Activation {
            memory: GuestMemory::new(self.memory.clone()),
            features: FEATURE_FLUSH | features,
            queues: enabled.iter().map(|at| self.rings[*at].active()).collect(),
            interrupt,
        })
    }

    /// Makes a request for one sector available; its data is full of `fill`.
    fn request(&mut self, queue: usize, kind: u32, sector: u64, fill: u8) {
        let ring = &mut self.rings[queue];
        let [header, data, status] = [0, 1, 2].map(|id| ring.buffer(id));
        self.memory.write_obj(kind, header).unwrap();
        self.memory
            .write_obj(sector, GuestAddress(header.0 + 8))
            .unwrap();
        self.memory.write_slice(&[fill; 512], data).unwrap();
        self.memory.write_obj(0xee_u8, status).unwrap();
        let access = if kind == IN { WRITE } else { 0 };
        ring.describe(0, header.0, 16, NEXT, 1);
        ring.describe(1, data.0, 512, NEXT | access, 2);
        ring.describe(2, status.0, 1, WRITE, 0);
        ring.offer(0);
    }

    /// Waits for the end of the request on a queue; returns its status.
    fn finish(&mut self, queue: usize) -> Option<u8> {
        let deadline = Instant::now() + PATIENCE;
        while self.rings[queue].take_used().is_none() {
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let status = self.rings[queue].buffer(2);
        Some(self.memory.read_obj(status).unwrap())
    }

    fn sector(&self, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

#[test]
fn a_disk_does_as_much_as_it_may() {
    let mut fixture = Fixture::new(2);
    // A request in a fifth of a second, whichever queue it comes by.
    fixture.device.limit(0, 5);
    let interrupt = Arc::new(NoInterrupt);
    fixture.activate(FEATURE_MQ, &[0, 1], interrupt).unwrap();
    let begin = Instant::now();
    for round in 0..6 {
        let queue = round % 2;
        fixture.request(queue, OUT, round as u64, round as u8);
        fixture.rings[queue].kick.write(1).unwrap();
        assert_eq!(fixture.finish(queue), Some(0));
    }
    let time = begin.elapsed();
    assert!(time >= Duration::from_millis(700), "{time:?}");
    assert!(time < PATIENCE / 2, "{time:?}");
    assert_eq!(fixture.sector(5), [5; 512]);
    fixture.device.reset();
}

fn ring(memory: &GuestMemoryMmap, index: u16) -> Ring {
    Ring::new(memory.clone(), index, u64::from(index) << 16, SIZE, 512)
}

/// Holds each queue's worker until the other has come as well.
#[derive(Debug, Default)]
struct Meeting {
    here: Mutex<u16>,
    changed: Condvar,
    missed: AtomicBool,
}

impl Interrupt for Meeting {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        let mut here = self.here.lock().unwrap();
        *here += 1;
        self.changed.notify_all();
        let alone = |here: &mut u16| *here < 2;
        let waited = self.changed.wait_timeout_while(here, PATIENCE, alone);
        if waited.unwrap().1.timed_out() {
            self.missed.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }

    fn device_needs_reset(&self) {
        self.missed.store(true, Ordering::Relaxed);
    }
}

#[test]
fn two_queues_are_served_at_once() {
    for mut fixture in Fixture::both(2) {
        let meeting = Arc::new(Meeting::default());
        let interrupt = Arc::clone(&meeting) as Arc<dyn Interrupt>;
        fixture.activate(FEATURE_MQ, &[0, 1], interrupt).unwrap();
        fixture.request(0, OUT, 3, 0x33);
        fixture.request(1, OUT, 4, 0x44);
        assert_eq!(fixture.finish(0), Some(0));
        assert_eq!(fixture.finish(1), Some(0));
        // Both workers have ended then, and so has their wait for each other.
        fixture.device.reset();
        assert!(!meeting.missed.load(Ordering::Relaxed));
        assert_eq!(fixture.sector(3), [0x33; 512]);
        assert_eq!(fixture.sector(4), [0x44; 512]);
    }
}

#[test]
fn what_one_queue_wrote_the_other_reads() {
    for mut fixture in Fixture::both(2) {
        let interrupt = Arc::new(NoInterrupt);
        fixture.activate(FEATURE_MQ, &[0, 1], interrupt).unwrap();
        for round in 1..50 {
            let (writer, reader) = (usize::from(round % 2), usize::from((round + 1) % 2));
            fixture.request(writer, OUT, 5, round);
            assert_eq!(fixture.finish(writer), Some(0));
            fixture.request(reader, IN, 5, 0);
            assert_eq!(fixture.finish(reader), Some(0));
            let data = fixture.rings[reader].buffer(1);
            let mut bytes = [0; 512];
            fixture.memory.read_slice(&mut bytes, data).unwrap();
            assert_eq!(bytes, [round; 512]);
        }
    }
}

#[test]
fn a_driver_may_use_fewer_queues() {
    for (features, enabled) in [
        (FEATURE_MQ, &[0][..]),
        (FEATURE_MQ, &[2]),
        (FEATURE_MQ, &[0, 1, 3]),
        // Unaware of the others.
        (0, &[0]),
    ] {
        let mut fixture = Fixture::new(4);
        fixture
            .activate(features, enabled, Arc::new(NoInterrupt))
            .unwrap();
        for queue in enabled {
            fixture.request(*queue, OUT, 1, 0x11);
            assert_eq!(fixture.finish(*queue), Some(0));
        }
    }
}

#[test]
fn a_driver_without_a_queue_is_told() {
    for (features, enabled) in [(FEATURE_MQ, &[][..]), (0, &[]), (0, &[1])] {
        let mut fixture = Fixture::new(2);
        let error = fixture.activate(features, enabled, Arc::new(NoInterrupt));
        assert!(matches!(
            error,
            Err(ActivateError::QueueCount { expected: 1, .. })
        ));
    }
}

#[test]
fn a_reset_ends_all_queues_and_a_driver_may_come_back() {
    for mut fixture in Fixture::both(2) {
        for round in 1..20 {
            fixture.rings = (0..2).map(|index| ring(&fixture.memory, index)).collect();
            fixture
                .memory
                .write_slice(&[0; 0x4000], GuestAddress(0))
                .unwrap();
            fixture
                .memory
                .write_slice(&[0; 0x4000], GuestAddress(0x1_0000))
                .unwrap();
            let interrupt = Arc::new(NoInterrupt);
            fixture.activate(FEATURE_MQ, &[0, 1], interrupt).unwrap();
            for queue in 0..2 {
                fixture.request(queue, OUT, 7 + queue as u64, round);
            }
            // Served or not: nothing is half done, and nothing happens any more.
            fixture.device.reset();
            for queue in 0..2 {
                let status = fixture.rings[queue].buffer(2);
                let status: u8 = fixture.memory.read_obj(status).unwrap();
                let used = fixture.rings[queue].take_used().is_some();
                assert_eq!(used, status == 0);
                if used {
                    assert_eq!(fixture.sector(7 + queue as u64), [round; 512]);
                    fixture.request(queue, OUT, 9, 0x99);
                    fixture.rings[queue].kick.write(1).unwrap();
                }
            }
            assert_eq!(fixture.sector(9), [0; 512]);
        }
        fixture.device.reset();
    }
}

#[test]
fn the_number_of_queues_is_told_and_bounded() {
    let fixture = Fixture::new(3);
    assert_eq!(fixture.device.queue_max_sizes(), [256; 3]);
    assert_eq!(fixture.device.features() & FEATURE_MQ, FEATURE_MQ);
    let mut queues = [0; 2];
    fixture.device.read_config(34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 3);
    // A single queue goes without saying.
    let fixture = Fixture::new(1);
    assert_eq!(fixture.device.features() & FEATURE_MQ, 0);
    fixture.device.read_config(34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 0);

    for queues in [0, BlockDevice::MAX_QUEUES + 1, u16::MAX] {
        let file = fixture.file.try_clone().unwrap();
        assert!(matches!(
            BlockDevice::new("disk", file, false, queues),
            Err(BlockError::Queues { .. })
        ));
    }
}

#[test]
fn a_part_of_a_block_is_written_when_no_other_block_is() {
    const BLOCK: u32 = 4096;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let file = open_direct();
    file.set_len(SECTORS * 512).unwrap();
    let mut device = BlockDevice::new("disk", file.try_clone().unwrap(), false, 1).unwrap();
    device.use_io_uring();
    let mut ring = Ring::new(memory.clone(), 0, 0, SIZE, BLOCK);
    // Blocks 1 and 2, and two sectors of block 3, all at once: none that overlap, for these have no order.
    let requests = [(8, BLOCK, 1), (26, 512, 2), (16, BLOCK, 3), (28, 512, 4)];
    for (first, (sector, len, fill)) in (0_u16..).step_by(3).zip(requests) {
        let [header, data, status] = [0, 1, 2].map(|id| ring.buffer(first + id));
        memory.write_obj(OUT, header).unwrap();
        memory
            .write_obj(sector, GuestAddress(header.0 + 8))
            .unwrap();
        memory.write_slice(&vec![fill; len as usize], data).unwrap();
        ring.describe(first, header.0, 16, NEXT, first + 1);
        ring.describe(first + 1, data.0, len, NEXT, first + 2);
        ring.describe(first + 2, status.0, 1, WRITE, 0);
        ring.offer_quietly(first);
    }
    let activation = Activation {
        memory: GuestMemory::new(memory.clone()),
        features: FEATURE_FLUSH,
        queues: vec![ring.active()],
        interrupt: Arc::new(NoInterrupt),
    };
    device.activate(activation).unwrap();
    ring.kick.write(1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut done = 0;
    while done < requests.len() {
        assert!(Instant::now() < deadline, "{done} requests are done");
        done += usize::from(ring.take_used().is_some());
        thread::yield_now();
    }
    device.reset();
    let mut disk = Aligned([0; 0x8000]);
    file.read_exact_at(&mut disk.0, 0).unwrap();
    let mut expected = [0; 0x8000];
    for (sector, len, fill) in requests {
        let at = usize::try_from(sector * 512_u64).unwrap();
        expected[at..at + len as usize].fill(fill);
    }
    assert!(disk.0 == expected);
}

/// What O_DIRECT reads into.
#[repr(align(4096))]
struct Aligned([u8; 0x8000]);
