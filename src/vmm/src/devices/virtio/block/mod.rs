// SPDX-License-Identifier: Apache-2.0
//! virtio-blk (virtio 1.2, section 5.2): a raw file as a disk. The format is always raw and never
//! guessed: a guest could write another format's header.

mod device;
mod direct;
#[cfg(test)]
mod direct_tests;
mod discard;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod queue_tests;
mod request;
#[cfg(test)]
mod tests;

pub use device::{BlockDevice, BlockError};
