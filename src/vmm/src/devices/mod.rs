// SPDX-License-Identifier: Apache-2.0
//! Device models. They import nothing of `arch`.

mod guest_events;
mod serial;
pub mod virtio;

pub use guest_events::{GuestEvents, PowerPorts, ProgressPort, PvPanic};
pub use serial::{SerialPort, TAIL};
