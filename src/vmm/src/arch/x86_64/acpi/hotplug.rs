// SPDX-License-Identifier: Apache-2.0
//! How PCI devices and processors come and go: the generic event device (ACPI 6.5, section 5.6.9)
//! reads from the machine's registers which slots changed, and notifies each; a slot's `_EJ0` says
//! that the guest has let go. Processors that are there from the start have no object here: they
//! stay. The same device tells of a new generation of the machine.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Interrupt, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Return, Store, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::{bytes, layout};

/// Names of the machine's registers (`devices::HotplugRegisters`) for one kind of things: the
/// region, and what has come, is to go, has gone, is there.
struct Registers {
    region: &'static str,
    come: &'static str,
    go: &'static str,
    eject: &'static str,
    present: &'static str,
}

const CARDS: Registers = Registers {
    region: "PHPR",
    come: "PCOM",
    go: "PGO_",
    eject: "PEJT",
    present: "PPRS",
};

const CPUS: Registers = Registers {
    region: "CHPR",
    come: "CCOM",
    go: "CGO_",
    eject: "CEJT",
    present: "CPRS",
};

/// A device's status (section 6.3.7): present, enabled, shown, functioning.
const THERE: u8 = 0xf;

/// Notifications (section 5.6.6); what the first means that is a device's own is up to the device.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
const OWN: u8 = 0x80;

/// Region and field of the register that says that the generation ID has changed.
const GENERATION: (&str, &str) = ("GENR", "GCHG");

impl Registers {
    /// At `port`, for the methods below.
    fn declare(&self, port: u16) -> Vec<u8> {
        let size = 16_u8;
        let space = OpRegionSpace::SystemIO;
        let region = OpRegion::new(self.region.into(), space, &port, &size);
        let mut aml = bytes(&region);
        let fields = [self.come, self.go, self.eject, self.present];
        let fields = fields.map(|name| FieldEntry::Named(field_name(name), 32));
        aml.extend(bytes(&Field::new(
            self.region.into(),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            fields.into(),
        )));
        aml
    }

    /// Notifies each of `slots` of what the registers say.
    fn notify(&self, slots: Range<u8>, path: impl Fn(u8) -> String) -> Vec<u8> {
        let mut changes = Vec::new();
        for (register, notification) in [(self.come, DEVICE_CHECK), (self.go, EJECT_REQUEST)] {
            // Reading a register clears it.
            changes.extend(bytes(&Store::new(&Local(0), &Path::new(register))));
            for slot in slots.clone() {
                let path = Path::new(&path(slot));
                let notify = Notify::new(&path, &notification);
                let mask = mask(slot);
                let changed = And::new(&ZERO, &Local(0), &mask);
                changes.extend(bytes(&If::new(&changed, vec![&notify])));
            }
        }
        changes
    }
}

/// The registers; those of processors where `cpus` may come and go.
pub(super) fn registers(cpus: &Range<u8>) -> Vec<u8> {
    let mut aml = CARDS.declare(layout::HOTPLUG_PORT);
    if !cpus.is_empty() {
        aml.extend(CPUS.declare(layout::CPU_HOTPLUG_PORT));
    }
    aml
}

/// The device whose buffer in memory is the machine's generation ID, by the names that Microsoft has
/// given it ("Virtual Machine Generation ID").
pub(super) fn generation() -> Vec<u8> {
    let (region, field) = GENERATION;
    let space = OpRegionSpace::SystemIO;
    let mut aml = bytes(&OpRegion::new(
        region.into(),
        space,
        &layout::GENERATION_PORT,
        &1_u8,
    ));
    aml.extend(bytes(&Field::new(
        region.into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(field_name(field), 8)],
    )));
    let address = super::low32(layout::GENERATION_ID.0);
    let address = Package::new(vec![&address, &ZERO]);
    aml.extend(bytes(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMUVGID"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )));
    aml
}

/// Notifies of a new generation, if there is one.
fn notify_generation() -> Vec<u8> {
    let mut aml = bytes(&Store::new(&Local(0), &Path::new(GENERATION.1)));
    let path = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&path, &OWN);
    aml.extend(bytes(&If::new(&Local(0), vec![&notify])));
    aml
}

/// The device whose interrupt says that something changed.
pub(super) fn event_device(cpus: &Range<u8>) -> Vec<u8> {
    let pin = u32::from(layout::HOTPLUG_PIN);
    let interrupt = Interrupt::new(true, true, false, false, pin);
    let slot = |slot| format!("\\_SB_.PCI0.{}", slot_name(slot));
    let mut changes = CARDS.notify(layout::HOTPLUG_SLOTS, slot);
    if !cpus.is_empty() {
        let cpu = |cpu| format!("\\_SB_.{}", cpu_name(cpu));
        changes.extend(CPUS.notify(cpus.clone(), cpu));
    }
    changes.extend(notify_generation());
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new("_EVT".into(), 1, true, vec![&Raw(changes)]),
        ],
    ))
}

/// The processors that may come and go.
pub(super) fn processors(cpus: &Range<u8>) -> Vec<u8> {
    cpus.clone().flat_map(processor).collect()
}

fn processor(number: u8) -> Vec<u8> {
    let (register, mask) = (Path::new(CPUS.present), mask(number));
    let is_present = And::new(&ZERO, &register, &mask);
    let there = Return::new(&THERE);
    let if_present = If::new(&is_present, vec![&there]);
    let missing = Return::new(&ZERO);
    let register = Path::new(CPUS.eject);
    let eject = Store::new(&register, &mask);
    // The guest takes the APIC's number from here: in the MADT it is not enabled.
    let apic = ProcessorLocalApic::new(number, number, EnabledStatus::Enabled);
    bytes(&Device::new(
        Path::new(&cpu_name(number)),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &number),
            &Method::new("_STA".into(), 0, false, vec![&if_present, &missing]),
            &Name::new("_MAT".into(), &BufferData::new(bytes(&apic))),
            &Method::new("_EJ0".into(), 1, false, vec![&eject]),
        ],
    ))
}

fn cpu_name(number: u8) -> String {
    format!("CP{number:02}")
}

/// The slots, to lie below the host bridge.
pub(super) fn slots() -> Vec<Raw> {
    layout::HOTPLUG_SLOTS.map(slot).collect()
}

fn slot(number: u8) -> Raw {
    let address = u32::from(number) << 16;
    let eject = bytes(&Store::new(&Path::new(CARDS.eject), &mask(number)));
    Raw(bytes(&Device::new(
        Path::new(&slot_name(number)),
        vec![
            &Name::new("_ADR".into(), &address),
            &Name::new("_SUN".into(), &number),
            &Method::new("_EJ0".into(), 1, false, vec![&Raw(eject)]),
        ],
    )))
}

fn slot_name(number: u8) -> String {
    format!("HS{number:02}")
}

fn mask(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or_default()
}

fn field_name(name: &str) -> [u8; 4] {
    <[u8; 4]>::try_from(name.as_bytes()).unwrap_or(*b"____")
}

/// AML that is there already.
#[derive(Debug)]
pub(super) struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
