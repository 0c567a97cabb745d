// SPDX-License-Identifier: Apache-2.0
//! What a pod stores on, and how it grows and shrinks: volumes, devices and size, over the
//! container runtime interface and by `ctr`.
//!
//! `NUTSHELL_TEST_RUNTIME=io.containerd.runc.v2` runs the same against runc, the yardstick.

#![expect(
    clippy::tests_outside_test_module,
    reason = "this whole program is tests"
)]

mod files;
