// SPDX-License-Identifier: Apache-2.0
//! The bus: finds the function that a configuration, memory or port access is for.

use std::sync::{Arc, PoisonError, RwLock};

use super::config::{BarKind, BarRange, changes_decoding};
use super::function::PciFunction;

/// Device number on bus 0; functions are all number 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u8);

impl Slot {
    /// Device numbers on a bus.
    pub const COUNT: u8 = 32;

    /// A device number below 32.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        (number < Self::COUNT).then_some(Self(number))
    }

    /// The device number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

#[derive(Debug)]
struct Decoded {
    range: BarRange,
    function: Arc<dyn PciFunction>,
}

/// Bus 0 and everything on it.
#[derive(Debug)]
pub struct PciBus {
    slots: RwLock<Vec<(Slot, Arc<dyn PciFunction>)>>,
    /// What decodes which addresses. Written when the guest moves or enables a BAR; queue
    /// notifications go past it, straight to their event descriptors.
    decoded: RwLock<Vec<Decoded>>,
}

impl PciBus {
    /// Bytes of configuration space of one bus.
    pub const ECAM_SIZE: u64 = 1 << 20;

    /// A bus with these functions; of two in one slot the first counts.
    #[must_use]
    pub fn new(slots: Vec<(Slot, Arc<dyn PciFunction>)>) -> Self {
        Self {
            slots: RwLock::new(slots),
            decoded: RwLock::default(),
        }
    }

    /// Puts a function in a slot that has none.
    pub fn insert(&self, slot: Slot, function: Arc<dyn PciFunction>) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.push((slot, function));
    }

    /// Takes a slot's function off the bus: no access reaches it once the call returns, but for
    /// those that are under way.
    pub fn remove(&self, slot: Slot) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|(other, _)| *other != slot);
        drop(slots);
        self.decode();
    }

    /// Reads ECAM; a function that isn't there reads as all ones.
    pub fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        match self.at(offset) {
            Some((function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    /// Writes ECAM.
    pub fn write_ecam(&self, offset: u64, data: &[u8]) {
        let Some((function, register)) = self.at(offset) else {
            return;
        };
        function.write_config(register, data);
        if changes_decoding(register, data.len()) {
            self.decode();
        }
    }

    /// Reads memory or ports behind a BAR; what nothing decodes reads as all ones.
    pub fn read(&self, kind: BarKind, address: u64, data: &mut [u8]) {
        match self.find(kind, address, data.len()) {
            Some((function, bar, offset)) => function.read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes memory or ports behind a BAR.
    pub fn write(&self, kind: BarKind, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(kind, address, data.len()) {
            function.write_bar(bar, offset, data);
        }
    }

    /// The function and register of an ECAM offset: bus in bits 20-27, device in 15-19, function
    /// in 12-14, register in 0-11.
    fn at(&self, offset: u64) -> Option<(Arc<dyn PciFunction>, u16)> {
        if offset >= Self::ECAM_SIZE || (offset >> 12) & 7 != 0 {
            return None;
        }
        let number = u8::try_from((offset >> 15) & 31).ok()?;
        let register = u16::try_from(offset & 0xfff).ok()?;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let (_, function) = slots.iter().find(|(slot, _)| slot.0 == number)?;
        Some((Arc::clone(function), register))
    }

    fn find(
        &self,
        kind: BarKind,
        address: u64,
        len: usize,
    ) -> Option<(Arc<dyn PciFunction>, usize, u64)> {
        let end = address.checked_add(u64::try_from(len).ok()?)?;
        let decoded = self.decoded.read().unwrap_or_else(PoisonError::into_inner);
        let hit = decoded.iter().find(|decoded| {
            let range = decoded.range.range();
            decoded.range.bar.kind == kind && range.start <= address && end <= range.end
        })?;
        let offset = address.checked_sub(hit.range.range().start)?;
        Some((Arc::clone(&hit.function), hit.range.index, offset))
    }

    fn decode(&self) {
        // Locked first, so that of two writes at once the later state is kept.
        let mut decoded = self.decoded.write().unwrap_or_else(PoisonError::into_inner);
        decoded.clear();
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        for (_, function) in &*slots {
            for range in function.decoded() {
                let function = Arc::clone(function);
                decoded.push(Decoded { range, function });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{Bar, ConfigSpace, Identity};

    #[derive(Debug)]
    struct Plain(ConfigSpace);

    impl PciFunction for Plain {
        fn read_config(&self, offset: u16, data: &mut [u8]) {
            self.0.read(offset, data);
        }

        fn write_config(&self, _offset: u16, _data: &[u8]) {}

        fn decoded(&self) -> Vec<BarRange> {
            let bar = Bar {
                kind: BarKind::Memory,
                base: 0xc000_0000,
                size: 0x1000,
            };
            vec![BarRange { index: 2, bar }]
        }

        fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
            data.fill(bar as u8 + offset as u8);
        }

        fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
    }

    fn bus() -> PciBus {
        let function = Plain(ConfigSpace::new(&Identity {
            vendor: 0x1b36,
            device: 8,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        }));
        PciBus::new(vec![(Slot::new(0).unwrap(), Arc::new(function))])
    }

    #[test]
    fn a_bar_is_reached_where_it_is_decoded() {
        let bus = bus();
        let mut data = [0; 2];
        bus.read(BarKind::Memory, 0xc000_0010, &mut data);
        assert_eq!(data, [0xff; 2]);
        // A write to the command register.
        bus.write_ecam(4, &[2, 0]);
        bus.read(BarKind::Memory, 0xc000_0010, &mut data);
        assert_eq!(data, [0x12; 2]);
        for (kind, address) in [
            (BarKind::Io, 0xc000_0010),
            (BarKind::Memory, 0xc000_0fff),
            (BarKind::Memory, 0xbfff_ffff),
        ] {
            bus.read(kind, address, &mut data);
            assert_eq!(data, [0xff; 2]);
        }
    }

    #[test]
    fn ecam_finds_functions_and_reads_ones_elsewhere() {
        let bus = bus();
        let mut data = [0; 4];
        bus.read_ecam(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0008_1b36);
        for offset in [1 << 15, 1 << 12, 1 << 20, u64::MAX] {
            bus.read_ecam(offset, &mut data);
            assert_eq!(data, [0xff; 4]);
            bus.write_ecam(offset, &data);
        }
        assert_eq!(Slot::new(32), None);
    }

    #[test]
    fn functions_come_and_go() {
        let bus = bus();
        let mut data = [0; 4];
        bus.write_ecam(4, &[2, 0]);
        bus.remove(Slot::new(0).unwrap());
        bus.read_ecam(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(BarKind::Memory, 0xc000_0010, &mut data);
        assert_eq!(data, [0xff; 4]);
        let function = Plain(ConfigSpace::new(&Identity {
            vendor: 1,
            device: 2,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        }));
        bus.insert(Slot::new(31).unwrap(), Arc::new(function));
        bus.read_ecam(31 << 15, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0002_0001);
    }

    #[test]
    fn what_nothing_decodes_reads_as_ones() {
        let mut data = [0; 8];
        bus().read(BarKind::Memory, u64::MAX, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus().write(BarKind::Io, 0, &data);
    }
}
