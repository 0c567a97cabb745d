// SPDX-License-Identifier: Apache-2.0
//! What a hostile guest gives to its balloon. `cargo xtask fuzz balloon_requests`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmm::devices::virtio::balloon::fuzz::guest_requests(bytes));
