// SPDX-License-Identifier: Apache-2.0
//! What the host has to give.

use std::num::NonZero;
use std::thread;

use rustix::system::sysinfo;

/// The CPUs that this process may use.
pub(crate) fn cpus() -> u8 {
    let count = thread::available_parallelism().map_or(1, NonZero::get);
    u8::try_from(count).unwrap_or(u8::MAX)
}

/// The host's memory in MiB.
pub(crate) fn memory_mib() -> u32 {
    let info = sysinfo();
    let bytes = info.totalram.saturating_mul(info.mem_unit.into());
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}
