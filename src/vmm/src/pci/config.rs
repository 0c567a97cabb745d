// SPDX-License-Identifier: Apache-2.0
//! A function's configuration space: the type 0 header, base address registers and a capability
//! list (PCI 3.0, chapter 6). 256 bytes: no function here has extended capabilities.

use std::ops::Range;

/// Bytes of configuration space.
const SIZE: usize = 256;

/// Offsets in the header.
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: I/O space, memory space, bus master, INTx disable.
const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_WRITABLE: u16 = COMMAND_IO | COMMAND_MEMORY | 1 << 2 | 1 << 10;

/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Low bit of a base address register in I/O space.
const BAR_IO: u32 = 1;

/// Who a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and interface, 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Which address space a base address register lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// 32-bit memory, not prefetchable.
    Memory,
    /// I/O ports.
    Io,
}

/// A base address register as the machine sets it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its address space.
    pub kind: BarKind,
    /// Its first address; a multiple of `size`.
    pub base: u32,
    /// Its size in bytes, a power of two; 16 at least.
    pub size: u32,
}

/// An address range that a function decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    /// The index of the base address register.
    pub index: usize,
    /// Where, of which kind, how large.
    pub bar: Bar,
}

impl BarRange {
    /// The addresses as a range.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        let base = u64::from(self.bar.base);
        base..base.saturating_add(u64::from(self.bar.size))
    }
}

/// The registers, with a mask of the bits that the guest may write.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: [Option<Bar>; 6],
    /// Where the next capability goes, and the link that will point to it.
    end: usize,
    link: usize,
}

impl ConfigSpace {
    /// A type 0 header with no base address register and no capability. Interrupt Pin is 0: no
    /// function has INTx.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [None; 6],
            end: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        // The class code takes the upper three bytes of the register.
        let class = identity.class << 8 | u32::from(identity.revision);
        space.put(0x08, &class.to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space
    }

    /// Sets base address register `index` (0 to 5); the guest may move it.
    pub fn set_bar(&mut self, index: usize, bar: Bar) {
        let Some(slot) = self.bars.get_mut(index) else {
            return;
        };
        *slot = Some(bar);
        let flags = match bar.kind {
            BarKind::Memory => 0,
            BarKind::Io => BAR_IO,
        };
        // Bits below the size stay as they are: that is how a driver finds the size (6.2.5.1).
        let mask = !bar.size.wrapping_sub(1);
        let offset = BARS.saturating_add(index.saturating_mul(4));
        self.put(offset, &(bar.base | flags).to_le_bytes());
        self.allow(offset, &mask.to_le_bytes());
    }

    /// Appends a capability and returns its offset. `body` follows the two bytes of ID and link;
    /// `writable` says which of its bits the guest may change (missing bytes: none).
    ///
    /// Returns `None` when the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let offset = self.end;
        let body_at = offset.checked_add(2)?;
        let end = body_at.checked_add(body.len())?;
        if end > SIZE {
            return None;
        }
        let pointer = u8::try_from(offset).ok()?;
        self.put(self.link, &[pointer]);
        self.put(offset, &[id, 0]);
        self.put(body_at, body);
        self.allow(body_at, writable);
        self.link = offset.checked_add(1)?;
        self.end = end.next_multiple_of(4);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        u16::try_from(offset).ok()
    }

    /// Reads; bytes past the end are all ones, by which a guest sees that it is the end.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes the bits that may be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, value) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
    }

    /// A little-endian `u16` at `offset`, all ones past the end.
    #[must_use]
    pub fn u16_at(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// A little-endian `u32` at `offset`, all ones past the end.
    #[must_use]
    pub fn u32_at(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The base address registers as the guest has set them, as far as the command register
    /// enables their address space.
    #[must_use]
    pub fn decoded(&self) -> Vec<BarRange> {
        let command = self.u16_at(0x04);
        let mut ranges = Vec::new();
        for (index, bar) in self.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let enabled = match bar.kind {
                BarKind::Memory => command & COMMAND_MEMORY != 0,
                BarKind::Io => command & COMMAND_IO != 0,
            };
            if enabled {
                ranges.push(BarRange {
                    index,
                    bar: Bar {
                        base: self.bar_base(index, bar.size),
                        ..*bar
                    },
                });
            }
        }
        ranges
    }

    fn bar_base(&self, index: usize, size: u32) -> u32 {
        let mut data = [0; 4];
        let offset = BARS.saturating_add(index.saturating_mul(4));
        if let Ok(offset) = u16::try_from(offset) {
            self.read(offset, &mut data);
        }
        u32::from_le_bytes(data) & !size.wrapping_sub(1)
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (byte, value) in self.writable.iter_mut().skip(offset).zip(mask) {
            *byte = *value;
        }
    }
}

/// Whether an access of `len` bytes at `offset` touches a register in `range`.
#[must_use]
pub fn touches(offset: u16, len: usize, range: Range<u16>) -> bool {
    let (start, end) = (usize::from(range.start), usize::from(range.end));
    let offset = usize::from(offset);
    offset < end && offset.saturating_add(len) > start
}

/// Whether a write touches what decides the decoded ranges: the command register or a base
/// address register.
#[must_use]
pub(super) fn changes_decoding(offset: u16, len: usize) -> bool {
    touches(offset, len, 0x04..0x06) || touches(offset, len, 0x10..0x28)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        });
        space.set_bar(
            0,
            Bar {
                kind: BarKind::Memory,
                base: 0xc000_0000,
                size: 0x8000,
            },
        );
        space
    }

    #[test]
    fn the_header_says_who_it_is() {
        let space = space();
        assert_eq!(space.u32_at(0), 0x1042_1af4);
        assert_eq!(space.u32_at(8), 0x0180_0001);
        assert_eq!(space.u16_at(0x2e), 2);
        assert_eq!(space.u32_at(0xfe), 0xffff_0000);
        assert_eq!(space.u32_at(0x100), u32::MAX);
    }

    #[test]
    fn a_driver_finds_a_bars_size_and_moves_it() {
        let mut space = space();
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(space.u32_at(0x10), 0xffff_8000);
        space.write(0x10, &0xc100_1234_u32.to_le_bytes());
        assert_eq!(space.u32_at(0x10), 0xc100_0000);
        assert!(space.decoded().is_empty());
        space.write(0x04, &2_u16.to_le_bytes());
        assert_eq!(space.decoded()[0].range(), 0xc100_0000..0xc100_8000);
    }

    #[test]
    fn the_identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0xff; 16]);
        assert_eq!(space.u32_at(0), 0x1042_1af4);
        assert_eq!(space.u16_at(0x04), COMMAND_WRITABLE);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10], &[]).unwrap();
        let second = space.add_capability(0x09, &[16, 1], &[0, 1]).unwrap();
        assert_eq!(
            space.u16_at(0x06) & STATUS_CAPABILITIES,
            STATUS_CAPABILITIES
        );
        assert_eq!(space.u16_at(0x34) & 0xff, first);
        assert_eq!(space.u16_at(first), second << 8 | 0x11);
        assert_eq!(space.u16_at(second), 0x09);
        space.write(second + 2, &[0xff, 0xff]);
        assert_eq!(space.u16_at(second + 2), 0x0110);
        assert_eq!(space.add_capability(0x09, &[0; 250], &[]), None);
    }
}
