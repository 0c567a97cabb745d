// SPDX-License-Identifier: Apache-2.0
//! A machine that grows and shrinks: vCPUs under load, and memory that the guest fills and frees.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use tests::machine::{MEMORY, Machine, PATIENCE, Setup};
use tests::pattern::read_line;
use tests::procs::Process;
use tests::wait::until;
use vmm::control::{ExitReason, Request, Size};

use crate::{CONTROL, CPUS, ONLINE, POWER_OFF};

/// Has the guest keep all its CPUs busy from now on.
pub(crate) const LOAD: &str = "load";
/// Has the guest use so many MiB, tell, and free them when it is told.
pub(crate) const FILL: &str = "fill";

const MOST_CPUS: u8 = 4;
const ROUNDS: usize = 2;
/// MiB: the most, which are no whole blocks of Linux's; that the guest uses; that it holds on to.
const MOST_MEMORY: u32 = 1500;
const FILLED: u64 = 1024;
const HELD: u64 = 512;
/// What the host may hold of a guest that has freed it all, in MiB.
const IDLE: u64 = 400;
/// What the guest's kernel may keep of memory that came later, in MiB.
const KERNEL_S: u32 = 8;

/// Linux's own choice would leave the guest's kernel pages in all that is plugged.
const PARAMETERS: &str = "memory_hotplug.online_policy=auto-movable";

fn size(vcpus: u8, memory_mib: u32) -> Size {
    Size { vcpus, memory_mib }
}

/// vCPUs come and go, several times, while all that are there are busy.
pub(crate) fn vcpus() -> Result<()> {
    let mut machine = Machine::start(Setup {
        most_vcpus: MOST_CPUS,
        ..Setup::default()
    })?;
    for count in [0, MOST_CPUS.saturating_add(1)] {
        let refused = machine.ask(&Request::ResizeVcpus { count }, &[]);
        let text = refused
            .err()
            .context("a wrong number is taken")?
            .to_string();
        ensure!(text.contains("1 to 4 vCPUs"), "{text}");
    }
    ask(&machine, LOAD)?;
    for _ in 0..ROUNDS {
        machine.ask(&Request::ResizeVcpus { count: MOST_CPUS }, &[])?;
        machine.await_size(size(MOST_CPUS, MEMORY))?;
        ensure!(ask(&machine, &format!("{ONLINE} {MOST_CPUS}"))? == "0 1 2 3");
        ensure!(threads(&machine)? == usize::from(MOST_CPUS));
        machine.ask(&Request::ResizeVcpus { count: 1 }, &[])?;
        machine.await_size(size(1, MEMORY))?;
        // The last of them may be on its way out.
        until("the vCPUs' threads to end", PATIENCE, || {
            Ok((threads(&machine)? == 1).then_some(()))
        })?;
        ensure!(ask(&machine, CPUS)? == "0");
    }
    machine.ask(&Request::ResizeVcpus { count: 2 }, &[])?;
    machine.await_size(size(2, MEMORY))?;
    ensure!(ask(&machine, &format!("{ONLINE} 2"))? == "0 1");
    // The host has no thread for one more, and has it later: KVM makes no vCPU twice.
    let cgroup = Cgroup::of(machine.pid())?;
    cgroup.limit_pids(Some(0))?;
    let refused = machine.ask(&Request::ResizeVcpus { count: 3 }, &[]);
    let text = format!("{:#}", refused.err().context("a thread too many")?);
    ensure!(text.contains("thread"), "{text}");
    cgroup.limit_pids(None)?;
    machine.ask(&Request::ResizeVcpus { count: 3 }, &[])?;
    machine.await_size(size(3, MEMORY))?;
    ensure!(ask(&machine, &format!("{ONLINE} 3"))? == "0 1 2");
    // A machine with vCPUs that have left is paused, resumed and ended as any other.
    machine.ask(&Request::ResizeVcpus { count: 1 }, &[])?;
    machine.await_size(size(1, MEMORY))?;
    machine.ask(&Request::Pause, &[])?;
    machine.ask(&Request::Resume, &[])?;
    power_off(&mut machine)
}

