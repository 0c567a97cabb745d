// SPDX-License-Identifier: Apache-2.0
//! A network namespace carried into a guest: run as root, against a real containerd.

#![expect(
    clippy::tests_outside_test_module,
    reason = "this whole program is tests"
)]

mod carried;
mod faults;
mod later;
mod loopback;
