// SPDX-License-Identifier: Apache-2.0
//! Device models. They import nothing of `arch`.

mod generation;
mod guest_events;
mod hotplug;
mod io_apic;
mod serial;
pub mod virtio;

pub use generation::GenerationId;
pub use guest_events::{GuestEvents, PowerPorts, ProgressPort, PvPanic};
pub use hotplug::{Ejected, HotplugRegisters};
pub use io_apic::IoApic;
pub use serial::{SerialPort, TAIL};