/// Memory comes, is used, goes back to the host when it is free, and goes for good where the guest
/// can do without.
pub(crate) fn memory() -> Result<()> {
    let mut machine = Machine::start(Setup {
        most_memory: MOST_MEMORY,
        parameters: PARAMETERS,
        ..Setup::default()
    })?;
    for mib in [MEMORY.saturating_sub(1), MOST_MEMORY.saturating_add(1)] {
        let refused = machine.ask(&Request::ResizeMemory { mib }, &[]);
        let text = refused.err().context("a wrong size is taken")?.to_string();
        ensure!(text.contains("256 to 1500 MiB"), "{text}");
    }
    let most = size(1, MOST_MEMORY);
    machine.ask(&Request::ResizeMemory { mib: MOST_MEMORY }, &[])?;
    machine.await_size(most)?;
    fill(&machine, FILLED, || {
        let held = resident(&machine)?;
        ensure!(held >= FILLED, "filled: the host holds {held} MiB");
        Ok(())
    })?;
    let freed = Instant::now();
    until("freed memory to be the host's", PATIENCE, || {
        Ok((resident(&machine)? <= IDLE).then_some(()))
    })?;
    println!(
        "    freed memory was the host's after {:.1?}",
        freed.elapsed()
    );

    // The guest holds on to more than it is to have: it gives what it can, and the rest later.
    fill(&machine, HELD, || {
        machine.ask(&Request::ResizeMemory { mib: MEMORY }, &[])?;
        let between = machine.await_change(|size| size.memory_mib < MOST_MEMORY)?;
        ensure!(between.memory_mib > MEMORY, "{between:?}");
        Ok(())
    })?;
    // But for a block or two that the kernel has put something of its own in meanwhile.
    machine.await_change(|size| size.memory_mib <= MEMORY.saturating_add(KERNEL_S))?;
    // What has gone can come again.
    machine.ask(&Request::ResizeMemory { mib: 300 }, &[])?;
    machine.await_size(size(1, 300))?;
    power_off(&mut machine)
}

fn power_off(machine: &mut Machine) -> Result<()> {
    writeln!(machine.connect(CONTROL)?, "{POWER_OFF}")?;
    let ended = machine.ended()?;
    ensure!(ended.reason == ExitReason::Shutdown, "{ended}");
    Ok(())
}

fn ask(machine: &Machine, command: &str) -> Result<String> {
    let mut control = machine.connect(CONTROL)?;
    writeln!(control, "{command}")?;
    let answer = read_line(&mut control)?.trim().to_owned();
    ensure!(!answer.starts_with("failed"), "in the guest: {answer}");
    Ok(answer)
}

/// Does something while the guest holds memory.
fn fill(machine: &Machine, mib: u64, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut control = machine.connect(CONTROL)?;
    writeln!(control, "{FILL} {mib}")?;
    let answer = read_line(&mut control)?;
    ensure!(answer.trim() == "filled", "in the guest: {answer}");
    meanwhile()?;
    writeln!(control, "free")?;
    let answer = read_line(&mut control)?;
    ensure!(answer.trim() == "freed", "in the guest: {answer}");
    Ok(())
}

/// Threads of the VMM that are vCPUs.
fn threads(machine: &Machine) -> Result<usize> {
    let mut count = 0_usize;
    for thread in fs::read_dir(format!("/proc/{}/task", machine.pid()))? {
        let name = fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
        count = count.saturating_add(usize::from(name.starts_with("vcpu")));
    }
    Ok(count)
}

/// A cgroup of a VMM's own, gone with this value; what is left in it goes back to where it was.
struct Cgroup(PathBuf);

impl Cgroup {
    fn of(pid: i32) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+pids").context("no pids controller")?;
        let cgroup = Self(root.join(format!("nutshell-machine-{pid}")));
        fs::create_dir(&cgroup.0)?;
        fs::write(cgroup.0.join("cgroup.procs"), pid.to_string())?;
        Ok(cgroup)
    }

    fn limit_pids(&self, most: Option<u32>) -> Result<()> {
        let most = most.map_or_else(|| "max".to_owned(), |most| most.to_string());
        Ok(fs::write(self.0.join("pids.max"), most)?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let processes = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines() {
            let _ = fs::write("/sys/fs/cgroup/cgroup.procs", pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// MiB of the host's memory that the VMM holds.
fn resident(machine: &Machine) -> Result<u64> {
    let process = Process::read(machine.pid()).context("the VMM is gone")?;
    Ok(process.kilobytes("status", "VmRSS")? / 1024)
}

/// The guest's half: brings CPUs up as they come, until there are `wanted`.
pub(crate) fn online(wanted: usize) -> Result<()> {
    match mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None) {
        // The kernel, or an earlier call, has done it.
        Ok(()) | Err(Errno::BUSY) => {}
        Err(error) => return Err(error).context("mounting /sys"),
    }
    let begin = Instant::now();
    loop {
        let mut up = 1_usize;
        for cpu in 1..MOST_CPUS {
            let file = format!("/sys/devices/system/cpu/cpu{cpu}/online");
            match fs::read_to_string(&file).as_deref().map(str::trim) {
                Ok("1") => up = up.saturating_add(1),
                Ok(_) => fs::write(&file, "1").with_context(|| format!("bring up {cpu}"))?,
                // Not there yet.
                Err(_) => {}
            }
        }
        if up == wanted {
            return Ok(());
        }
        if begin.elapsed() > PATIENCE {
            bail!("{up} CPUs, not {wanted}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The guest's half: threads that run for ever.
pub(crate) fn load() {
    for _ in 0..MOST_CPUS {
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
}

/// The guest's half: memory in use.
pub(crate) fn take(mib: usize) -> Vec<u8> {
    vec![0xa5; mib.saturating_mul(1 << 20)]
}
