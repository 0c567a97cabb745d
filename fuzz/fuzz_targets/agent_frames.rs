// SPDX-License-Identifier: Apache-2.0
//! Reports and jobs on the channel between the agent and its helper. `cargo xtask fuzz agent_frames`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| kata_agent::fuzz::frames(bytes));
