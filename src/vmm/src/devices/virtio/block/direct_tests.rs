// SPDX-License-Identifier: Apache-2.0
//! Transfers that don't fit the blocks of a file. Where a file is not opened with O_DIRECT, it takes
//! what one that is would take.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Barrier;
use std::sync::atomic::AtomicU64;
use std::thread;

use fuse_server::Complaints;
use rustix::fs::OFlags;

use super::BlockDevice;
use super::direct::Direct;
use super::request::{Buffers, Disk, SERIAL_LEN};
use crate::devices::virtio::VirtioDevice;

const BLOCK: u64 = 4096;
const SECTORS: u64 = 2048;

fn disk(file: File, direct: Option<Direct>) -> Disk {
    Disk {
        name: "disk".to_owned(),
        file,
        direct,
        sectors: AtomicU64::new(SECTORS),
        filled: AtomicU64::new(0),
        read_only: false,
        serial: [0; SERIAL_LEN],
        complaints: Complaints::default(),
    }
}

/// A disk with known bytes, on blocks of this size.
fn on_blocks(block: u64) -> (Disk, Vec<u8>) {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 251 + at) as u8).collect();
    file.write_all(&bytes).unwrap();
    (disk(file, Some(Direct::with_block(block))), bytes)
}

/// Sectors to begin at and to transfer: within a block, across blocks, whole blocks, and more than
/// goes at once.
const TRANSFERS: [(u64, usize); 7] = [
    (0, 1),
    (3, 2),
    (7, 2),
    (8, 8),
    (1, 1024),
    (8, 1200),
    (SECTORS - 1, 1),
];

#[test]
fn sectors_come_and_go_whatever_the_block() {
    for block in [512, BLOCK, 1 << 16, 1 << 19] {
        let (disk, mut expected) = on_blocks(block);
        for (round, (sector, count)) in (1..).zip(TRANSFERS) {
            let (at, len) = (usize::try_from(sector).unwrap() * 512, count * 512);
            let direct = disk.direct.as_ref().unwrap();
            // One byte off, so that it never fits.
            let mut bytes = vec![0_u8; len + 1];
            let buffers = Buffers::of(&mut bytes[1..]);
            direct.read(&disk.file, buffers, sector * 512).unwrap();
            assert!(bytes[1..] == expected[at..at + len], "{block} {sector}");

            bytes.fill(round);
            let buffers = Buffers::of(&mut bytes[1..]);
            direct.write(&disk.file, buffers, sector * 512).unwrap();
            expected[at..at + len].fill(round);
            let mut found = vec![0; expected.len()];
            disk.file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "{block} {sector}");
        }
        let len = disk.file.metadata().unwrap().len();
        assert_eq!(len, SECTORS * 512);
    }
}

#[test]
fn what_fits_goes_as_it_is() {
    let direct = Direct::with_block(BLOCK);
    let mut bytes = vec![0; 3 * 4096];
    let start = bytes.as_ptr().align_offset(4096);
    let aligned = &mut bytes[start..start + 8192];
    assert!(direct.fits(&Buffers::of(aligned), 2 * BLOCK));
    assert!(!direct.fits(&Buffers::of(aligned), 2 * BLOCK + 512));
    assert!(!direct.fits(&Buffers::of(&mut aligned[..512]), 0));
    assert!(!direct.fits(&Buffers::of(&mut aligned[512..4608]), 0));
}

#[test]
fn writers_of_one_block_keep_each_others_sectors() {
    let (disk, mut expected) = on_blocks(BLOCK);
    let (disk, start) = (&disk, &Barrier::new(8));
    thread::scope(|scope| {
        for sector in 0..8_u8 {
            scope.spawn(move || {
                let offset = u64::from(sector) * 512;
                let mut last = None;
                start.wait();
                for round in 0..2000_u32 {
                    let mut found = [0; 512];
                    disk.file.read_exact_at(&mut found, offset).unwrap();
                    assert!(last.is_none_or(|last| last == found), "round {round}");
                    let mut bytes = [sector | ((round % 31) << 3) as u8; 512];
                    disk.write(Buffers::of(&mut bytes), offset).unwrap();
                    last = Some(bytes);
                }
            });
        }
    });
    for (sector, bytes) in (0..8).zip(expected.chunks_exact_mut(512)) {
        bytes.fill(sector | ((1999 % 31) << 3) as u8);
    }
    let mut found = vec![0; expected.len()];
    disk.file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected);
}

/// A new file that is opened with O_DIRECT. Beside this program, which is on a disk; a folder for
/// temporary files might not be.
pub(super) fn open_direct() -> File {
    let program = std::env::current_exe().unwrap();
    let path = tempfile::NamedTempFile::new_in(program.parent().unwrap());
    let path = path.unwrap().into_temp_path();
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap();
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    options.open(&path).unwrap()
}

#[test]
fn a_file_that_is_opened_so_is_seen_to_be() {
    let file = open_direct();
    let direct = Direct::of(&file).unwrap().unwrap();
    assert!(direct.block().is_power_of_two());
    assert!(direct.block() >= 512);
    assert!(
        Direct::of(&tempfile::tempfile().unwrap())
            .unwrap()
            .is_none()
    );
    // It is not seen past its last whole block.
    let block = direct.block();
    file.set_len(3 * block + 511).unwrap();
    let device = BlockDevice::new("disk", file, false, 1).unwrap();
    let mut capacity = [0; 8];
    device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 3 * block / 512);
}

#[test]
fn the_kernel_takes_what_goes_by_the_buffer() {
    let file = open_direct();
    file.set_len(SECTORS * 512).unwrap();
    let direct = Direct::of(&file).unwrap();
    let disk = disk(file, direct);
    let mut expected = vec![0; usize::try_from(SECTORS).unwrap() * 512];
    for (round, (sector, count)) in (1..).zip(TRANSFERS) {
        let (at, len) = (usize::try_from(sector).unwrap() * 512, count * 512);
        let mut bytes = vec![round; len + 1];
        let buffers = Buffers::of(&mut bytes[1..]);
        disk.write(buffers, sector * 512).unwrap();
        expected[at..at + len].fill(round);
    }
    let mut found = vec![0; expected.len() + 1];
    disk.read(Buffers::of(&mut found[1..]), 0).unwrap();
    assert!(found[1..] == expected);
}
