// SPDX-License-Identifier: Apache-2.0
//! Texts that the agent reads: command line, kernel files, addresses, sizes. `cargo xtask fuzz agent_texts`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| kata_agent::fuzz::texts(bytes));
