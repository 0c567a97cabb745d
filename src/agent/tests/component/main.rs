// SPDX-License-Identifier: Apache-2.0
//! The agent as a whole, on a host: PID 1 of its own namespaces, driven through its protocol.
//! Needs root, cgroup v2, a static busybox and iproute2.
#![allow(
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    clippy::tests_outside_test_module,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::absolute_paths,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used
)]

mod conformance;
#[path = "conformance/cases.rs"]
mod conformance_cases;
mod disks;
mod isolation;
mod lifecycle;
mod network;
mod pod;
mod ports;
mod resources;
mod rig;
mod robust;
mod streams;
mod wire;
