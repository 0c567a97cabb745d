// SPDX-License-Identifier: Apache-2.0
//! What a user of `ctr` sees of our runtime: run as root, against a real containerd.
//!
//! `NUTSHELL_TEST_RUNTIME=io.containerd.runc.v2` runs the same against runc, the yardstick: what
//! passes there is containerd's contract.

#![expect(
    clippy::tests_outside_test_module,
    reason = "this whole program is tests"
)]

mod cgroup;
mod compat;
mod console;
mod exec;
mod lifecycle;
mod memory;
mod run;
mod spec;
mod streams;
mod vm;
