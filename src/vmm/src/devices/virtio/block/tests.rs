// SPDX-License-Identifier: Apache-2.0
//! Requests as a driver makes them, good and bad.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::{Disk, IO_ERROR, OK, SERIAL_LEN, UNSUPPORTED};
use super::{BlockDevice, BlockError};
use crate::devices::virtio::{DeviceFault, VirtioDevice};

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x6000;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// What a status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xee;
const SECTORS: u64 = 8;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

struct Fixture {
    memory: GuestMemoryMmap,
    disk: Disk,
}

impl Fixture {
    fn new(read_only: bool) -> Self {
        let ranges = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512 + at) as u8).collect();
        file.write_all(&bytes).unwrap();
        let mut serial = [0; SERIAL_LEN];
        serial[..4].copy_from_slice(b"root");
        let disk = Disk {
            file,
            sectors: SECTORS,
            read_only,
            serial,
        };
        Self { memory, disk }
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
        let mut descriptors = Vec::new();
        for (index, (address, len, flags)) in (1..).zip(buffers) {
            let more = usize::from(index) < buffers.len();
            let next = if more { VRING_DESC_F_NEXT as u16 } else { 0 };
            let descriptor = Descriptor::new(*address, *len, flags | next, index);
            descriptors.push(RawDescriptor::from(descriptor));
        }
        let chain = queue.build_desc_chain(&descriptors).unwrap();
        self.disk.serve(&self.memory, chain, false)
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
    // SCSI pass-through, discard and write zeroes among them: none is offered.
    for kind in [2, 3, 5, 11, 13, 0x1000_0000, u32::MAX] {
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
    let next = VRING_DESC_F_NEXT as u16;
    let descriptors = [
        RawDescriptor::from(Descriptor::new(HEADER, 16, next, 1)),
        RawDescriptor::from(Descriptor::new(DATA, 512, WRITE | next, 1)),
    ];
    queue.desc_table().store(0, descriptors[0]).unwrap();
    queue.desc_table().store(1, descriptors[1]).unwrap();
    let chain = queue.build_desc_chain(&descriptors).unwrap();
    // Fifteen buffers of 512 bytes, the last byte of which is the status.
    assert_eq!(
        fixture.disk.serve(&fixture.memory, chain, false).unwrap(),
        1
    );
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512 + 511).unwrap();
    let device = BlockDevice::new("root", file, true).unwrap();
    let mut config = [0xff; 64];
    device.read_config(0, &mut config);
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SECTORS);
    assert_eq!(u32::from_le_bytes(config[12..16].try_into().unwrap()), 254);
    assert_eq!(u32::from_le_bytes(config[20..24].try_into().unwrap()), 512);
    assert_eq!(config[24..], [0; 40]);
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
    assert_eq!(device.features() & 1 << 5, 1 << 5);
}

#[test]
fn files_that_are_no_disk_are_told() {
    let empty = || tempfile::tempfile().unwrap();
    let long = "a name of more than 20";
    assert!(matches!(
        BlockDevice::new(long, empty(), true),
        Err(BlockError::Id)
    ));
    assert!(matches!(
        BlockDevice::new("a", empty(), true),
        Err(BlockError::Empty)
    ));
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(OwnedFd::from(reader));
    assert!(matches!(
        BlockDevice::new("a", pipe, true),
        Err(BlockError::Size(_))
    ));
}
