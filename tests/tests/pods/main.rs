// SPDX-License-Identifier: Apache-2.0
//! What Kubernetes sees of our runtime: pods over the container runtime interface of a real
//! containerd, on networks of real CNI plugins.
//!
//! `NUTSHELL_TEST_RUNTIME=io.containerd.runc.v2` runs the same against runc, the yardstick.

#![expect(
    clippy::tests_outside_test_module,
    reason = "this whole program is tests"
)]

mod events;
mod examples;
mod life;
mod load;
mod network;
mod refusals;
mod stats;
mod streams;
