// SPDX-License-Identifier: Apache-2.0
//! virtio-mem (virtio 1.2, section 5.15): a region of the guest's address space, of which the guest
//! takes as many blocks as it is offered, and gives them back when it is asked to.
//!
//! The region is mapped as a whole, for the guest and for its devices, and its pages are the host's
//! until the guest touches them. A block that is unplugged goes back to the host. A guest that uses
//! one without having plugged it breaks its promise (`UNPLUGGED_INACCESSIBLE`) and harms nobody's
//! memory but its own; what it may take from the host is its cgroup's to bound.

mod device;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod region;
mod request;
#[cfg(test)]
mod tests;

pub use device::{MemDevice, Plugged, Resizer};
