// SPDX-License-Identifier: Apache-2.0
//! ACPI tables, hardware-reduced (ACPI 6.5, section 4.1): no power management timer, no fixed
//! events, no PIC. Kept small: the guest interprets them at every boot.

mod hotplug;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const OEM_ID: [u8; 6] = *b"NUTSHL";
const OEM_TABLE_ID: [u8; 8] = *b"NUTSHELL";
const OEM_REVISION: u32 = 1;

/// Bytes of an ACPI table's header.
const HEADER: u32 = 36;

/// IA-PC boot flags (table 5.11): no VGA to probe for, no CMOS clock. No 8042, no legacy device
/// by leaving their bits clear.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// What the tables say about the machine.
#[derive(Debug, Clone, Copy)]
pub struct Tables {
    /// Processors; their APIC IDs count from 0.
    pub vcpus: u8,
    /// As many as there may be later.
    pub most_vcpus: u8,
    /// Describe the serial port, so that its driver finds it.
    pub serial: bool,
}

impl Tables {
    /// Writes all tables and returns the address of the root pointer.
    ///
    /// # Errors
    /// They lie outside of guest memory.
    pub fn write(&self, memory: &GuestMemoryMmap) -> Result<GuestAddress, GuestMemoryError> {
        let image = self.build(layout::ACPI.start);
        let root = GuestAddress(layout::ACPI.start);
        memory.write_slice(&image, root)?;
        Ok(root)
    }

    /// All tables as they lie in memory from `base` on; the root pointer comes first.
    fn build(&self, base: u64) -> Vec<u8> {
        let rsdp_size = Rsdp::len().next_multiple_of(16);
        let mut tables = Vec::new();
        let mut place = |bytes: Vec<u8>| {
            let offset = rsdp_size.saturating_add(tables.len());
            tables.extend(bytes);
            tables.resize(tables.len().next_multiple_of(16), 0);
            base.saturating_add(u64::try_from(offset).unwrap_or_default())
        };
        let dsdt = place(bytes(&self.dsdt()));
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(place(fadt(dsdt)));
        xsdt.add_entry(place(self.madt()));
        xsdt.add_entry(place(mcfg()));
        let xsdt = place(bytes(&xsdt));
        let mut image = bytes(&Rsdp::new(OEM_ID, xsdt));
        image.resize(rsdp_size, 0);
        image.extend(tables);
        image
    }

    fn madt(&self) -> Vec<u8> {
        let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
        let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
        for id in 0..self.vcpus {
            madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
        }
        for id in self.hot_vcpus() {
            let status = EnabledStatus::DisabledOnlineCapable;
            madt.add_structure(ProcessorLocalApic::new(id, id, status));
        }
        madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
        bytes(&madt)
    }

    /// Processors that may come and go.
    fn hot_vcpus(&self) -> Range<u8> {
        self.vcpus..self.most_vcpus
    }

    fn dsdt(&self) -> Sdt {
        let mut dsdt = Sdt::new(*b"DSDT", HEADER, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        let s5 = layout::SLEEP_TYPE_S5;
        dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &Package::new(vec![&s5]))));
        let cpus = self.hot_vcpus();
        let mut devices = hotplug::registers(&cpus);
        devices.extend(hotplug::processors(&cpus));
        devices.extend(hotplug::generation());
        devices.extend(pci_host_bridge());
        devices.extend(hotplug::event_device(&cpus));
        devices.extend(ecam_reservation());
        devices.extend(pvpanic());
        if self.serial {
            devices.extend(serial_port());
        }
        dsdt.append_slice(&Scope::raw("\\_SB_".into(), devices));
        dsdt
    }
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            GasSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // In x2APIC's other mode, clusters, a CPU above 7 has a destination that no message can
        // name without an IOMMU, and its interrupts are lost.
        .flag(Flags::ForceApicPhysicalDestinationMode)
        // Set means: no fixed button; there is none at all.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    bytes(&fadt.finalize())
}

/// ECAM of bus 0 alone: the guest then looks for no other bus.
fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    bytes(&mcfg)
}

/// The host bridge with its bus number and windows. No `_PRT`: functions only have MSI-X.
fn pci_host_bridge() -> Vec<u8> {
    let bus = AddressSpace::new_bus_number(0_u16, 0_u16);
    let ports = layout::PCI_PORTS;
    let ports = AddressSpace::new_io(ports.start, ports.end.saturating_sub(1), None);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low32(layout::PCI_MEMORY.start),
        low32(layout::PCI_MEMORY.end).saturating_sub(1),
        None,
    );
    let memory = ResourceTemplate::new(vec![&bus, &ports, &memory]);
    let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let names = [
        Name::new("_HID".into(), &hid),
        Name::new("_CID".into(), &cid),
        Name::new("_SEG".into(), &ZERO),
        Name::new("_UID".into(), &ZERO),
        Name::new("_CRS".into(), &memory),
    ];
    let slots = hotplug::slots();
    let names = names.iter().map(|name| name as &dyn Aml);
    let slots = slots.iter().map(|slot| slot as &dyn Aml);
    bytes(&Device::new("PCI0".into(), names.chain(slots).collect()))
}

/// ECAM as a motherboard resource (PCI Firmware specification 3.3, section 4.1.2).
fn ecam_reservation() -> Vec<u8> {
    let start = low32(layout::ECAM.start);
    let length = low32(layout::ECAM.end).saturating_sub(start);
    bytes(&Device::new(
        "ECAM".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, start, length)]),
            ),
        ],
    ))
}

