// SPDX-License-Identifier: Apache-2.0
//! Requests as a driver makes them, good and bad, and the device's configuration.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::region::{BLOCK, Region};
use super::request::{ACK, ERROR, NACK, PLUG, STATE, UNPLUG, UNPLUG_ALL, serve};
use super::{MemDevice, Plugged};
use crate::devices::virtio::test_ring::{Ring, WRITE, descriptors};
use crate::devices::virtio::{Activation, DeviceFault, GuestMemory, Interrupt, VirtioDevice};

const START: u64 = 4 * BLOCK;
const BLOCKS: u64 = 4;
const END: u64 = START + BLOCKS * BLOCK;
const REQUEST: u64 = 0x8000;
const ANSWER: u64 = 0x9000;
const FILL: u8 = 0xab;

const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

fn memory() -> GuestMemoryMmap {
    let size = usize::try_from(END - START).unwrap();
    let ranges = [(GuestAddress(0), 0x10_0000), (GuestAddress(START), size)];
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

struct Fixture {
    memory: GuestMemoryMmap,
    region: Region,
}

impl Fixture {
    /// A region of which the guest may have all.
    fn new() -> Self {
        let mut region = Region::new(&(START..END));
        assert!(region.request(END - START));
        Self {
            memory: memory(),
            region,
        }
    }

    fn serve(&mut self, buffers: &[(u64, u32, u16)]) -> Result<u32, DeviceFault> {
        let queue = MockSplitQueue::new(&self.memory, 16);
        let chain = queue.build_desc_chain(&descriptors(buffers)).unwrap();
        serve(&mut self.region, &self.memory, chain)
    }

    fn write(&self, kind: u16, address: u64, count: u16) {
        write(&self.memory, kind, address, count);
    }

    /// The answer's type and state.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        self.write(kind, address, count);
        let buffers = [(REQUEST, 24, 0), (ANSWER, 10, WRITE)];
        assert_eq!(self.serve(&buffers).unwrap(), 10);
        let at = |offset| self.memory.read_obj(GuestAddress(ANSWER + offset)).unwrap();
        (at(0), at(8))
    }

    fn answer(&mut self, kind: u16, block: u64, count: u16) -> u16 {
        self.ask(kind, START + block * BLOCK, count).0
    }
}

fn write(memory: &GuestMemoryMmap, kind: u16, address: u64, count: u16) {
    let at = |offset| GuestAddress(REQUEST + offset);
    memory.write_obj(u64::from(kind), at(0)).unwrap();
    memory.write_obj(address, at(8)).unwrap();
    memory.write_obj(u64::from(count), at(16)).unwrap();
}

