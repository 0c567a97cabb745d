// SPDX-License-Identifier: Apache-2.0
//! The PCI transport (virtio 1.2, section 4.1): modern devices only, MSI-X only.
//!
//! One memory BAR holds the register blocks, each on a page of its own. Queues ring by I/O port:
//! KVM takes a port write without decoding an instruction, which on processors that don't hand
//! over the decoded access is several times cheaper than a memory write.

mod common;
mod function;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod signal;

pub use function::VirtioPciFunction;

#[cfg(test)]
mod tests;
