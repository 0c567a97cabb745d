// SPDX-License-Identifier: Apache-2.0
//! The virtual machine monitor: a KVM microVM in a process of its own.
//!
//! The library knows nothing of containerd, OCI or pods. Its owner starts the process, speaks
//! `control` with it, and hands it every file as an open descriptor.

#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::single_range_in_vec_init,
        reason = "a test may fail by a panic, and lists one memory range where it means one"
    )
)]

pub mod arch;
pub mod bus;
pub mod client;
pub mod control;
pub mod devices;
pub mod interrupt;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod process;
mod sys;
