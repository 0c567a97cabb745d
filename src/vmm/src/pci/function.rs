// SPDX-License-Identifier: Apache-2.0
//! What the bus asks of a function.

use std::fmt::Debug;

use super::config::BarRange;

/// A PCI function. Registers are reached from any vCPU thread; a function locks for itself.
pub trait PciFunction: Debug + Send + Sync {
    /// Reads configuration space; bytes past its end read as all ones.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space; read-only bits keep their value.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// The address ranges it decodes now.
    fn decoded(&self) -> Vec<BarRange>;

    /// Reads behind base address register `bar`.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Writes behind base address register `bar`.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);
}
