// SPDX-License-Identifier: Apache-2.0
//! Calls about the guest as a whole: details, clock, random numbers.

use std::fs;
use std::path::Path;

use protocols::agent::agent::{
    AgentDetails, GuestDetailsRequest, GuestDetailsResponse, SetGuestDateTimeRequest,
};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::error::{AgentError, Context as _, Result};
use crate::storage;
use crate::sys;

const BLOCK_SIZE: &str = "/sys/devices/system/memory/block_size_bytes";
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
        storage_handlers: storage::DRIVERS.map(str::to_owned).to_vec(),
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
