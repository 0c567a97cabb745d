// SPDX-License-Identifier: Apache-2.0
//! virtio-rng (virtio 1.2, section 5.4): the host's random numbers.

mod device;

pub use device::RngDevice;
