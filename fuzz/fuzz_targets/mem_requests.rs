// SPDX-License-Identifier: Apache-2.0
//! A hostile guest's virtio-mem requests. `cargo xtask fuzz mem_requests`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmm::devices::virtio::mem::fuzz::guest_requests(bytes));
