// SPDX-License-Identifier: Apache-2.0
//! A disk with two queues: what the guest's kernel makes of it, what the guest does to it, and what
//! the host sees of that.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use tests::machine::{Disk, Machine, Setup};
use tests::pattern::read_line;
use tests::sys;
use vmm::control::ExitReason;

use crate::guest::{mount_devices, run_on};
use crate::{CONTROL, DISK, POWER_OFF};

pub(crate) const NAME: &str = "two_cpus_change_a_disk_of_two_queues";

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const BLOCK: usize = 4096;

/// What the guest does to the disk, in bytes of it.
const DISCARDED: Range<u64> = MIB..2 * MIB;
const ZEROED: Range<u64> = 3 * MIB + 512..4 * MIB;
const PUNCHED: Range<u64> = 5 * MIB..6 * MIB;
/// Here each CPU writes a block.
const WRITTEN: u64 = 7 * MIB;
const CPUS: usize = 2;

const DEVICE: &str = "/dev/vdb";
const SYSFS: &str = "/sys/block/vdb";

/// The host's half.
pub(crate) fn run() -> Result<()> {
    // In memory: there, what is given back can be seen, whatever the suite's own file system.
    let mut file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC)?);
    file.write_all(&content_before())?;
    let before = file.metadata()?.blocks();
    let mut machine = Machine::start(Setup {
        vcpus: 2,
        disks: vec![Disk {
            file: file.try_clone()?.into(),
            queues: 2,
            io_uring: true,
        }],
        ..Setup::default()
    })?;
    let mut control = machine.connect(CONTROL)?;
    writeln!(control, "{DISK}")?;
    let answer = read_line(&mut control)?;
    ensure!(answer.trim() == "ok", "in the guest: {answer}");
    writeln!(machine.connect(CONTROL)?, "{POWER_OFF}")?;
    let ended = machine.ended()?;
    ensure!(ended.reason == ExitReason::Shutdown, "{ended}");

    check(&mut file).context("the disk's file")?;
    let given_back = before.saturating_sub(file.metadata()?.blocks());
    let given_back = given_back.saturating_mul(512);
    ensure!(
        given_back == 2 * MIB,
        "the file gave {given_back} bytes back"
    );
    Ok(())
}

/// The guest's half.
pub(crate) fn in_guest() -> Result<()> {
    mount_devices()?;
    for (name, expected) in [
        ("queue/discard_max_bytes", 1 << 30),
        ("queue/write_zeroes_max_bytes", 64 * MIB),
    ] {
        let found = fs::read_to_string(format!("{SYSFS}/{name}")).context(name)?;
        ensure!(
            found.trim().parse() == Ok(expected),
            "{name} is {found:?}, not {expected}"
        );
    }
    let queues = fs::read_dir(format!("{SYSFS}/mq"))?.count();
    ensure!(queues == CPUS, "the disk has {queues} queues");

    let mut device = File::options().read(true).write(true).open(DEVICE)?;
    sys::discard(&device, DISCARDED.start, len(&DISCARDED)).context("discarding")?;
    sys::zero_out(&device, ZEROED.start, len(&ZEROED)).context("zeroing")?;
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&device, mode, PUNCHED.start, len(&PUNCHED)).context("punching a hole")?;
    for cpu in 0..CPUS {
        let device = device.try_clone()?;
        // The kernel takes the queue of the CPU on which a request is made.
        let written = thread::spawn(move || -> Result<()> {
            run_on(cpu)?;
            device.write_all_at(&own_block(cpu), own_place(cpu))?;
            Ok(device.sync_data()?)
        });
        let written = written.join().ok().context("a thread panicked")?;
        written.with_context(|| format!("writing on CPU {cpu}"))?;
    }
    check(&mut device).context("the disk")
}

fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

fn own_block(cpu: usize) -> [u8; BLOCK] {
    [if cpu == 0 { 0xc0 } else { 0xc1 }; BLOCK]
}

fn own_place(cpu: usize) -> u64 {
    let block = cpu.saturating_mul(BLOCK);
    WRITTEN.saturating_add(u64::try_from(block).unwrap_or(u64::MAX))
}

/// No block is like its neighbours, and none is zero.
fn content_before() -> Vec<u8> {
    let bytes = (0..SIZE).map(|at| u8::try_from(at / 512 % 251).unwrap_or_default() | 1);
    bytes.collect()
}

/// Whether all is as it should be when the guest is through.
fn check(disk: &mut File) -> Result<()> {
    let mut expected = content_before();
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        for (to, from) in expected.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    // A file in memory reads as zeroes where it was discarded.
    for range in [DISCARDED, ZEROED, PUNCHED] {
        put(range.start, &vec![0; usize::try_from(len(&range))?]);
    }
    for cpu in 0..CPUS {
        put(own_place(cpu), &own_block(cpu));
    }
    let mut found = Vec::new();
    disk.rewind()?;
    disk.read_to_end(&mut found)?;
    ensure!(found.len() == expected.len(), "{} bytes", found.len());
    let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
    ensure!(wrong.is_none(), "byte {wrong:?} is wrong");
    Ok(())
}
