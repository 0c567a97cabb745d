// SPDX-License-Identifier: Apache-2.0
//! The PCI slots and the devices in them, at the start and later.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::{MachineError, MachineEvents};
use crate::arch::x86_64::layout;
use crate::devices::Ejected;
use crate::devices::virtio::{GuestMemory, VirtioDevice, VirtioPciFunction};
use crate::interrupt::{Doorbells, MsiController};
use crate::pci::{PciBus, PciFunction, Slot};

/// Slots of devices that stay.
pub(super) const FIXED: Range<u8> = 0..layout::HOTPLUG_SLOTS.start;

#[derive(Debug)]
struct Plugged {
    slot: Slot,
    name: String,
    function: Arc<VirtioPciFunction>,
}

/// The slots.
#[derive(Debug)]
pub(super) struct Slots {
    bus: Arc<PciBus>,
    memory: GuestMemory,
    interrupts: Arc<dyn MsiController>,
    doorbells: Arc<dyn Doorbells>,
    events: Arc<dyn MachineEvents>,
    plugged: Mutex<Vec<Plugged>>,
}

impl Slots {
    pub(super) fn new(
        memory: GuestMemory,
        interrupts: Arc<dyn MsiController>,
        doorbells: Arc<dyn Doorbells>,
        events: Arc<dyn MachineEvents>,
    ) -> Self {
        Self {
            bus: Arc::new(PciBus::new(Vec::new())),
            memory,
            interrupts,
            doorbells,
            events,
            plugged: Mutex::default(),
        }
    }