fn pvpanic() -> Vec<u8> {
    let port = layout::PVPANIC_PORT;
    bytes(&Device::new(
        "PVPN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)]),
            ),
        ],
    ))
}

/// The 16550, without an interrupt: its driver polls by timer.
fn serial_port() -> Vec<u8> {
    let port = layout::SERIAL_PORTS.start;
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 8)]),
            ),
        ],
    ))
}

/// An address below 4 GiB, as 32-bit descriptors hold it.
fn low32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;

    fn image(vcpus: u8) -> Vec<u8> {
        growing(vcpus, vcpus)
    }

    fn growing(vcpus: u8, most_vcpus: u8) -> Vec<u8> {
        let serial = true;
        let tables = Tables {
            vcpus,
            most_vcpus,
            serial,
        };
        tables.build(BASE)
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table(image: &[u8], address: u64) -> &[u8] {
        let at = (address - BASE) as usize;
        let len = u32_at(image, at + 4) as usize;
        &image[at..at + len]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// All tables by the road a guest takes, checksums checked.
    fn tables(image: &[u8]) -> Vec<&[u8]> {
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let xsdt = table(image, u64_at(image, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut tables = vec![xsdt];
        for entry in xsdt[36..].chunks(8) {
            tables.push(table(image, u64::from_le_bytes(entry.try_into().unwrap())));
        }
        let fadt = tables[1];
        assert_eq!(&fadt[..4], b"FACP");
        tables.push(table(image, u64_at(fadt, 140)));
        for table in &tables {
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        }
        tables
    }

    #[test]
    fn a_guest_finds_all_tables() {
        for vcpus in [1, 2, 32] {
            let image = image(vcpus);
            let names: Vec<_> = tables(&image).iter().map(|table| &table[..4]).collect();
            assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"]);
            let madt = tables(&image)[2];
            assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus) + 12);
        }
    }

    #[test]
    fn the_fadt_is_hardware_reduced_and_names_the_power_ports() {
        let image = image(1);
        let fadt = tables(&image)[1];
        let flags = u32_at(fadt, 112);
        assert_eq!(flags & 1 << 20, 1 << 20);
        assert_eq!(flags & 1 << 10, 1 << 10);
        assert_eq!(flags & 1 << 19, 1 << 19);
        assert_eq!(u64_at(fadt, 120), 0x602);
        assert_eq!(fadt[128], 1);
        assert_eq!(u64_at(fadt, 248), 0x600);
        assert_eq!(u64_at(fadt, 260), 0x601);
    }

    #[test]
    fn ecam_is_bus_0_alone() {
        let image = image(1);
        let mcfg = tables(&image)[3];
        assert_eq!(u64_at(mcfg, 44), 0xe000_0000);
        assert_eq!(&mcfg[52..56], [0, 0, 0, 0]);
    }

    #[test]
    fn a_slot_that_may_be_plugged_has_a_device_to_notify() {
        let image = image(1);
        let dsdt = tables(&image)[4];
        for slot in layout::HOTPLUG_SLOTS {
            let name = format!("HS{slot:02}");
            let count = dsdt.windows(4).filter(|at| *at == name.as_bytes()).count();
            // Itself, and one notification of each kind.
            assert_eq!(count, 3, "{name}");
        }
        assert!(dsdt.windows(8).any(|at| at == b"ACPI0013"));
    }

    #[test]
    fn a_processor_that_may_be_plugged_has_an_object() {
        let image = growing(2, 4);
        let madt = tables(&image)[2];
        let apics: Vec<_> = madt[44..][..32].chunks(8).collect();
        let flags: Vec<_> = apics.iter().map(|apic| u32_at(apic, 4)).collect();
        assert_eq!(flags, [1, 1, 2, 2]);
        let dsdt = tables(&image)[4];
        let count = |name: &[u8]| dsdt.windows(4).filter(|at| *at == name).count();
        // Itself, and one notification of each kind.
        let counts = [b"CP01", b"CP02", b"CP03", b"CP04"].map(|name| count(name));
        assert_eq!(counts, [0, 3, 3, 0]);
        // What the guest takes for its APIC: number and ID, enabled.
        let apic = [0, 8, 3, 3, 1, 0, 0, 0];
        assert!(dsdt.windows(8).any(|at| at == apic));
        assert!(!growing(2, 2).windows(4).any(|at| at == b"CHPR"));
    }

    #[test]
    fn the_generation_id_is_found_and_notified_of() {
        let image = image(1);
        let dsdt = tables(&image)[4];
        // The names of the device, and its buffer's address: a package of two numbers.
        assert!(dsdt.windows(15).any(|at| at == b"VM_Gen_Counter\0"));
        let address = [b'A', b'D', b'D', b'R', 0x12, 8, 2, 0xc, 0, 0xf0, 0xf, 0, 0];
        assert!(dsdt.windows(address.len()).any(|at| at == address));
        let count = dsdt.windows(4).filter(|at| *at == b"VGEN").count();
        assert_eq!(count, 2);
        assert_eq!(layout::GENERATION_ID.0, 0xf_f000);
    }

    #[test]
    fn the_tables_fit_their_place() {
        let size = layout::GENERATION_ID.0 - layout::ACPI.start;
        assert!(growing(1, 32).len() as u64 <= size);
        let quiet = Tables {
            vcpus: 1,
            most_vcpus: 1,
            serial: false,
        };
        assert!(quiet.build(BASE).len() < image(1).len());
    }
}
