// SPDX-License-Identifier: Apache-2.0
//! A runtime's OCI specs: read, checked, turned into plans, filters and rules. `cargo xtask fuzz agent_specs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| kata_agent::fuzz::specs(bytes));