    pub(super) fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }

    /// Puts a device in the first free slot of `range`, and returns the slot's number.
    pub(super) fn plug(
        &self,
        range: Range<u8>,
        name: String,
        device: Box<dyn VirtioDevice>,
    ) -> Result<u8, MachineError> {
        let mut plugged = self.lock();
        if plugged.iter().any(|other| other.name == name) {
            return Err(MachineError::Twice(name));
        }
        let free = |slot: &Slot| plugged.iter().all(|other| other.slot != *slot);
        let slot = range.filter_map(Slot::new).find(free);
        let slot = slot.ok_or(MachineError::Slots)?;
        let bars = bars(slot).ok_or(MachineError::Slots)?;
        let function = VirtioPciFunction::new(
            &name,
            device,
            self.memory.clone(),
            bars,
            &*self.interrupts,
            Arc::clone(&self.doorbells),
        );
        let function = match function {
            Ok(function) => Arc::new(function),
            Err(source) => return Err(MachineError::Device { name, source }),
        };
        let on_bus = Arc::clone(&function) as Arc<dyn PciFunction>;
        self.bus.insert(slot, on_bus);
        plugged.push(Plugged {
            slot,
            name,
            function,
        });
        Ok(slot.number())
    }

    /// The slot of the device called `name`, if the guest can let go of it.
    pub(super) fn find(&self, name: &str) -> Option<u8> {
        let plugged = self.lock();
        let slot = plugged.iter().find(|plugged| plugged.name == name)?.slot;
        Some(slot.number()).filter(|slot| layout::HOTPLUG_SLOTS.contains(slot))
    }

    /// Has the device called `name` look again at what it stands for on the host.
    pub(super) fn look_again(&self, name: &str) -> Result<(), MachineError> {
        let plugged = self.lock();
        let device = plugged.iter().find(|plugged| plugged.name == name);
        let Some(device) = device.map(|plugged| Arc::clone(&plugged.function)) else {
            return Err(MachineError::Missing(name.to_owned()));
        };
        drop(plugged);
        device.look_again().map_err(|source| MachineError::Changed {
            name: name.to_owned(),
            source,
        })
    }

    /// Resets all devices: none touches guest memory any more. Side by side: one may wait for the
    /// host for ever, and another holds the connections that the owner waits for.
    pub(super) fn reset(&self) {
        let plugged = self.lock();
        thread::scope(|scope| {
            let alone = plugged.iter().filter(|plugged| {
                let reset = || plugged.function.reset();
                thread::Builder::new().spawn_scoped(scope, reset).is_err()
            });
            // After the others are on their way.
            for plugged in alone.collect::<Vec<_>>() {
                plugged.function.reset();
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Plugged>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ejected for Slots {
    fn ejected(&self, slot: u8) {
        if !layout::HOTPLUG_SLOTS.contains(&slot) {
            return;
        }
        let mut plugged = self.lock();
        let at = plugged
            .iter()
            .position(|plugged| plugged.slot.number() == slot);
        // A guest may eject what isn't there.
        let Some(gone) = at.map(|at| plugged.swap_remove(at)) else {
            return;
        };
        // Before the slot is free: whoever plugs next may get it.
        self.bus.remove(gone.slot);
        drop(plugged);
        gone.function.reset();
        let name = gone.name.clone();
        // Its files close here, before anybody is told.
        drop(gone);
        self.events.unplugged(&name);
    }
}

/// Addresses of a slot's BARs, in memory and ports. Every slot has its own, also those whose
/// devices come later, whichever the guest then chooses.
fn bars(slot: Slot) -> Option<(u32, u32)> {
    let number = u32::from(slot.number());
    let memory = u32::try_from(layout::PCI_MEMORY.start).ok()?;
    let memory = memory.checked_add(VirtioPciFunction::MEMORY_SIZE.checked_mul(number)?)?;
    let ports = u32::from(layout::PCI_PORTS.start);
    let ports = ports.checked_add(VirtioPciFunction::PORTS_SIZE.checked_mul(number)?)?;
    Some((memory, ports))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::OwnedFd;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::control::{ExitReason, Milestone};
    use crate::devices::virtio::rng::RngDevice;
    use crate::interrupt::mock::{MockController, MockDoorbells};

    #[derive(Debug, Default)]
    struct Heard(Mutex<Vec<String>>);

    impl MachineEvents for Heard {
        fn milestone(&self, _: Milestone) {}

        fn progress(&self, _: u8) {}

        fn ended(&self, _: ExitReason) {}

        fn connection(&self, _: u32, _: OwnedFd) -> io::Result<()> {
            Ok(())
        }

        fn resized(&self) {}

        fn unplugged(&self, name: &str) {
            self.0.lock().unwrap().push(name.to_owned());
        }
    }

    fn slots() -> (Slots, Arc<Heard>) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let heard = Arc::new(Heard::default());
        let slots = Slots::new(
            GuestMemory::new(memory),
            Arc::new(MockController::default()),
            Arc::new(MockDoorbells::default()),
            Arc::clone(&heard) as _,
        );
        (slots, heard)
    }

    fn plug(slots: &Slots, range: Range<u8>, name: &str) -> Result<u8, MachineError> {
        slots.plug(range, name.to_owned(), Box::new(RngDevice::new()))
    }

    fn vendor(slots: &Slots, slot: u64) -> [u8; 2] {
        let mut vendor = [0; 2];
        slots.bus.read_ecam(slot << 15, &mut vendor);
        vendor
    }

    #[test]
    fn slots_are_filled_left_and_filled_again() {
        let (slots, heard) = slots();
        assert_eq!(plug(&slots, FIXED, "disk").unwrap(), 0);
        let hot = layout::HOTPLUG_SLOTS;
        for number in hot.clone() {
            let name = format!("net {number}");
            assert_eq!(plug(&slots, hot.clone(), &name).unwrap(), number);
        }
        assert!(matches!(
            plug(&slots, hot.clone(), "one more"),
            Err(MachineError::Slots)
        ));
        assert_eq!(slots.find("net 26"), Some(26));
        slots.ejected(26);
        assert_eq!(*heard.0.lock().unwrap(), ["net 26"]);
        assert_eq!(slots.find("net 26"), None);
        assert_eq!(vendor(&slots, 26), [0xff; 2]);
        assert_eq!(plug(&slots, hot, "another").unwrap(), 26);
        assert_eq!(vendor(&slots, 26), [0xf4, 0x1a]);
    }

    #[test]
    fn a_guest_lets_go_of_nothing_else() {
        let (slots, heard) = slots();
        plug(&slots, FIXED, "disk").unwrap();
        for slot in [0, 1, 24, 31, 32, 255] {
            slots.ejected(slot);
        }
        assert_eq!(vendor(&slots, 0), [0xf4, 0x1a]);
        assert_eq!(slots.find("disk"), None);
        assert!(heard.0.lock().unwrap().is_empty());
        assert!(matches!(
            plug(&slots, FIXED, "disk"),
            Err(MachineError::Twice(_))
        ));
    }

    #[test]
    fn every_slots_bars_lie_in_their_windows_apart() {
        let mut last = (0, 0);
        for number in 0..Slot::COUNT {
            let (memory, ports) = bars(Slot::new(number).unwrap()).unwrap();
            assert!(memory >= last.0 && ports >= last.1);
            assert!(memory.is_multiple_of(VirtioPciFunction::MEMORY_SIZE));
            assert!(ports.is_multiple_of(VirtioPciFunction::PORTS_SIZE));
            last = (
                memory + VirtioPciFunction::MEMORY_SIZE,
                ports + VirtioPciFunction::PORTS_SIZE,
            );
        }
        assert!(u64::from(last.0) <= layout::PCI_MEMORY.end);
        assert!(last.1 <= layout::PCI_PORTS.end.into());
    }
}
