// SPDX-License-Identifier: Apache-2.0
//! Start to init, against QEMU's `microvm`.
//!
//! Both boot the same kernel, image and init, with one CPU and 256 MiB, and both are measured from
//! the start of the process to its end. The end is the same event in the guest: init's first act is
//! a write to port 0x80, which ends QEMU by its `isa-debug-exit` device, and which our monitor
//! reports to the program that started it, which then stops the machine. So ours pays for one
//! message and an orderly stop more than QEMU does. QEMU's machine is given only what this boot
//! needs: no serial port, no PIT, no PIC, no RTC, and its disk on virtio-mmio, for which its kernel
//! gets the device's place on the command line (no bus to scan).

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tests::process::{Output, Running};

use crate::Settings;
use crate::report::Row;

const LIMIT: Duration = Duration::from_secs(60);
const PARAMETERS: &str = "panic=-1 quiet 8250.nr_uarts=0 agent.boot_progress \
                          root=/dev/vda ro rootfstype=erofs init=/sbin/init";
/// What `isa-debug-exit` makes of the 0x41 that init writes: twice the value, plus one.
const QEMU_DONE: i32 = 0x41 * 2 + 1;

/// Boots pairs; answers the row, and the timeline of our last boot.
pub(crate) fn measure(settings: &Settings) -> Result<(Row, Vec<String>)> {
    let (mut ours, mut qemu, mut timeline) = (Vec::new(), Vec::new(), Vec::new());
    // One boot of each first: the page cache is warm for both alike.
    for pair in 0..=settings.pairs {
        let our = run(our_command(settings)?, 0)?;
        let their = run(qemu_command(settings)?, QEMU_DONE)?;
        eprintln!(
            "boot {pair}: ours {:.2?}, QEMU {:.2?}",
            our.elapsed, their.elapsed
        );
        if pair > 0 {
            ours.push(our.elapsed.as_secs_f64() * 1e3);
            qemu.push(their.elapsed.as_secs_f64() * 1e3);
        }
        timeline = our
            .text()
            .lines()
            .map(|line| line.trim().to_owned())
            .collect();
    }
    let promise = "not slower than QEMU microvm (ratio at most 1)";
    Ok((
        Row::pairs("start to init", "ms", (ours, qemu), "QEMU microvm", promise),
        timeline,
    ))
}

fn run(mut command: Command, code: i32) -> Result<Output> {
    let mut running = Running::start(&mut command)?;
    running.close_stdin();
    running.finish(LIMIT)?.exits(code)
}

fn our_command(settings: &Settings) -> Result<Command> {
    let boot = settings.boot.as_ref().context("--boot names no program")?;
    let mut command = Command::new(boot);
    command
        .arg("--kernel")
        .arg(settings.kernel()?)
        .arg("--image")
        .arg(settings.image()?);
    command.args(["--memory", "256", "--wait", "init"]);
    Ok(command)
}

fn qemu_command(settings: &Settings) -> Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "microvm,accel=kvm,pit=off,pic=off,rtc=off,isa-serial=off",
    ]);
    command.args(["-cpu", "host", "-smp", "1", "-m", "256"]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
    ]);
    command
        .arg("-kernel")
        .arg(settings.kernel()?)
        .args(["-append", PARAMETERS]);
    command.args(["-drive", &drive(&settings.image()?)?]);
    command.args(["-device", "virtio-blk-device,drive=root"]);
    command.args(["-device", "isa-debug-exit,iobase=0x80,iosize=1"]);
    Ok(command)
}

fn drive(image: &Path) -> Result<String> {
    let path = image.to_str().context("not UTF-8")?;
    // A comma would begin another of the drive's options.
    ensure!(
        !path.contains(','),
        "{path}: QEMU can't take a comma in a path"
    );
    Ok(format!(
        "id=root,if=none,format=raw,readonly=on,file={path}"
    ))
}

/// Fails where a pair can't be run at all.
pub(crate) fn check(settings: &Settings) -> Result<()> {
    for (what, path) in [("kernel", settings.kernel()?), ("image", settings.image()?)] {
        if !path.exists() {
            bail!("no {what} at {}", path.display());
        }
    }
    Ok(())
}
