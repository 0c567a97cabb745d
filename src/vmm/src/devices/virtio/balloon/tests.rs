// SPDX-License-Identifier: Apache-2.0
//! Requests as a driver makes them, good and bad, and the device's three queues.

use std::time::{Duration, Instant};

use virtio_queue::DescriptorChain;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BalloonDevice;
use super::device::PAGE_REPORTING;
use super::request::{MAX_PAGES, MAX_RANGES, inflate, report};
use crate::devices::virtio::test_ring::{NoInterrupt, Ring, WRITE, descriptors};
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceFault, GuestMemory, VirtioDevice,
};

const PAGE: u64 = 0x1000;
/// Where page numbers are written; the ring lies before them, the pages to give away behind.
const NUMBERS: u64 = 0x8000;
const FIRST: u64 = 0x10;
/// Two regions side by side; then nothing up to a third.
const BORDER: u64 = 0x20;
const HOLE: u64 = 0x30;
const FAR: u64 = 0x40;
const END: u64 = 0x50;
const FILL: u8 = 0xab;

type Serve = fn(&GuestMemoryMmap, DescriptorChain<&GuestMemoryMmap>) -> Result<u32, DeviceFault>;

struct Fixture {
    memory: GuestMemoryMmap,
}

impl Fixture {
    /// Memory whose pages from `FIRST` on hold a pattern.
    fn new() -> Self {
        let pages = [(0, BORDER), (BORDER, HOLE), (FAR, END)];
        let range = |(start, end)| (GuestAddress(start * PAGE), ((end - start) * PAGE) as usize);
        let memory = GuestMemoryMmap::from_ranges(&pages.map(range)).unwrap();
        for page in (FIRST..HOLE).chain(FAR..END) {
            let at = GuestAddress(page * PAGE);
            memory.write_slice(&[FILL; PAGE as usize], at).unwrap();
        }
        Self { memory }
    }

    /// Serves a chain of (address, length, flags).
    fn serve(&self, serve: Serve, buffers: &[(u64, u32, u16)]) -> Result<u32, DeviceFault> {
        let queue = MockSplitQueue::new(&self.memory, 256);
        let chain = queue.build_desc_chain(&descriptors(buffers)).unwrap();
        serve(&self.memory, chain)
    }

    fn report(&self, ranges: &[(u64, u32)]) -> Result<u32, DeviceFault> {
        let buffers: Vec<_> = ranges
            .iter()
            .map(|(address, len)| (*address, *len, WRITE))
            .collect();
        self.serve(report, &buffers)
    }

    fn inflate(&self, pages: &[u32]) -> Result<u32, DeviceFault> {
        let len = self.number(pages);
        self.serve(inflate, &[(NUMBERS, len, 0)])
    }

    /// Writes page numbers; returns the bytes that they take.
    fn number(&self, pages: &[u32]) -> u32 {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.memory
            .write_slice(&bytes, GuestAddress(NUMBERS))
            .unwrap();
        bytes.len() as u32
    }

    /// The pages that read as zero; every other one holds its pattern still.
    fn zeroed(&self) -> Vec<u64> {
        let mut zeroed = Vec::new();
        for page in (FIRST..HOLE).chain(FAR..END) {
            let mut bytes = [0; PAGE as usize];
            let at = GuestAddress(page * PAGE);
            self.memory.read_slice(&mut bytes, at).unwrap();
            if bytes == [0; PAGE as usize] {
                zeroed.push(page);
            } else {
                assert_eq!(bytes, [FILL; PAGE as usize], "page {page:#x}");
            }
        }
        zeroed
    }
}

#[test]
fn reported_ranges_are_given_back() {
    let fixture = Fixture::new();
    let ranges = [(0x12 * PAGE, 0x2000), (FAR * PAGE, 0x1000)];
    assert_eq!(fixture.report(&ranges).unwrap(), 0);
    assert_eq!(fixture.zeroed(), [0x12, 0x13, FAR]);
    // And may be used again.
    let at = GuestAddress(0x12 * PAGE);
    fixture.memory.write_slice(&[FILL; 0x1000], at).unwrap();
    assert_eq!(fixture.zeroed(), [0x13, FAR]);
}

