// SPDX-License-Identifier: Apache-2.0
//! A hostile guest's requests to a disk. `cargo xtask fuzz block_requests`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmm::devices::virtio::block::fuzz::guest_requests(bytes));
