// SPDX-License-Identifier: Apache-2.0
//! Requests as a driver makes them, good and bad.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicU64;

use fuse_server::Complaints;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::device::{FEATURE_DISCARD, FEATURE_FLUSH, FEATURE_WRITE_ZEROES};
use super::discard::{MAX_DISCARD, MAX_RANGES, MAX_ZEROES};
use super::request::{Disk, IO_ERROR, OK, Request, SERIAL_LEN, UNSUPPORTED};
use super::{BlockDevice, BlockError};
use crate::devices::virtio::test_ring::{NEXT, WRITE, descriptors};
use crate::devices::virtio::{DeviceFault, VirtioDevice};

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x6000;
/// What a status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xee;
const SECTORS: u64 = 8;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

/// Sectors of a page, which is the least that a file in memory gives back.
const PAGE: u64 = 8;

struct Fixture {
    memory: GuestMemoryMmap,
    disk: Disk,
    features: u64,
}

impl Fixture {
    fn new(read_only: bool) -> Self {
        Self::on(tempfile::tempfile().unwrap(), SECTORS, read_only)
    }

    /// A disk in memory, of a kind that has holes and no cheaper way to zeroes.
    fn in_memory(sectors: u64) -> Self {
        let file = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
        Self::on(file.into(), sectors, false)
    }

    /// A disk on what takes neither and can't be flushed.
    fn on_a_device() -> Self {
        let zero = File::options().read(true).write(true).open("/dev/zero");
        Self::on(zero.unwrap(), SECTORS, false)
    }

    fn on(mut file: File, sectors: u64, read_only: bool) -> Self {
        let ranges = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        let bytes: Vec<u8> = (0..sectors * 512).map(|at| (at / 512 + at) as u8).collect();
        file.write_all(&bytes).unwrap();
        let mut serial = [0; SERIAL_LEN];
        serial[..4].copy_from_slice(b"root");
        let disk = Disk {
            name: "disk".to_owned(),
            file,
            direct: None,
            sectors: AtomicU64::new(sectors),
            filled: AtomicU64::new(0),
            read_only,
            serial,
            complaints: Complaints::default(),
        };
        Self {
            memory,
            disk,
            features: FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory
            .write_obj(0_u32, GuestAddress(HEADER + 4))
            .unwrap();
        self.memory
            .write_obj(sector, GuestAddress(HEADER + 8))
            .unwrap();
    }

    /// Serves a chain of (address, length, flags).
    fn serve(&self, buffers: &[(u64, u32, u16)]) -> Result<u32, DeviceFault> {
        let queue = MockSplitQueue::new(&self.memory, 16);
        let chain = queue.build_desc_chain(&descriptors(buffers)).unwrap();
        let request = Request::of(&self.memory, chain)?;
        self.disk.serve(&self.memory, request, self.features)
    }

    /// A request with one data buffer.
    fn request(&self, kind: u32, sector: u64, len: u32) -> (u32, u8) {
        self.header(kind, sector);
        let data = if kind == OUT { 0 } else { WRITE };
        let mut buffers = vec![(HEADER, 16, 0)];
        if len > 0 {
            buffers.push((DATA, len, data));
        }
        buffers.push((STATUS, 1, WRITE));
        let written = self.serve(&buffers).unwrap();
        (written, self.status())
    }

    /// A request to discard or to write zeroes to ranges of (sector, count, flags).
    fn clear(&self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut list = Vec::new();
        for (sector, count, flags) in ranges {
            list.extend(sector.to_le_bytes());
            list.extend(count.to_le_bytes());
            list.extend(flags.to_le_bytes());
        }
        self.clear_with(kind, &list)
    }

    /// The same with a list of any bytes.
    fn clear_with(&self, kind: u32, list: &[u8]) -> u8 {
        self.header(kind, 0);
        self.memory.write_slice(list, GuestAddress(DATA)).unwrap();
        let mut buffers = vec![(HEADER, 16, 0)];
        if !list.is_empty() {
            buffers.push((DATA, list.len().try_into().unwrap(), 0));
        }
        buffers.push((STATUS, 1, WRITE));
        assert_eq!(self.serve(&buffers).unwrap(), 1);
        self.status()
    }

    /// Bytes that the file takes on the host.
    fn allocated(&self) -> u64 {
        self.disk.file.metadata().unwrap().blocks() * 512
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(DATA))
            .unwrap();
        data
    }

