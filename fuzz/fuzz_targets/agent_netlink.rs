// SPDX-License-Identifier: Apache-2.0
//! Messages of the kernel's routing socket. `cargo xtask fuzz agent_netlink`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| kata_agent::fuzz::netlink(bytes));
