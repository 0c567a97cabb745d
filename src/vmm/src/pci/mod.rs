// SPDX-License-Identifier: Apache-2.0
//! PCI: one bus, its configuration space mapped in memory (ECAM, PCI Express
//! base 5.0, 7.2.2), message-signalled interrupts only. The host bridge is in
//! the ACPI tables alone: as a function of its own it would only cost every boot a look.

mod bus;
mod config;
mod function;
mod msix;

pub use bus::{PciBus, Slot};
pub use config::{Bar, BarKind, BarRange, ConfigSpace, Identity, touches};
pub use function::PciFunction;
pub use msix::{MSIX_CAPABILITY_LEN, Msix};