    fn contents(&self) -> Vec<u8> {
        let mut file = self.disk.file.try_clone().unwrap();
        let mut contents = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut contents).unwrap();
        contents
    }
}

#[test]
fn sectors_are_read() {
    let fixture = Fixture::new(true);
    assert_eq!(fixture.request(IN, 2, 1024), (1025, OK));
    assert_eq!(fixture.data(1024), fixture.contents()[1024..2048]);
    assert_eq!(fixture.request(IN, SECTORS - 1, 512), (513, OK));
    assert_eq!(fixture.request(IN, SECTORS, 0), (1, OK));
}

#[test]
fn sectors_are_written() {
    let fixture = Fixture::new(false);
    fixture
        .memory
        .write_slice(&[0xab; 512], GuestAddress(DATA))
        .unwrap();
    assert_eq!(fixture.request(OUT, 3, 512), (1, OK));
    assert_eq!(fixture.contents()[1536..2048], [0xab; 512]);
    assert_eq!(fixture.contents().len(), 4096);
    assert_eq!(fixture.request(FLUSH, 0, 0), (1, OK));
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let fixture = Fixture::new(false);
    fixture.header(IN, 1);
    // The header in three parts, the data across two memory regions and with its last byte
    // beside the status.
    let buffers = [
        (HEADER, 3, 0),
        (HEADER + 3, 12, 0),
        (HEADER + 15, 1, 0),
        (0x1_0000 - 100, 511, WRITE),
        (STATUS - 1, 2, WRITE),
    ];
    assert_eq!(fixture.serve(&buffers).unwrap(), 513);
    assert_eq!(fixture.status(), OK);
    let mut data = [0; 511];
    fixture
        .memory
        .read_slice(&mut data, GuestAddress(0x1_0000 - 100))
        .unwrap();
    let contents = fixture.contents();
    assert_eq!(data, contents[512..1023]);
    let last: u8 = fixture.memory.read_obj(GuestAddress(STATUS - 1)).unwrap();
    assert_eq!(last, contents[1023]);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let fixture = Fixture::new(true);
    let before = fixture.contents();
    assert_eq!(fixture.request(OUT, 0, 512), (1, IO_ERROR));
    assert_eq!(fixture.contents(), before);
}

#[test]
fn transfers_outside_of_the_disk_are_refused() {
    let fixture = Fixture::new(false);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (0, 100),
        (0, 513),
    ] {
        for kind in [IN, OUT] {
            assert_eq!(
                fixture.request(kind, sector, len),
                (1, IO_ERROR),
                "{sector} {len}"
            );
        }
    }
    assert_eq!(fixture.contents().len(), 4096);
}

#[test]
fn a_file_that_shrank_is_an_error() {
    let fixture = Fixture::new(false);
    fixture.disk.file.set_len(1024).unwrap();
    assert_eq!(fixture.request(IN, 1, 1024), (1, IO_ERROR));
    assert_eq!(fixture.request(IN, 0, 1024), (1025, OK));
}

#[test]
fn unknown_requests_are_unsupported() {
    let fixture = Fixture::new(false);
    // SCSI pass-through, lifetime and secure erase among them: none is offered.
    for kind in [2, 3, 5, 10, 12, 14, 0x1000_0000, u32::MAX] {
        assert_eq!(fixture.request(kind, 0, 512), (1, UNSUPPORTED));
    }
}

#[test]
fn the_serial_number_is_told() {
    let fixture = Fixture::new(true);
    assert_eq!(fixture.request(GET_ID, 0, 20), (21, OK));
    assert_eq!(&fixture.data(5), b"root\0");
    assert_eq!(fixture.request(GET_ID, 0, 2), (3, OK));
    assert_eq!(fixture.request(GET_ID, 0, 512), (21, OK));
}

