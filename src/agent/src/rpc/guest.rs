// SPDX-License-Identifier: Apache-2.0
//! Calls about the guest as a whole: details, clock, random numbers.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use protocols::agent::agent::{
    AgentDetails, GuestDetailsRequest, GuestDetailsResponse, OnlineCPUMemRequest,
    SetGuestDateTimeRequest,
};
use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::time::{Instant, sleep};

use crate::device;
use crate::error::{AgentError, Context as _, Result};
use crate::storage;
use crate::sys;

const BLOCK_SIZE: &str = "/sys/devices/system/memory/block_size_bytes";
const MEMORY: &str = "/sys/devices/system/memory";
const CPUS: &str = "/sys/devices/system/cpu";
/// No event tells of a plugged processor but to udev.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const PROBE: &str = "/sys/devices/system/memory/probe";

/// GetGuestDetails.
pub(super) fn details(request: &GuestDetailsRequest) -> Result<GuestDetailsResponse> {
    let mut response = GuestDetailsResponse::default();
    if request.mem_block_size {
        response.mem_block_size_bytes = memory_block_size()?;
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = Path::new(PROBE).exists();
    }
    response.agent_details = Some(AgentDetails {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        init_daemon: rustix::process::getpid().is_init(),
        device_handlers: device::types().map(str::to_owned).collect(),
        storage_handlers: storage::drivers().map(str::to_owned).collect(),
        supports_seccomp: true,
        ..AgentDetails::default()
    })
    .into();
    Ok(response)
}

/// 0 where the kernel has no memory hotplug, as Kata's agent answers.
fn memory_block_size() -> Result<u64> {
    if !Path::new(BLOCK_SIZE).exists() {
        return Ok(0);
    }
    let text = fs::read_to_string(BLOCK_SIZE).context(|| format!("read {BLOCK_SIZE}"))?;
    u64::from_str_radix(text.trim(), 16)
        .map_err(|_| AgentError::internal(format!("{BLOCK_SIZE} holds {text:?}")))
}

/// OnlineCPUMem: brings plugged processors and memory into use. With `wait`, it waits until that
/// many processors were brought up.
///
/// # Errors
///
/// Processors that do not appear within `patience`; the kernel's reason.
pub(super) async fn online(request: &OnlineCPUMemRequest, patience: Duration) -> Result<()> {
    let wanted = usize::try_from(request.nb_cpus).unwrap_or(usize::MAX);
    let deadline = Instant::now()
        .checked_add(patience)
        .unwrap_or_else(Instant::now);
    let mut brought = 0_usize;
    loop {
        brought = brought.saturating_add(bring_online(CPUS, "cpu", "online", ("0", "1"))?);
        if !request.wait || brought >= wanted {
            break;
        }
        if Instant::now() >= deadline {
            return Err(AgentError::internal(format!(
                "{brought} of {wanted} plugged processors appeared within {} s",
                patience.as_secs()
            )));
        }
        sleep(LOOK_AGAIN).await;
    }
    if !request.cpu_only {
        bring_online(MEMORY, "memory", "state", ("offline", "online"))?;
    }
    Ok(())
}

/// Writes the second value where the first one is, in the folders of numbered devices.
fn bring_online(folder: &str, name: &str, file: &str, values: (&str, &str)) -> Result<usize> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        // A kernel without hotplug of these.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(AgentError::io(format!("read {folder}"), error)),
    };
    let mut brought = 0_usize;
    for entry in entries.flatten() {
        let numbered = |number: &str| number.parse::<u32>().is_ok();
        let file_name = entry.file_name();
        let number = file_name.to_str().and_then(|text| text.strip_prefix(name));
        if !number.is_some_and(numbered) {
            continue;
        }
        let path = entry.path().join(file);
        // The first processor has no such file.
        if fs::read_to_string(&path).is_ok_and(|text| text.trim() == values.0) {
            fs::write(&path, values.1).context(|| format!("write {:?} to {path:?}", values.1))?;
            brought = brought.saturating_add(1);
        }
    }
    Ok(brought)
}

/// SetGuestDateTime.
pub(super) fn set_clock(request: &SetGuestDateTimeRequest) -> Result<()> {
    let nanoseconds = request
        .Usec
        .checked_mul(1000)
        .filter(|_| (0..1_000_000).contains(&request.Usec))
        .ok_or_else(|| AgentError::invalid(format!("microseconds {}", request.Usec)))?;
    let time = Timespec {
        tv_sec: request.Sec,
        tv_nsec: nanoseconds,
    };
    clock_settime(ClockId::Realtime, time).context(|| "set the clock")
}

/// ReseedRandomDev.
pub(super) fn reseed(data: &[u8]) -> Result<()> {
    sys::random::reseed(data).context(|| "reseed /dev/random")
}
