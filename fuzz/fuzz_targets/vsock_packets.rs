// SPDX-License-Identifier: Apache-2.0
//! A hostile guest's virtio-vsock packets. `cargo xtask fuzz vsock_packets`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmm::devices::virtio::vsock::fuzz::guest_packets(bytes));
