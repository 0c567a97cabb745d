// SPDX-License-Identifier: Apache-2.0
//! A hostile guest's accesses to a function on the PCI bus. `cargo xtask fuzz pci_accesses`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vmm::devices::virtio::pci::fuzz::guest_accesses(bytes));
