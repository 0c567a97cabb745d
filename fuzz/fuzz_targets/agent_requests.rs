// SPDX-License-Identifier: Apache-2.0
//! A runtime's requests, as far as they are checked before anything is done. `cargo xtask fuzz agent_requests`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| kata_agent::fuzz::requests(bytes));
