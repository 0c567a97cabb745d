// SPDX-License-Identifier: Apache-2.0
//! How PCI devices come and go: the generic event device (ACPI 6.5, section 5.6.9) reads from the
//! machine's registers which slots changed, and notifies each; a slot's `_EJ0` says that the guest
//! has let go.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Interrupt,
    Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Store, ZERO,
};

use super::{bytes, layout};

/// The machine's registers (`devices::HotplugRegisters`): a device has come, is to go, has gone.
const COME: &str = "PCOM";
const GO: &str = "PGO_";
const EJECT: &str = "PEJT";

/// Notifications (section 5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The registers, for the methods below.
pub(super) fn registers() -> Vec<u8> {
    let (start, size) = (layout::HOTPLUG_PORT, 12_u8);
    let mut aml = bytes(&OpRegion::new(
        "PHPR".into(),
        OpRegionSpace::SystemIO,
        &start,
        &size,
    ));
    let fields = [COME, GO, EJECT].map(|name| FieldEntry::Named(field_name(name), 32));
    aml.extend(bytes(&Field::new(
        "PHPR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.into(),
    )));
    aml
}

/// The device whose interrupt says that something changed.
pub(super) fn event_device() -> Vec<u8> {
    let pin = u32::from(layout::HOTPLUG_PIN);
    let interrupt = Interrupt::new(true, true, false, false, pin);
    let mut changes = Vec::new();
    for (register, notification) in [(COME, DEVICE_CHECK), (GO, EJECT_REQUEST)] {
        // Reading a register clears it.
        changes.extend(bytes(&Store::new(&Local(0), &Path::new(register))));
        for slot in layout::HOTPLUG_SLOTS {
            let path = Path::new(&format!("\\_SB_.PCI0.{}", slot_name(slot)));
            let notify = Notify::new(&path, &notification);
            let mask = mask(slot);
            let changed = And::new(&ZERO, &Local(0), &mask);
            changes.extend(bytes(&If::new(&changed, vec![&notify])));
        }
    }
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

/// The slots, to lie below the host bridge.
pub(super) fn slots() -> Vec<Raw> {
    layout::HOTPLUG_SLOTS.map(slot).collect()
}

fn slot(number: u8) -> Raw {
    let address = u32::from(number) << 16;
    let eject = bytes(&Store::new(&Path::new(EJECT), &mask(number)));
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
