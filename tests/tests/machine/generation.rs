// SPDX-License-Identifier: Apache-2.0
//! The machine's generation ID: a guest whose machine gets another draws new random numbers.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tests::machine::{Machine, Setup};
use tests::pattern::read_line;
use vmm::control::{ExitReason, Request};

use crate::guest::mount_devices;
use crate::{CONTROL, GENERATION, POWER_OFF};

pub(crate) const NAME: &str = "a_new_generation_has_new_random_numbers";

/// What Linux says of it (`drivers/char/random.c`).
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
/// The device at its driver.
const BOUND: &str = "/sys/bus/platform/drivers/vmgenid/QEMUVGID:00";

/// The host's half.
pub(crate) fn run() -> Result<()> {
    let mut machine = Machine::start(Setup::default())?;
    let mut control = machine.connect(CONTROL)?;
    writeln!(control, "{GENERATION}")?;
    for round in 0..2 {
        if round > 0 {
            writeln!(control, "more")?;
        }
        // Else it is what keeps it from listening.
        let said = read_line(&mut control)?;
        ensure!(said.trim() == "listening", "{said}");
        machine.ask(&Request::RenewGeneration, &[])?;
        let said = read_line(&mut control)?;
        ensure!(said.trim() == "reseeded", "{said}");
    }
    drop(control);
    writeln!(machine.connect(CONTROL)?, "{POWER_OFF}")?;
    let ended = machine.ended()?;
    ensure!(ended.reason == ExitReason::Shutdown, "{ended}");
    Ok(())
}

/// The guest's half: tells of each time that its kernel draws new random numbers.
pub(crate) fn in_guest(mut stream: impl Read + Write) -> Result<()> {
    mount_devices()?;
    ensure!(Path::new(BOUND).exists(), "no driver has the device");
    let mut log = File::open("/dev/kmsg").context("the kernel's log")?;
    log.seek(SeekFrom::End(0))?;
    let mut log = BufReader::new(log);
    loop {
        writeln!(stream, "listening")?;
        let mut line = String::new();
        while !line.contains(RESEEDED) {
            line.clear();
            log.read_line(&mut line)?;
        }
        writeln!(stream, "reseeded")?;
        if read_line(&mut stream)?.is_empty() {
            return Ok(());
        }
    }
}
