// SPDX-License-Identifier: Apache-2.0
//! What the guest says about itself by writing to a port: how far it has come, that it panicked,
//! that it wants to be off or reset.

use std::fmt::Debug;
use std::sync::Arc;

use crate::bus::BusDevice;
use crate::control::ExitReason;

/// Takes what the guest says. Called on a vCPU thread, any number of times: it must not block.
pub trait GuestEvents: Debug + Send + Sync {
    /// The guest came to the point `code`.
    fn progress(&self, code: u8);

    /// The guest has ended, or says that it wants to.
    fn ended(&self, reason: ExitReason);
}

/// Boot progress codes, one byte.
#[derive(Debug)]
pub struct ProgressPort {
    events: Arc<dyn GuestEvents>,
}

impl ProgressPort {
    /// A port that tells `events`.
    #[must_use]
    pub fn new(events: Arc<dyn GuestEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for ProgressPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let &[code] = data {
            self.events.progress(code);
        }
    }
}

/// pvpanic (QEMU's docs/specs/pvpanic): the bit that says "panicked", readable as supported.
#[derive(Debug)]
pub struct PvPanic {
    events: Arc<dyn GuestEvents>,
}

impl PvPanic {
    const PANICKED: u8 = 1;

    /// A device that tells `events`.
    #[must_use]
    pub fn new(events: Arc<dyn GuestEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            *byte = Self::PANICKED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|byte| byte & Self::PANICKED != 0) {
            self.events.ended(ExitReason::Panic);
        }
    }
}

/// The registers of hardware-reduced ACPI (ACPI 6.5, section 4.8.3.7): sleep control, sleep status
/// and reset, a byte each.
#[derive(Debug)]
pub struct PowerPorts {
    events: Arc<dyn GuestEvents>,
    sleep_type: u8,
    reset_value: u8,
}

impl PowerPorts {
    /// Bytes of the registers together.
    pub const SIZE: u16 = 3;

    /// Sleep enable, in the sleep control register beside the type in bits 2 to 4.
    const SLEEP_ENABLE: u8 = 1 << 5;

    /// Registers that take `sleep_type` for "off" and `reset_value` for "reset".
    #[must_use]
    pub fn new(events: Arc<dyn GuestEvents>, sleep_type: u8, reset_value: u8) -> Self {
        Self {
            events,
            sleep_type,
            reset_value,
        }
    }
}

impl BusDevice for PowerPorts {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[control]) => {
                let enabled = control & Self::SLEEP_ENABLE != 0;
                if enabled && (control >> 2) & 7 == self.sleep_type {
                    self.events.ended(ExitReason::Shutdown);
                }
            }
            (2, &[value]) if value == self.reset_value => self.events.ended(ExitReason::Reboot),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::mem;
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Seen {
        codes: Mutex<Vec<u8>>,
        ends: Mutex<Vec<ExitReason>>,
    }

    impl GuestEvents for Seen {
        fn progress(&self, code: u8) {
            self.codes.lock().unwrap().push(code);
        }

        fn ended(&self, reason: ExitReason) {
            self.ends.lock().unwrap().push(reason);
        }
    }

    #[test]
    fn power_off_and_reset_are_told_apart() {
        let seen = Arc::new(Seen::default());
        let power = PowerPorts::new(seen.clone(), 5, 1);
        power.write(0, &[5 << 2]);
        power.write(0, &[1 << 5 | 1 << 2]);
        power.write(1, &[1]);
        power.write(2, &[6]);
        power.write(2, &[1, 0]);
        power.write(u64::MAX, &[1]);
        assert!(seen.ends.lock().unwrap().is_empty());
        power.write(0, &[1 << 5 | 5 << 2]);
        power.write(2, &[1]);
        let ends = mem::take(&mut *seen.ends.lock().unwrap());
        assert_eq!(ends, [ExitReason::Shutdown, ExitReason::Reboot]);
    }

    #[test]
    fn a_panic_is_told() {
        let seen = Arc::new(Seen::default());
        let device = PvPanic::new(seen.clone());
        let mut supported = [0];
        device.read(0, &mut supported);
        assert_eq!(supported, [1]);
        device.write(0, &[2]);
        device.write(0, &[]);
        device.write(0, &[1]);
        assert_eq!(*seen.ends.lock().unwrap(), [ExitReason::Panic]);
    }

    #[test]
    fn progress_is_a_byte() {
        let seen = Arc::new(Seen::default());
        let port = ProgressPort::new(seen.clone());
        port.write(0, &[0x41]);
        port.write(0, &[1, 2]);
        assert_eq!(*seen.codes.lock().unwrap(), [0x41]);
    }
}