#[test]
fn a_short_header_is_an_error() {
    let fixture = Fixture::new(false);
    fixture.header(IN, 0);
    let written = fixture.serve(&[(HEADER, 15, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!((written.unwrap(), fixture.status()), (1, IO_ERROR));
    let written = fixture.serve(&[(STATUS, 1, WRITE)]);
    assert_eq!((written.unwrap(), fixture.status()), (1, IO_ERROR));
}

#[test]
fn a_header_in_writable_memory_is_no_header() {
    let fixture = Fixture::new(false);
    fixture.header(IN, 0);
    let written = fixture.serve(&[(HEADER, 16, WRITE), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!((written.unwrap(), fixture.status()), (1, IO_ERROR));
}

#[test]
fn without_an_answer_possible_the_device_fails() {
    let fixture = Fixture::new(false);
    fixture.header(OUT, 0);
    let before = fixture.contents();
    for buffers in [
        // No status byte, a status byte that may not be written, none of either.
        &[(HEADER, 16, 0), (DATA, 512, 0)][..],
        &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, 0)],
        &[(STATUS, 0, WRITE)],
        // Readable behind writable.
        &[(HEADER, 16, 0), (STATUS, 1, WRITE), (DATA, 512, 0)],
        // Outside of memory.
        &[(u64::MAX, 16, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (0x1_fffe, 512, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (DATA, u32::MAX, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (DATA, 512, 0), (0x2_0000, 1, WRITE)],
    ] {
        assert!(fixture.serve(buffers).is_err(), "{buffers:?}");
    }
    assert_eq!(fixture.contents(), before);
    assert_eq!(fixture.status(), UNTOUCHED);
}

#[test]
fn a_chain_that_bites_its_tail_ends() {
    let fixture = Fixture::new(false);
    fixture.header(IN, 0);
    let queue = MockSplitQueue::new(&fixture.memory, 16);
    let descriptors = [
        RawDescriptor::from(Descriptor::new(HEADER, 16, NEXT, 1)),
        RawDescriptor::from(Descriptor::new(DATA, 512, WRITE | NEXT, 1)),
    ];
    queue.desc_table().store(0, descriptors[0]).unwrap();
    queue.desc_table().store(1, descriptors[1]).unwrap();
    let chain = queue.build_desc_chain(&descriptors).unwrap();
    // Fifteen buffers of 512 bytes, the last byte of which is the status.
    let request = Request::of(&fixture.memory, chain).unwrap();
    assert_eq!(fixture.disk.serve(&fixture.memory, request, 0).unwrap(), 1);
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512 + 511).unwrap();
    let writable = BlockDevice::new("root", file.try_clone().unwrap(), false, 1).unwrap();
    let device = BlockDevice::new("root", file, true, 1).unwrap();
    let mut config = [0xff; 64];
    device.read_config(0, &mut config);
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SECTORS);
    assert_eq!(u32::from_le_bytes(config[12..16].try_into().unwrap()), 254);
    assert_eq!(u32::from_le_bytes(config[20..24].try_into().unwrap()), 512);
    assert_eq!(config[24..], [0; 40]);
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
    assert_eq!(device.features() & 1 << 5, 1 << 5);
    // Nothing that changes a disk is offered on one that is read only.
    let clearing = FEATURE_DISCARD | FEATURE_WRITE_ZEROES;
    assert_eq!(device.features() & clearing, 0);

    assert_eq!(writable.features() & (clearing | 1 << 5), clearing);
    writable.read_config(0, &mut config);
    let field = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((field(36), field(40)), (MAX_DISCARD, MAX_RANGES));
    assert!(field(44) > 0);
    assert_eq!((field(48), field(52)), (MAX_ZEROES, MAX_RANGES));
    assert_eq!(config[56..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

/// Clears pages 1 and 4 of a disk of six in memory; returns what the disk holds, what it should,
/// and how many bytes the file has given back.
fn clear_two_pages(kind: u32, flags: u32) -> (Vec<u8>, Vec<u8>, u64) {
    let fixture = Fixture::in_memory(6 * PAGE);
    let (mut expected, before) = (fixture.contents(), fixture.allocated());
    let ranges = [(PAGE, 8, flags), (4 * PAGE, 8, flags)];
    assert_eq!(fixture.clear(kind, &ranges), OK);
    expected[4096..2 * 4096].fill(0);
    expected[4 * 4096..5 * 4096].fill(0);
    let given_back = before - fixture.allocated();
    (fixture.contents(), expected, given_back)
}

#[test]
fn discarded_ranges_become_holes_and_the_rest_stays() {
    let (contents, expected, given_back) = clear_two_pages(DISCARD, 0);
    assert!(contents == expected);
    assert_eq!(given_back, 2 * 4096);
}

#[test]
fn zeroes_become_holes_only_where_the_driver_lets_them() {
    let (contents, expected, given_back) = clear_two_pages(WRITE_ZEROES, UNMAP);
    assert!(contents == expected);
    assert_eq!(given_back, 2 * 4096);
    let (contents, expected, given_back) = clear_two_pages(WRITE_ZEROES, 0);
    assert!(contents == expected);
    assert_eq!(given_back, 0);
}

#[test]
fn zeroes_fill_any_sectors_on_any_file_system() {
    // Whatever this one can do; in memory, they are written, and in several pieces here.
    let sectors = 400;
    for fixture in [
        Fixture::on(tempfile::tempfile().unwrap(), sectors, false),
        Fixture::in_memory(sectors),
    ] {
        let mut expected = fixture.contents();
        for flags in [0, UNMAP] {
            // Within a page, across pages, up to the end, and none at all.
            let start = u64::from(flags);
            for (sector, count) in [(start + 1, 1), (start + 5, 290), (398, 2), (400, 0)] {
                let count_bytes = usize::try_from(count).unwrap() * 512;
                let at = usize::try_from(sector).unwrap() * 512;
                assert_eq!(fixture.clear(WRITE_ZEROES, &[(sector, count, flags)]), OK);
                expected[at..at + count_bytes].fill(0);
                assert!(fixture.contents() == expected, "{sector} {count} {flags}");
            }
        }
    }
}

#[test]
fn a_file_that_can_do_neither_is_no_error() {
    let fixture = Fixture::on_a_device();
    assert_eq!(fixture.clear(DISCARD, &[(0, 8, 0)]), OK);
    for flags in [0, UNMAP] {
        assert_eq!(fixture.clear(WRITE_ZEROES, &[(0, 8, flags)]), OK);
    }
}

#[test]
fn zeroes_are_safe_when_a_driver_that_does_not_flush_is_told() {
    let mut fixture = Fixture::on_a_device();
    fixture.features &= !FEATURE_FLUSH;
    // It can't be flushed, which shows that it would have been.
    assert_eq!(fixture.clear(WRITE_ZEROES, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(fixture.clear(DISCARD, &[(0, 8, 0)]), OK);
}

#[test]
fn a_host_that_fails_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, [1; 4096]).unwrap();
    let mut fixture = Fixture::new(false);
    // Not open for writing.
    fixture.disk.file = File::open(&path).unwrap();
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(fixture.clear(kind, &[(0, 8, 0)]), IO_ERROR);
    }
    assert_eq!(fixture.contents(), [1; 4096]);
}

#[test]
fn bad_ranges_are_refused_before_any_is_cleared() {
    let fixture = Fixture::new(false);
    let before = fixture.contents();
    let good = (0, 1, 0);
    for kind in [DISCARD, WRITE_ZEROES] {
        for bad in [
            (SECTORS, 1, 0),
            (SECTORS - 1, 2, 0),
            (SECTORS + 1, 0, 0),
            (0, u32::MAX, 0),
            (u64::MAX, 1, 0),
            (u64::MAX, u32::MAX, 0),
            (u64::MAX / 512 + 1, 1, 0),
        ] {
            assert_eq!(fixture.clear(kind, &[good, bad]), IO_ERROR, "{bad:?}");
        }
        for flags in [2, 3, 1 << 31, u32::MAX] {
            let bad = (1, 1, flags);
            assert_eq!(fixture.clear(kind, &[good, bad]), UNSUPPORTED, "{bad:?}");
        }
    }
    // For zeroes only.
    assert_eq!(fixture.clear(DISCARD, &[good, (1, 1, UNMAP)]), UNSUPPORTED);
    assert_eq!(fixture.contents(), before);
}

#[test]
fn longer_ranges_than_offered_are_refused() {
    for (kind, max, flags) in [(DISCARD, MAX_DISCARD, 0), (WRITE_ZEROES, MAX_ZEROES, UNMAP)] {
        // Of a file that holds nothing, so that it costs nothing.
        let mut fixture = Fixture::in_memory(1);
        *fixture.disk.sectors.get_mut() = u64::from(max) + 1;
        fixture.disk.file.set_len(fixture.disk.bytes()).unwrap();
        assert_eq!(fixture.clear(kind, &[(0, max + 1, flags)]), IO_ERROR);
        assert_eq!(fixture.clear(kind, &[(1, max, flags)]), OK);
    }
}

#[test]
fn a_list_of_ranges_is_whole_and_not_too_long() {
    let fixture = Fixture::new(false);
    let before = fixture.contents();
    let max = usize::try_from(MAX_RANGES).unwrap();
    for kind in [DISCARD, WRITE_ZEROES] {
        for len in [0, 1, 15, 17, 31, 16 * max + 1, 16 * max + 16, 0x4000] {
            // Sector 0, count 0.
            assert_eq!(fixture.clear_with(kind, &vec![0; len]), IO_ERROR, "{len}");
        }
        assert_eq!(fixture.clear_with(kind, &vec![0; 16 * max]), OK);
    }
    assert_eq!(fixture.contents(), before);
}

#[test]
fn a_list_of_ranges_may_be_cut_anywhere() {
    let fixture = Fixture::new(false);
    let mut expected = fixture.contents();
    let mut list = Vec::new();
    for sector in [1_u64, 3] {
        list.extend(sector.to_le_bytes());
        list.extend(1_u64.to_le_bytes());
    }
    fixture
        .memory
        .write_slice(&list, GuestAddress(DATA))
        .unwrap();
    fixture.header(WRITE_ZEROES, u64::MAX);
    let buffers = [
        (HEADER, 16, 0),
        (DATA, 3, 0),
        (DATA + 3, 20, 0),
        (DATA + 23, 9, 0),
    ];
    let status = [(STATUS, 1, WRITE)];
    assert_eq!(fixture.serve(&[&buffers[..], &status].concat()).unwrap(), 1);
    assert_eq!(fixture.status(), OK);
    expected[512..1024].fill(0);
    expected[1536..2048].fill(0);
    assert_eq!(fixture.contents(), expected);
}

#[test]
fn nothing_is_cleared_that_is_not_agreed_on_or_read_only() {
    let mut fixture = Fixture::new(false);
    let before = fixture.contents();
    for (kind, feature) in [
        (DISCARD, FEATURE_DISCARD),
        (WRITE_ZEROES, FEATURE_WRITE_ZEROES),
    ] {
        fixture.features = !feature;
        assert_eq!(fixture.clear(kind, &[(0, 8, 0)]), UNSUPPORTED);
    }
    fixture.features = u64::MAX;
    fixture.disk.read_only = true;
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(fixture.clear(kind, &[(0, 8, 0)]), IO_ERROR);
    }
    assert_eq!(fixture.contents(), before);
}

#[test]
fn files_that_are_no_disk_are_told() {
    let empty = || tempfile::tempfile().unwrap();
    let long = "a name of more than 20";
    assert!(matches!(
        BlockDevice::new(long, empty(), true, 1),
        Err(BlockError::Id)
    ));
    assert!(matches!(
        BlockDevice::new("a", empty(), true, 1),
        Err(BlockError::Empty)
    ));
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(OwnedFd::from(reader));
    assert!(matches!(
        BlockDevice::new("a", pipe, true, 1),
        Err(BlockError::Size(_))
    ));
}

#[test]
fn a_disk_grows_with_its_file_and_never_shrinks() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * 512).unwrap();
    let mut device = BlockDevice::new("a", file.try_clone().unwrap(), false, 1).unwrap();
    let capacity = |device: &BlockDevice| {
        let mut sectors = [0; 8];
        device.read_config(0, &mut sectors);
        u64::from_le_bytes(sectors)
    };
    assert!(!device.look_again().unwrap());
    // Not by a part of a sector.
    file.set_len(9 * 512 + 1).unwrap();
    assert_eq!(capacity(&device), 4);
    assert!(device.look_again().unwrap());
    assert_eq!(capacity(&device), 9);
    file.set_len(512).unwrap();
    let error = device.look_again().unwrap_err().to_string();
    assert!(error.contains("from 9 sectors to 1"), "{error}");
    assert_eq!(capacity(&device), 9);
}
