// SPDX-License-Identifier: Apache-2.0
//! Disks that are plugged in and pulled out while the guest runs.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, OFlags, memfd_create};
use tests::machine::{Disk, Machine, PATIENCE, Setup};
use tests::pattern::read_line;
use tests::wait::until;
use vmm::control::{ExitReason, Request};

use crate::guest::mount_devices;
use crate::{CONTROL, HOTPLUG, POWER_OFF};

pub(crate) const COME_AND_GO: &str = "a_disk_comes_and_goes_fifty_times_beside_a_busy_one";
pub(crate) const IN_USE: &str = "a_disk_is_pulled_out_while_the_guest_writes_to_it";

const ROUNDS: u8 = 50;
const SIZE: usize = 1 << 20;
const BLOCK: usize = 4096;

/// The guest's disk that stays.
const BUSY: &str = "/dev/vdb";
const BUSY_BLOCKS: u64 = 256;

/// What the host says on the stream, with a slot; the answer is `ok`, or what went wrong.
const LOOK: &str = "look";
/// Opens the disk and writes to it until that fails.
const HOLD: &str = "hold";
const GONE: &str = "gone";
/// The busy disk has worked so far, and works.
const WORKS: &str = "works";

/// The host's half.
pub(crate) fn come_and_go() -> Result<()> {
    let mut bench = Bench::new()?;
    for round in 1..=ROUNDS {
        let id = format!("disk {round}");
        let file = disk(&[round; BLOCK])?;
        let slot = bench.plug(&id, &file)?;
        bench.say(&format!("{LOOK} {slot} {round}"))?;
        bench.machine.detach_disk(&id)?;
        ensure!(bench.open_disks()? == 1, "{id}: its file is still open");
        bench.say(&format!("{GONE} {slot} 0"))?;
        let mut written = [0; BLOCK];
        file.read_exact_at(&mut written, BLOCK as u64)?;
        ensure!(written == [!round; BLOCK], "{id} has not what was written");
    }
    bench.say(&format!("{WORKS} 0 0"))?;
    bench.end()
}

/// The same: what is in use can't be kept, and does no harm.
pub(crate) fn in_use() -> Result<()> {
    let mut bench = Bench::new()?;
    let refused = bench.machine.detach_disk("nobody");
    let text = format!("{:#}", refused.err().context("it was pulled out")?);
    ensure!(text.contains("block nobody"), "{text}");
    // The image's disk stays.
    ensure!(bench.machine.detach_disk("root").is_err());

    let file = disk(&[7; BLOCK])?;
    let slot = bench.plug("held", &file)?;
    let again = bench.plug("held", &file);
    ensure!(again.is_err(), "two have one name");
    bench.say(&format!("{LOOK} {slot} 7"))?;
    bench.say(&format!("{HOLD} {slot} 0"))?;

    // A guest that stands still lets go of nothing.
    bench.machine.ask(&Request::Pause, &[])?;
    let late = bench.machine.detach_disk("held");
    let text = format!(
        "{:#}",
        late.err().context("a guest that stands still let go")?
    );
    ensure!(text == "the guest does not let go of block held", "{text}");
    bench.machine.ask(&Request::Resume, &[])?;
    until("the disk's end", PATIENCE, || {
        Ok((bench.open_disks()? == 1).then_some(()))
    })?;
    bench.say(&format!("{GONE} {slot} 0"))?;

    // And at once.
    let slot = bench.plug("held", &file)?;
    bench.say(&format!("{LOOK} {slot} 7"))?;
    bench.say(&format!("{HOLD} {slot} 0"))?;
    bench.machine.detach_disk("held")?;
    bench.say(&format!("{GONE} {slot} 0"))?;
    bench.say(&format!("{WORKS} 0 0"))?;
    bench.end()
}

/// A machine with a disk that the guest keeps busy, and a stream to it.
struct Bench {
    machine: Machine,
    stream: BufReader<UnixStream>,
}

impl Bench {
    fn new() -> Result<Self> {
        let machine = Machine::start(Setup {
            vcpus: 2,
            disks: vec![Disk {
                file: disk(&[])?.into(),
                queues: 1,
                io_uring: true,
            }],
            ..Setup::default()
        })?;
        let mut stream = machine.connect(CONTROL)?;
        writeln!(stream, "{HOTPLUG}")?;
        let stream = BufReader::new(stream);
        Ok(Self { machine, stream })
    }

    fn plug(&self, id: &str, file: &File) -> Result<u8> {
        let file = OwnedFd::from(file.try_clone()?);
        let disk = Disk {
            file,
            queues: 1,
            io_uring: false,
        };
        self.machine.attach_disk(id, disk)
    }

    fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.stream.get_mut(), "{line}")?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer)?;
        ensure!(answer.trim() == "ok", "{line}: in the guest: {answer}");
        Ok(())
    }

    /// Disks of ours that the VMM has open.
    fn open_disks(&self) -> Result<usize> {
        let folder = format!("/proc/{}/fd", self.machine.pid());
        let files = fs::read_dir(folder)?.flatten();
        let links = files.filter_map(|file| fs::read_link(file.path()).ok());
        let ours = |link: &PathBuf| link.to_string_lossy().starts_with("/memfd:a-disk");
        Ok(links.filter(ours).count())
    }

    fn end(mut self) -> Result<()> {
        drop(self.stream);
        writeln!(self.machine.connect(CONTROL)?, "{POWER_OFF}")?;
        let ended = self.machine.ended()?;
        ensure!(ended.reason == ExitReason::Shutdown, "{ended}");
        Ok(())
    }
}

/// A disk in memory that begins so.
fn disk(content: &[u8]) -> Result<File> {
    let file = File::from(memfd_create("a-disk", MemfdFlags::CLOEXEC)?);
    file.set_len(SIZE as u64)?;
    file.write_all_at(content, 0)?;
    Ok(file)
}

/// The guest's half: does what the lines of `stream` say, and keeps a disk busy meanwhile.
pub(crate) fn in_guest(mut stream: impl std::io::Read + Write) -> Result<()> {
    static FAILED: AtomicBool = AtomicBool::new(false);
    mount_devices()?;
    thread::spawn(|| {
        if let Err(error) = keep_busy() {
            eprintln!("the busy disk: {error:#}");
            FAILED.store(true, Ordering::Relaxed);
        }
    });
    loop {
        let line = read_line(&mut stream)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let (command, slot, mark) = match *words.as_slice() {
            [command, slot, mark] => (command, slot.parse::<u8>()?, mark.parse::<u8>()?),
            // The host has hung up.
            _ => return Ok(()),
        };
        let done = match command {
            LOOK => look(slot, mark),
            HOLD => hold(slot),
            GONE => until("the disk's end", PATIENCE, || {
                Ok(node(slot).is_none().then_some(()))
            }),
            WORKS if FAILED.load(Ordering::Relaxed) => bail!("the busy disk failed"),
            WORKS => works(),
            other => bail!("what is {other:?}?"),
        };
        match done {
            Ok(()) => writeln!(stream, "ok")?,
            Err(error) => writeln!(stream, "failed: {error:#}")?,
        }
    }
}

/// Writes and reads without an end, past the guest's page cache.
fn keep_busy() -> Result<()> {
    for round in 0_u64.. {
        busy_round(round)?;
    }
    Ok(())
}

fn busy_round(round: u64) -> Result<()> {
    let device = File::options().read(true).write(true).open(BUSY)?;
    let block = [u8::try_from(round % 251)?; BLOCK];
    let place = (round % BUSY_BLOCKS).saturating_mul(BLOCK as u64);
    device.write_all_at(&block, place)?;
    device.sync_data()?;
    let mut found = [0; BLOCK];
    device.read_exact_at(&mut found, place)?;
    ensure!(found == block, "round {round}: it reads as something else");
    Ok(())
}

fn works() -> Result<()> {
    busy_round(1)
}

/// Waits for a plugged disk, sees whose it is, and leaves a mark.
fn look(slot: u8, mark: u8) -> Result<()> {
    let path = until("the disk", PATIENCE, || Ok(node(slot)))?;
    let device = File::options().read(true).write(true).open(&path)?;
    let mut found = [0; BLOCK];
    device.read_exact_at(&mut found, 0)?;
    ensure!(found == [mark; BLOCK], "it begins with {}", found[0]);
    device.write_all_at(&[!mark; BLOCK], BLOCK as u64)?;
    Ok(device.sync_data()?)
}

/// Writes in the background until there is no disk any more.
fn hold(slot: u8) -> Result<()> {
    let path = node(slot).context("no disk")?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let device = File::from(rustix::fs::open(&path, flags, rustix::fs::Mode::empty())?);
    thread::spawn(move || {
        let place = SIZE.saturating_sub(BLOCK) as u64;
        while device.write_all_at(&[1; BLOCK], place).is_ok() && device.sync_data().is_ok() {
            // The busy disk is to have its turn, too.
            thread::sleep(Duration::from_millis(1));
        }
    });
    Ok(())
}

/// The node of the disk in a slot, once the kernel has it.
fn node(slot: u8) -> Option<PathBuf> {
    let function = format!("/sys/devices/pci0000:00/0000:00:{slot:02x}.0");
    let below = |folder: &Path, start: &str| {
        let mut entries = fs::read_dir(folder).ok()?.flatten();
        entries.find(|entry| entry.file_name().to_string_lossy().starts_with(start))
    };
    let device = below(Path::new(&function), "virtio")?;
    let disk = below(&device.path().join("block"), "")?;
    let node = Path::new("/dev").join(disk.file_name());
    // The kernel makes the node before the disk can be opened.
    File::open(&node).is_ok().then_some(node)
}
