// SPDX-License-Identifier: Apache-2.0
//! Where things are in the guest's physical memory and I/O ports.
//!
//! ```text
//! 0x0000_6000  PVH start info, memory map        port 0x0080  boot progress
//! 0x0002_0000  command line                      port 0x03f8  16550
//! 0x000e_0000  ACPI tables, generation ID        port 0x0505  pvpanic
//! 0x0010_0000  the kernel and its memory         port 0x0600  ACPI sleep, reset, hotplug
//! 0xc000_0000  PCI memory                        port 0x1000  PCI ports
//! 0xe000_0000  ECAM, bus 0
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0x1_0000_0000 memory above 3 GiB; behind it, what may be plugged later
//! ```

use std::iter;
use std::ops::Range;

use vm_memory::GuestAddress;

/// PVH start info (`struct hvm_start_info`).
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// The memory map that it points to.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// The kernel command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Its greatest length with the final NUL (Linux's `COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_SIZE: usize = 2048;

/// End of conventional memory; Linux reserves from here to `KERNEL_START`.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// ACPI tables, of which the root pointer is the first, and what else is the firmware's.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// The machine's generation ID, on a page of its own: no table may reach it.
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// Nothing is loaded below.
pub const KERNEL_START: u64 = 0x10_0000;

/// Memory ends here and goes on at `HIGH_MEMORY`.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Memory that did not fit below `LOW_RAM_END`.
pub const HIGH_MEMORY: u64 = 0x1_0000_0000;

/// Memory BARs of PCI functions.
pub const PCI_MEMORY: Range<u64> = 0xc000_0000..0xe000_0000;
/// The configuration space of PCI bus 0.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// Port BARs of PCI functions. For those that are plugged in Linux chooses the addresses, of each KiB
/// in the first quarter only: elsewhere old ISA cards would answer, too.
pub const PCI_PORTS: Range<u16> = 0x1000..0x4000;

/// The I/O APIC, at its customary address.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Its pins. Only the event device has one; each costs the guest accesses at boot.
pub const IO_APIC_PINS: u8 = 2;
/// The event device's pin, and its global interrupt number.
pub const HOTPLUG_PIN: u8 = 1;

/// Local APICs, at the architecture's default address.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Three pages that KVM needs on Intel processors without unrestricted guest mode, and one more.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// See `KVM_TSS`.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Boot progress codes (POST codes on a PC).
pub const PROGRESS_PORT: u16 = 0x80;
/// The first serial port.
pub const SERIAL_PORTS: Range<u16> = 0x3f8..0x400;
/// pvpanic (QEMU's docs/specs/pvpanic).
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers (ACPI 6.5, section 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// See `SLEEP_CONTROL_PORT`.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// See `SLEEP_CONTROL_PORT`.
pub const RESET_PORT: u16 = 0x602;
/// PCI hotplug registers.
pub const HOTPLUG_PORT: u16 = 0x610;
/// The PCI slots whose devices may come and go: network cards and a pod's disks. Those before are
/// for the devices that stay.
pub const HOTPLUG_SLOTS: Range<u8> = 8..32;
/// vCPU hotplug registers.
pub const CPU_HOTPLUG_PORT: u16 = 0x620;
/// The register that says that the generation ID has changed.
pub const GENERATION_PORT: u16 = 0x630;
/// The value that resets.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that stands for S5, power off.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Memory in the guest's address space: one range, or two around the hole for devices.
#[must_use]
pub fn memory_ranges(bytes: u64) -> Vec<Range<u64>> {
    let low = bytes.min(LOW_RAM_END);
    let high = bytes.saturating_sub(low);
    let above = (high > 0).then(|| HIGH_MEMORY..HIGH_MEMORY.saturating_add(high));
    iter::once(0..low).chain(above).collect()
}

/// Where Linux may begin to add memory: a multiple of the largest block in which it does so.
const GROWTH_ALIGNMENT: u64 = 2 << 30;
/// Linux uses nothing of a block that does not lie within the range, whole: its smallest.
const GROWTH_BLOCK: u64 = 128 << 20;

/// Where the memory is that a machine of `bytes` may get later, up to `most`.
#[must_use]
pub fn growth(bytes: u64, most: u64) -> Option<Range<u64>> {
    let more = most.checked_sub(bytes).filter(|more| *more > 0)?;
    let end = memory_ranges(bytes).last()?.end.max(HIGH_MEMORY);
    let start = end.checked_next_multiple_of(GROWTH_ALIGNMENT)?;
    let size = more.checked_next_multiple_of(GROWTH_BLOCK)?;
    Some(start..start.checked_add(size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_device_hole() {
        const GIB: u64 = 1 << 30;
        assert_eq!(memory_ranges(GIB), [0..GIB]);
        assert_eq!(memory_ranges(3 * GIB), [0..3 * GIB]);
        assert_eq!(memory_ranges(8 * GIB), [0..3 * GIB, 4 * GIB..9 * GIB]);
    }

    #[test]
    fn memory_grows_behind_all_that_is_there() {
        const GIB: u64 = 1 << 30;
        const MIB: u64 = 1 << 20;
        assert_eq!(growth(GIB, GIB), None);
        assert_eq!(growth(2 * GIB, GIB), None);
        assert_eq!(
            growth(256 * MIB, 2 * GIB),
            Some(4 * GIB..6 * GIB - 256 * MIB)
        );
        assert_eq!(
            growth(8 * GIB, 8 * GIB + 1),
            Some(10 * GIB..10 * GIB + 128 * MIB)
        );
        assert_eq!(growth(GIB, u64::MAX), None);
    }
}