#[test]
fn a_reported_range_may_go_on_in_the_next_region() {
    let fixture = Fixture::new();
    fixture.report(&[((BORDER - 1) * PAGE, 0x2000)]).unwrap();
    assert_eq!(fixture.zeroed(), [BORDER - 1, BORDER]);
}

#[test]
fn of_a_misaligned_range_whole_pages_go() {
    let fixture = Fixture::new();
    let ranges = [
        (0x12 * PAGE + 1, 0x2000),
        (0x16 * PAGE, 0x1fff),
        (0x1a * PAGE + 1, 0x1fff),
        (0x1e * PAGE, 0xfff),
        (0x22 * PAGE, 0),
    ];
    fixture.report(&ranges).unwrap();
    assert_eq!(fixture.zeroed(), [0x13, 0x16, 0x1b]);
}

#[test]
fn reports_that_may_not_be_written_are_none() {
    let fixture = Fixture::new();
    let buffers = [(0x12 * PAGE, 0x1000, 0), (0x14 * PAGE, 0x1000, WRITE)];
    assert_eq!(fixture.serve(report, &buffers).unwrap(), 0);
    assert_eq!(fixture.zeroed(), [0x14]);
}

#[test]
fn reports_of_memory_that_is_not_there_are_faults() {
    for (address, len) in [
        (HOLE * PAGE, 0x1000),
        ((HOLE - 1) * PAGE, 0x2000),
        ((FAR - 1) * PAGE, 0x2000),
        ((END - 1) * PAGE, 0x2000),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 0xfff, 0x1000),
        (u64::MAX - 0xfff, 0x2000),
        (0u64.wrapping_sub(PAGE), u32::MAX),
    ] {
        let fixture = Fixture::new();
        let result = fixture.report(&[(address, len)]);
        assert!(
            matches!(result, Err(DeviceFault::Driver(_))),
            "{address:#x} {len:#x}: {result:?}"
        );
        // Not a page that the range does not hold.
        let zeroed = fixture.zeroed();
        let expected = |page: &u64| (address / PAGE..).contains(page);
        assert!(zeroed.iter().all(expected), "{zeroed:x?}");
    }
}

#[test]
fn a_request_reports_no_more_ranges_than_a_queue_holds() {
    let range = (0x12 * PAGE, 0x1000);
    Fixture::new().report(&[range; MAX_RANGES]).unwrap();
    let result = Fixture::new().report(&[range; MAX_RANGES + 1]);
    assert!(matches!(result, Err(DeviceFault::Driver(_))), "{result:?}");
}

#[test]
fn pages_of_the_balloon_are_given_back() {
    let fixture = Fixture::new();
    let pages = [0x15, 0x13, 0x14, 0x18, 0x13, 0x1f, 0x20, 0x4f];
    assert_eq!(fixture.inflate(&pages).unwrap(), 0);
    let zeroed = [0x13, 0x14, 0x15, 0x18, 0x1f, 0x20, 0x4f];
    assert_eq!(fixture.zeroed(), zeroed);
    // What is taken out of the balloon may be used.
    let at = GuestAddress(0x14 * PAGE);
    fixture.memory.write_slice(&[FILL; 0x1000], at).unwrap();
    assert_eq!(fixture.zeroed(), [0x13, 0x15, 0x18, 0x1f, 0x20, 0x4f]);
    assert_eq!(fixture.inflate(&[]).unwrap(), 0);
}

#[test]
fn page_numbers_may_be_cut_anywhere() {
    let fixture = Fixture::new();
    fixture.number(&[0x12, 0x16, 0x18]);
    let buffers = [
        (NUMBERS, 3, 0),
        (NUMBERS + 3, 0, 0),
        (NUMBERS + 3, 6, 0),
        (NUMBERS + 9, 3, 0),
        // For the device to write, which it has nothing for.
        (0x1a * PAGE, 0x1000, WRITE),
    ];
    assert_eq!(fixture.serve(inflate, &buffers).unwrap(), 0);
    assert_eq!(fixture.zeroed(), [0x12, 0x16, 0x18]);
}

#[test]
fn pages_that_are_not_there_are_faults() {
    for pages in [
        &[HOLE as u32][..],
        &[END as u32],
        &[u32::MAX],
        &[u32::MAX, u32::MAX - 1],
        &[HOLE as u32 - 1, HOLE as u32],
    ] {
        let fixture = Fixture::new();
        let result = fixture.inflate(pages);
        assert!(
            matches!(result, Err(DeviceFault::Driver(_))),
            "{pages:x?}: {result:?}"
        );
    }
}

