// SPDX-License-Identifier: Apache-2.0
//! virtio-balloon (virtio 1.2, section 5.5): the guest gives back the memory that it does not use,
//! of itself by free page reporting, or asked to by the balloon's size.

mod device;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod request;
#[cfg(test)]
mod tests;

pub use device::BalloonDevice;
