// SPDX-License-Identifier: Apache-2.0
//! A hostile guest's requests to the file server behind virtio-fs: `cargo xtask fuzz fuse_requests`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuse_server::fuzz::fuzz_one(bytes));
