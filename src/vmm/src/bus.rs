// SPDX-License-Identifier: Apache-2.0
//! Dispatch of a vCPU's memory and port accesses to devices, by address. The map is fixed once
//! the machine runs, so looking up takes no lock; a device locks for itself.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

/// A range of registers. Called from any vCPU thread.
pub trait BusDevice: Debug + Send + Sync {
    /// Reads at `offset` from the start of the range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices can't have one address.
#[derive(Debug, Error)]
#[error("bus range {0:#x?} is empty or taken")]
pub struct RangeTaken(Range<u64>);

/// One address space: memory or ports.
#[derive(Debug, Default)]
pub struct Bus {
    /// Sorted by start; no two overlap.
    devices: Vec<(Range<u64>, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Puts a device at `range`.
    ///
    /// # Errors
    /// The range is empty or overlaps another.
    pub fn insert(
        &mut self,
        range: Range<u64>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), RangeTaken> {
        let at = self
            .devices
            .partition_point(|(other, _)| other.start < range.start);
        let before = at
            .checked_sub(1)
            .and_then(|before| self.devices.get(before));
        let after = self.devices.get(at);
        let free = before.is_none_or(|(other, _)| other.end <= range.start)
            && after.is_none_or(|(other, _)| range.end <= other.start);
        if range.is_empty() || !free {
            return Err(RangeTaken(range));
        }
        self.devices.insert(at, (range, device));
        Ok(())
    }

    /// Reads; where there is no device all bits are set, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; where there is no device nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device that the whole access lies in.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let after = self
            .devices
            .partition_point(|(range, _)| range.start <= address);
        let (range, device) = self.devices.get(after.checked_sub(1)?)?;
        let end = address.checked_add(u64::try_from(len).ok()?)?;
        (end <= range.end).then_some((&**device, address.checked_sub(range.start)?))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_their_device_or_none() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x20..0x30, device.clone()).unwrap();
        bus.insert(0x10..0x18, device.clone()).unwrap();
        let mut data = [0; 4];
        for (address, expected) in [
            (0x22, 2),
            (0x14, 4),
            (0x15, 0xff),
            (0x2d, 0xff),
            (0x0f, 0xff),
        ] {
            bus.read(address, &mut data);
            assert_eq!(data, [expected; 4], "{address:#x}");
        }
        bus.write(0x2f, &[1]);
        bus.write(0x30, &[2]);
        bus.write(u64::MAX, &[3; 8]);
        assert_eq!(*device.0.lock().unwrap(), [(15, vec![1])]);
    }

    #[test]
    fn ranges_do_not_overlap() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x20..0x30, device.clone()).unwrap();
        for range in [0x20..0x30, 0x1f..0x21, 0x2f..0x31, 0x10..0x40, 5..5] {
            assert!(bus.insert(range, device.clone()).is_err());
        }
        bus.insert(0x30..0x31, device.clone()).unwrap();
        bus.insert(0x1f..0x20, device).unwrap();
    }
}
