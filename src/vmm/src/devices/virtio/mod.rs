// SPDX-License-Identifier: Apache-2.0
//! Virtio devices (virtio 1.2). One folder a device; none knows its transport or the architecture.

pub mod balloon;
pub mod block;
mod device;
pub mod fs;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_input;
pub mod mem;
pub mod net;
mod pages;
pub mod pci;
mod queue;
mod rate;
pub mod rng;
#[cfg(any(test, fuzzing))]
pub(crate) mod test_ring;
pub mod vsock;
mod worker;

pub use device::{
    ActivateError, Activation, DeviceFault, DeviceType, GuestMemory, Interrupt, VirtioDevice,
    read_config,
};
pub use pci::VirtioPciFunction;
pub use queue::ActiveQueue;
pub use worker::{EventHandler, Poller, Worker};