#[test]
fn page_numbers_that_make_no_sense_are_faults() {
    let fixture = Fixture::new();
    fixture.number(&[0x12, 0x13]);
    for (address, len) in [
        // Half a number, too many, outside of memory.
        (NUMBERS, 7),
        (NUMBERS, MAX_PAGES as u32 * 4 + 4),
        (NUMBERS, u32::MAX),
        (HOLE * PAGE - 4, 8),
        (u64::MAX, 4),
    ] {
        let result = fixture.serve(inflate, &[(address, len, 0)]);
        assert!(
            matches!(result, Err(DeviceFault::Driver(_))),
            "{address:#x} {len:#x}: {result:?}"
        );
    }
    assert!(fixture.zeroed().is_empty());
}

#[test]
fn the_configuration_holds_what_the_driver_writes() {
    let mut device = BalloonDevice::new();
    let read = |device: &BalloonDevice| {
        let mut config = [0xff; 16];
        device.read_config(0, &mut config);
        config
    };
    device.write_config(0, &[1; 4]);
    device.write_config(4, &[1; 3]);
    device.write_config(4, &[1; 8]);
    device.write_config(8, &[1; 4]);
    device.write_config(u64::MAX, &[1; 4]);
    assert_eq!(read(&device), [0; 16]);
    device.write_config(4, &[1, 2, 3, 4]);
    assert_eq!(read(&device)[..8], [0, 0, 0, 0, 1, 2, 3, 4]);
    device.reset();
    assert_eq!(read(&device), [0; 16]);
}

fn activation(features: u64, memory: &GuestMemoryMmap, queues: Vec<ActiveQueue>) -> Activation {
    Activation {
        memory: GuestMemory::new(memory.clone()),
        features,
        queues,
        interrupt: std::sync::Arc::new(NoInterrupt),
    }
}

#[test]
fn each_queue_is_served() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let ring = |index: u16| {
        let base = 0x1_0000 * u64::from(index);
        Ring::new(memory.clone(), index, base, 16, 0x100)
    };
    let mut rings = [ring(0), ring(1), ring(2)];
    let queues = rings.iter().map(Ring::active).collect();
    let mut device = BalloonDevice::new();
    device
        .activate(activation(PAGE_REPORTING, &memory, queues))
        .unwrap();

    let pages = [0x80_u64, 0x81, 0x82, 0x83];
    for page in pages {
        let at = GuestAddress(page * PAGE);
        memory.write_slice(&[FILL; PAGE as usize], at).unwrap();
    }
    for (ring, page) in rings.iter_mut().zip(pages) {
        let buffer = ring.buffer(0);
        memory
            .write_obj(u32::try_from(page).unwrap(), buffer)
            .unwrap();
        ring.describe(0, buffer.0, 4, 0, 0);
    }
    let [_, _, reports] = &rings;
    reports.describe(0, 0x82 * PAGE, 0x1000, WRITE, 0);
    for ring in &mut rings {
        ring.offer(0);
        let begin = Instant::now();
        let used = loop {
            if let Some(used) = ring.take_used() {
                break used;
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "no answer");
            std::thread::yield_now();
        };
        assert_eq!(used, (0, 0));
    }
    device.reset();
    let first = pages.map(|page| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap());
    assert_eq!(first, [0, FILL, 0, FILL]);
}

#[test]
fn a_driver_that_reports_nothing_has_two_queues() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let queues = |count: u16| {
        let ring = |index| Ring::new(memory.clone(), index, 0, 16, 0x100).active();
        (0..count).map(ring).collect::<Vec<_>>()
    };
    for (features, count, fits) in [
        (0, 2, true),
        (PAGE_REPORTING, 3, true),
        (0, 1, false),
        (0, 3, false),
        (PAGE_REPORTING, 2, false),
    ] {
        let mut device = BalloonDevice::new();
        let result = device.activate(activation(features, &memory, queues(count)));
        match result {
            Ok(()) => assert!(fits, "{features:#x} {count}"),
            Err(ActivateError::QueueCount { .. }) => assert!(!fits, "{features:#x} {count}"),
            Err(error) => panic!("{error}"),
        }
    }
}
