// SPDX-License-Identifier: Apache-2.0
//! The guest's init: tells of its CPUs, uses its disk and its memory, tells of new random numbers, and
//! ends as it is told.

use std::io::Write;
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};
use tests::machine::READY;
use tests::pattern::read_line;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::size::{self, FILL, LOAD};
use crate::{CONTROL, CPUS, DISK, EXIT, GENERATION, HOTPLUG, ONLINE, POWER_OFF, RESTART};
use crate::{disk, generation, hotplug};

/// Serves until it is told to exit.
pub(crate) fn run() {
    if let Err(error) = serve() {
        eprintln!("guest: {error:#}");
    }
}

fn serve() -> Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, CONTROL)?;
    // Closed at once: it says that the other listens.
    VsockStream::connect_with_cid_port(VMADDR_CID_HOST, READY)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let line = read_line(&mut stream)?;
        let (command, number) = numbered(line.trim());
        match command {
            CPUS => writeln!(stream, "{}", cpus()?)?,
            DISK => match disk::in_guest() {
                Ok(()) => writeln!(stream, "ok")?,
                Err(error) => writeln!(stream, "failed: {error:#}")?,
            },
            ONLINE => match size::online(number).and_then(|()| cpus()) {
                Ok(cpus) => writeln!(stream, "{cpus}")?,
                Err(error) => writeln!(stream, "failed: {error:#}")?,
            },
            LOAD => {
                size::load();
                writeln!(stream, "loaded")?;
            }
            FILL => {
                let memory = size::take(number);
                writeln!(stream, "filled")?;
                read_line(&mut stream)?;
                drop(memory);
                writeln!(stream, "freed")?;
            }
            GENERATION => {
                if let Err(error) = generation::in_guest(&mut stream) {
                    writeln!(stream, "failed: {error:#}")?;
                }
            }
            HOTPLUG => hotplug::in_guest(stream)?,
            POWER_OFF => reboot(RebootCommand::PowerOff)?,
            RESTART => reboot(RebootCommand::Restart)?,
            EXIT => return Ok(()),
            other => bail!("what is {other:?}?"),
        }
    }
}

/// A command, and the number behind it.
fn numbered(line: &str) -> (&str, usize) {
    let parts = line.rsplit_once(' ');
    let number = parts.and_then(|(command, number)| Some((command, number.parse().ok()?)));
    number.unwrap_or((line, 0))
}

/// Mounts what shows the machine's devices.
pub(crate) fn mount_devices() -> Result<()> {
    for (kind, place) in [("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        match mount(kind, place, kind, MountFlags::empty(), None) {
            // The kernel has done so.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(error).with_context(|| format!("mounting {place}")),
        }
    }
    Ok(())
}

/// The numbers of the CPUs that run a thread.
fn cpus() -> Result<String> {
    let mut found = Vec::new();
    for cpu in 0..CpuSet::MAX_CPU {
        let ran = thread::spawn(move || run_on(cpu)).join();
        match ran.ok().context("a thread panicked")? {
            Ok(()) => found.push(cpu.to_string()),
            // No such CPU, or it is not up.
            Err(Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found.join(" "))
}

/// Moves the calling thread to a CPU.
pub(crate) fn run_on(cpu: usize) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)?;
    // Back from the call, it runs there.
    if sched_getcpu() == cpu {
        Ok(())
    } else {
        Err(Errno::NXIO)
    }
}
