// SPDX-License-Identifier: Apache-2.0
//! An I/O APIC (Intel 82093AA) with few pins, edge-triggered only: what ACPI's event device needs,
//! and nothing else does. Each pin's redirection entry is a message, as of MSI; the local APICs are
//! the hypervisor's.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::BusDevice;
use crate::interrupt::{Line, MsiController, MsiMessage, MsiSource};

/// Registers in memory: the selector and the window to the selected one.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Registers behind the window.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ENTRIES: u8 = 0x10;

/// The first with a redirection table as we have it.
const VERSION_82093AA: u32 = 0x11;

/// Bits of a redirection entry's lower half: vector, delivery mode and destination mode go into
/// the message; the mask is ours.
const DELIVERY: u64 = 0x7ff;
const LOGICAL: u64 = 1 << 11;
const MASKED: u64 = 1 << 16;
/// What the guest may write; the rest is delivery state.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Where messages to local APICs go.
const MESSAGE_BASE: u64 = 0xfee0_0000;

#[derive(Debug)]
struct Pin {
    source: Box<dyn MsiSource>,
    entry: u64,
    routed: Option<MsiMessage>,
    /// Raised while it was masked. A real one loses the edge; a driver that unmasks late is
    /// happier with it.
    pending: bool,
}

#[derive(Debug)]
struct State {
    select: u8,
    id: u32,
    pins: Vec<Pin>,
}

/// The controller.
#[derive(Debug)]
pub struct IoApic {
    state: Mutex<State>,
}

impl IoApic {
    /// Bytes of its registers.
    pub const SIZE: u64 = 0x20;

    /// A controller with `pins` pins, all masked.
    ///
    /// # Errors
    /// No interrupt source is left.
    pub fn new(pins: u8, controller: &dyn MsiController) -> io::Result<Self> {
        let pins = (0..pins).map(|_| {
            Ok(Pin {
                source: controller.source()?,
                entry: MASKED,
                routed: None,
                pending: false,
            })
        });
        let state = State {
            select: 0,
            id: 0,
            pins: pins.collect::<io::Result<_>>()?,
        };
        Ok(Self {
            state: Mutex::new(state),
        })
    }

    /// A wire to this pin.
    #[must_use]
    pub fn line(self: &Arc<Self>, pin: usize) -> Arc<dyn Line> {
        let controller = Arc::clone(self);
        Arc::new(Wire { controller, pin })
    }
}

/// What is connected to a pin.
#[derive(Debug)]
struct Wire {
    controller: Arc<IoApic>,
    pin: usize,
}

impl Line for Wire {
    fn raise(&self) {
        let mut state = self.controller.state.lock();
        let state = state.as_mut().unwrap_or_else(|error| error.get_mut());
        if let Some(pin) = state.pins.get_mut(self.pin) {
            pin.pending = true;
            pin.deliver();
        }
    }
}

impl Pin {
    fn message(&self) -> MsiMessage {
        let destination = (self.entry >> 56) << 12;
        let logical = if self.entry & LOGICAL != 0 { 1 << 2 } else { 0 };
        MsiMessage {
            address: MESSAGE_BASE | destination | logical,
            data: u32::try_from(self.entry & DELIVERY).unwrap_or_default(),
        }
    }

    /// Brings the route in line with the entry, and sends what pends.
    fn deliver(&mut self) {
        if self.entry & MASKED != 0 {
            return;
        }
        let message = self.message();
        if self.routed != Some(message) {
            if let Err(error) = self.source.route(message) {
                tracing::warn!(%error, "can't route an interrupt of the I/O APIC");
                return;
            }
            self.routed = Some(message);
        }
        if std::mem::take(&mut self.pending)
            && let Err(error) = self.source.trigger()
        {
            tracing::warn!(%error, "can't send an interrupt of the I/O APIC");
        }
    }
}

impl State {
    fn read(&self) -> u32 {
        match self.select {
            ID => self.id,
            VERSION => {
                let last = u32::try_from(self.pins.len())
                    .unwrap_or(1)
                    .saturating_sub(1);
                last << 16 | VERSION_82093AA
            }
            _ => self.pin().map_or(0, |(pin, shift)| {
                let entry = self.pins.get(pin).map_or(0, |pin| pin.entry);
                u32::try_from(entry >> shift & u64::from(u32::MAX)).unwrap_or_default()
            }),
        }
    }

    fn write(&mut self, value: u32) {
        if self.select == ID {
            self.id = value & 0x0f00_0000;
        } else if let Some((pin, shift)) = self.pin()
            && let Some(pin) = self.pins.get_mut(pin)
        {
            let half = u64::from(u32::MAX) << shift;
            let new = u64::from(value) << shift;
            pin.entry = (pin.entry & !half | new) & WRITABLE;
            pin.deliver();
        }
    }

    /// The pin whose entry is selected, and how far its half is shifted.
    fn pin(&self) -> Option<(usize, u32)> {
        let register = self.select.checked_sub(ENTRIES)?;
        let shift = if register & 1 == 0 { 0 } else { 32 };
        Some((usize::from(register / 2), shift))
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match offset {
            SELECT => u32::from(state.select),
            WINDOW => state.read(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let [select, ..] = bytes;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            SELECT => state.select = select,
            // Registers are written whole.
            WINDOW if data.len() == 4 => state.write(u32::from_le_bytes(bytes)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::mock::MockController;

    fn write(apic: &IoApic, register: u8, value: u32) {
        apic.write(SELECT, &[register, 0, 0, 0]);
        apic.write(WINDOW, &value.to_le_bytes());
    }

    fn read(apic: &IoApic, register: u8) -> u32 {
        let mut data = [0; 4];
        apic.write(SELECT, &[register, 0, 0, 0]);
        apic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_driver_finds_its_pins_masked() {
        let apic = IoApic::new(2, &MockController::default()).unwrap();
        assert_eq!(read(&apic, 1), 0x1_0011);
        assert_eq!(read(&apic, 0x12), 0x1_0000);
        assert_eq!(read(&apic, 0x13), 0);
        // No third pin.
        write(&apic, 0x14, 0x31);
        assert_eq!(read(&apic, 0x14), 0);
        write(&apic, 0xff, 0);
    }

    #[test]
    fn a_raised_pin_sends_its_message_once_it_may() {
        let controller = MockController::default();
        let apic = Arc::new(IoApic::new(2, &controller).unwrap());
        let line = apic.line(1);
        line.raise();
        assert_eq!(controller.sent.take(), []);
        write(&apic, 0x13, 3 << 24);
        write(&apic, 0x12, 0x31);
        let message = MsiMessage {
            address: 0xfee0_3000,
            data: 0x31,
        };
        assert_eq!(controller.sent.take(), [message]);
        line.raise();
        assert_eq!(controller.sent.take(), [message]);
        write(&apic, 0x12, 0x1_0031);
        line.raise();
        assert_eq!(controller.sent.take(), []);
        // Logical destination, lowest priority.
        write(&apic, 0x12, 0x932);
        let message = MsiMessage {
            address: 0xfee0_3004,
            data: 0x132,
        };
        assert_eq!(controller.sent.take(), [message]);
    }
}
