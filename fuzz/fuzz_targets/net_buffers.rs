// SPDX-License-Identifier: Apache-2.0
//! A hostile guest's virtio-net buffers. `cargo xtask fuzz net_buffers`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmm::devices::virtio::net::fuzz::guest_buffers(bytes));
