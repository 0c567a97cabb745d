// SPDX-License-Identifier: Apache-2.0
//! Virtio devices (virtio 1.2). One folder a device; none knows its transport or the architecture.

pub mod block;
mod device;
pub mod fs;
mod pci;
pub mod rng;
pub mod vsock;
mod worker;

pub use device::{
    ActivateError, Activation, ActiveQueue, DeviceFault, DeviceType, GuestMemory, Interrupt,
    VirtioDevice,
};
pub use pci::VirtioPciFunction;
pub use worker::{EventHandler, Poller, Worker};
