// SPDX-License-Identifier: Apache-2.0
//! What the ACPI tables' methods read and write when PCI devices or vCPUs come and go: which slots
//! have a new one, which are to give theirs back, which have, and which have one.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;
use crate::interrupt::Line;

/// Registers, 32 bits each, a bit a slot. Reading the first two clears them.
const COME: u64 = 0;
const GO: u64 = 4;
const EJECT: u64 = 8;
const PRESENT: u64 = 12;

/// Hears that the guest has let go of a device.
pub trait Ejected: Debug + Send + Sync {
    /// The device in this slot is the host's again. Called on a vCPU's thread.
    fn ejected(&self, slot: u8);
}

#[derive(Debug, Default)]
struct Pending {
    come: u32,
    go: u32,
    present: u32,
}

/// The registers.
#[derive(Debug)]
pub struct HotplugRegisters {
    line: Arc<dyn Line>,
    ejected: Arc<dyn Ejected>,
    pending: Mutex<Pending>,
}

impl HotplugRegisters {
    /// Ports they take.
    pub const SIZE: u16 = 16;

    /// Registers that interrupt the guest by `line`.
    #[must_use]
    pub fn new(line: Arc<dyn Line>, ejected: Arc<dyn Ejected>) -> Self {
        Self {
            line,
            ejected,
            pending: Mutex::default(),
        }
    }

    /// Has the guest look at a slot that has a new device.
    pub fn announce(&self, slot: u8) {
        let mut pending = self.lock();
        pending.come |= bit(slot);
        pending.present |= bit(slot);
        // If it was to go before, it is not any more.
        pending.go &= !bit(slot);
        drop(pending);
        self.line.raise();
    }

    /// Asks the guest to let go of a slot's device.
    pub fn request_eject(&self, slot: u8) {
        self.lock().go |= bit(slot);
        self.line.raise();
    }

    /// What a slot has is to stay, if the guest has not heard otherwise yet.
    pub fn keep(&self, slot: u8) {
        self.lock().go &= !bit(slot);
    }

    /// Whether a slot has what was announced.
    pub fn is_present(&self, slot: u8) -> bool {
        self.lock().present & bit(slot) != 0
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or_default()
}

impl BusDevice for HotplugRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let mut pending = self.lock();
        let value = match offset {
            COME => std::mem::take(&mut pending.come),
            GO => std::mem::take(&mut pending.go),
            PRESENT => pending.present,
            _ => 0,
        };
        *data = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        if offset != EJECT {
            return;
        }
        let slots = u32::from_le_bytes(bytes);
        self.lock().present &= !slots;
        for slot in (0..32).filter(|slot| slots & bit(*slot) != 0) {
            self.ejected.ejected(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<&'static str>>, Mutex<Vec<u8>>);

    impl Line for Log {
        fn raise(&self) {
            self.0.lock().unwrap().push("raised");
        }
    }

    impl Ejected for Log {
        fn ejected(&self, slot: u8) {
            self.1.lock().unwrap().push(slot);
        }
    }

    fn read(registers: &HotplugRegisters, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_happens_is_told_once() {
        let log = Arc::new(Log::default());
        let registers = HotplugRegisters::new(log.clone(), log.clone());
        registers.announce(24);
        registers.announce(31);
        registers.request_eject(25);
        assert_eq!(log.0.lock().unwrap().len(), 3);
        // Neither by halves nor elsewhere.
        registers.read(0, &mut [0; 2]);
        assert_eq!(read(&registers, 8), 0);
        assert_eq!(read(&registers, 0), 1 << 24 | 1 << 31);
        assert_eq!(read(&registers, 0), 0);
        assert_eq!(read(&registers, 4), 1 << 25);
        assert_eq!(read(&registers, 4), 0);
        assert_eq!(read(&registers, 12), 1 << 24 | 1 << 31);
    }

    #[test]
    fn what_comes_back_is_not_to_go() {
        let log = Arc::new(Log::default());
        let registers = HotplugRegisters::new(log.clone(), log.clone());
        registers.announce(3);
        registers.request_eject(3);
        registers.announce(3);
        assert_eq!(read(&registers, 4), 0);
        assert!(registers.is_present(3));
    }

    #[test]
    fn what_the_guest_has_not_heard_yet_is_taken_back() {
        let log = Arc::new(Log::default());
        let registers = HotplugRegisters::new(log.clone(), log);
        registers.request_eject(2);
        registers.request_eject(3);
        registers.keep(2);
        assert_eq!(read(&registers, 4), 1 << 3);
    }

    #[test]
    fn the_guest_lets_go_of_slots() {
        let log = Arc::new(Log::default());
        let registers = HotplugRegisters::new(log.clone(), log.clone());
        registers.write(8, &(1_u32 << 25 | 1).to_le_bytes());
        registers.write(8, &[1]);
        registers.write(0, &[1; 4]);
        assert_eq!(*log.1.lock().unwrap(), [0, 25]);
        registers.announce(25);
        registers.announce(26);
        registers.write(8, &(1_u32 << 25).to_le_bytes());
        assert_eq!(read(&registers, 12), 1 << 26);
    }
}