#[test]
fn blocks_are_plugged_and_unplugged() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.answer(PLUG, 1, 2), ACK);
    assert_eq!(fixture.region.plugged(), 2 * BLOCK);
    let mut state = |block, count| fixture.ask(STATE, START + block * BLOCK, count);
    assert_eq!(state(0, 1), (ACK, UNPLUGGED));
    assert_eq!(state(1, 2), (ACK, PLUGGED));
    assert_eq!(state(0, 4), (ACK, MIXED));
    assert_eq!(fixture.answer(UNPLUG, 2, 1), ACK);
    assert_eq!(fixture.region.plugged(), BLOCK);
    assert_eq!(fixture.answer(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(fixture.region.plugged(), 0);
    assert_eq!(fixture.answer(PLUG, 0, 4), ACK);
}

#[test]
fn what_is_unplugged_is_the_host_s() {
    let mut fixture = Fixture::new();
    fixture.answer(PLUG, 0, 4);
    let last = |block: u64| GuestAddress(START + (block + 1) * BLOCK - 1);
    for block in 0..BLOCKS {
        fixture.memory.write_obj(FILL, last(block)).unwrap();
    }
    let bytes = |fixture: &Fixture| -> Vec<u8> {
        let read = |block| fixture.memory.read_obj(last(block)).unwrap();
        (0..BLOCKS).map(read).collect()
    };
    fixture.answer(UNPLUG, 1, 2);
    assert_eq!(bytes(&fixture), [FILL, 0, 0, FILL]);
    fixture.answer(UNPLUG_ALL, 0, 0);
    assert_eq!(bytes(&fixture), [0; 4]);
}

#[test]
fn no_more_is_plugged_than_is_offered() {
    let mut fixture = Fixture::new();
    // Up to whole blocks, and to the region's end.
    assert!(fixture.region.request(BLOCK + 1));
    assert!(!fixture.region.request(2 * BLOCK));
    assert_eq!(fixture.answer(PLUG, 0, 3), NACK);
    assert_eq!(fixture.answer(PLUG, 0, 2), ACK);
    assert_eq!(fixture.answer(PLUG, 2, 1), NACK);
    assert!(fixture.region.request(u64::MAX));
    assert_eq!(fixture.region.requested(), END - START);
    assert_eq!(fixture.answer(PLUG, 2, 2), ACK);
    // What is plugged may stay, whatever is asked for.
    assert!(fixture.region.request(0));
    assert_eq!(fixture.region.plugged(), END - START);
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let mut fixture = Fixture::new();
    fixture.answer(PLUG, 1, 1);
    for (kind, address, count) in [
        (PLUG, START, 0),
        (PLUG, START, 2),
        (PLUG, START + 1, 1),
        (PLUG, START - BLOCK, 1),
        (PLUG, 0, 1),
        (PLUG, END, 1),
        (PLUG, END - BLOCK, 2),
        (PLUG, START, u16::MAX),
        (PLUG, u64::MAX, 1),
        (PLUG, !(BLOCK - 1), u16::MAX),
        (UNPLUG, START, 2),
        (UNPLUG, START + BLOCK, 0),
        (UNPLUG, START + BLOCK + 0x1000, 1),
        (UNPLUG, END, 1),
        (STATE, START, 5),
        (STATE, START - 1, 1),
        (4, START, 1),
        (u16::MAX, START, 1),
    ] {
        assert_eq!(
            fixture.ask(kind, address, count),
            (ERROR, 0),
            "{kind} {address:#x} {count}"
        );
        assert_eq!(fixture.region.plugged(), BLOCK);
    }
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let mut fixture = Fixture::new();
    fixture.write(PLUG, START, 1);
    let buffers = [
        (REQUEST, 1, 0),
        (REQUEST + 1, 0, 0),
        (REQUEST + 1, 30, 0),
        (ANSWER, 9, WRITE),
        (ANSWER + 9, 100, WRITE),
    ];
    assert_eq!(fixture.serve(&buffers).unwrap(), 10);
    assert_eq!(fixture.region.plugged(), BLOCK);
}

#[test]
fn buffers_that_are_too_small_or_nowhere_are_faults() {
    for buffers in [
        &[(REQUEST, 23, 0), (ANSWER, 10, WRITE)],
        &[(REQUEST, 24, 0), (ANSWER, 9, WRITE)],
        &[(REQUEST, 24, 0), (END, 10, WRITE)],
        &[(END - 1, 24, 0), (ANSWER, 10, WRITE)],
        &[(REQUEST, 24, WRITE), (ANSWER, 10, WRITE)],
    ] {
        let mut fixture = Fixture::new();
        fixture.write(UNPLUG_ALL, 0, 0);
        let result = fixture.serve(buffers);
        assert!(
            matches!(result, Err(DeviceFault::Driver(_))),
            "{buffers:x?}"
        );
    }
}

/// Counts both what a driver and what a machine is told.
#[derive(Debug, Default)]
struct Heard(AtomicUsize, Mutex<usize>);

impl Plugged for Heard {
    fn changed(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Interrupt for Heard {
    fn signal_queue(&self, _queue: u16) -> std::io::Result<()> {
        Ok(())
    }

    fn signal_config(&self) -> std::io::Result<()> {
        *self.1.lock().unwrap() += 1;
        Ok(())
    }

    fn device_needs_reset(&self) {}
}

fn config(device: &MemDevice) -> Vec<u64> {
    let mut bytes = [0xee; 64];
    device.read_config(0, &mut bytes);
    let (fields, _) = bytes.as_chunks::<8>();
    fields.iter().copied().map(u64::from_le_bytes).collect()
}

#[test]
fn a_driver_is_told_of_a_new_size_and_the_machine_of_what_it_took() {
    let heard = Arc::new(Heard::default());
    let mut device = MemDevice::new(&(START..END), Arc::clone(&heard) as _);
    let resizer = device.resizer();
    // Before there is a driver, nobody is interrupted.
    resizer.request(BLOCK).unwrap();
    let size = END - START;
    assert_eq!(config(&device), [BLOCK, 0, START, size, size, 0, BLOCK, 0]);

    let memory = memory();
    let mut ring = Ring::new(memory.clone(), 0, 0x1_0000, 16, 0x100);
    let activation = Activation {
        memory: GuestMemory::new(memory.clone()),
        features: device.features(),
        queues: vec![ring.active()],
        interrupt: Arc::clone(&heard) as _,
    };
    device.activate(activation).unwrap();
    resizer.request(BLOCK).unwrap();
    assert_eq!(*heard.1.lock().unwrap(), 0);
    resizer.request(2 * BLOCK).unwrap();
    assert_eq!(*heard.1.lock().unwrap(), 1);

    write(&memory, PLUG, START, 2);
    ring.describe(0, REQUEST, 24, 1, 1);
    ring.describe(1, ANSWER, 10, WRITE, 0);
    ring.offer(0);
    let begin = Instant::now();
    while heard.0.load(Ordering::SeqCst) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "nothing plugged");
        std::thread::yield_now();
    }
    assert_eq!(resizer.plugged(), 2 * BLOCK);
    // It is the guest's memory still.
    device.reset();
    assert_eq!(config(&device)[5], 2 * BLOCK);
    resizer.request(0).unwrap();
    assert_eq!(*heard.1.lock().unwrap(), 1);
}
