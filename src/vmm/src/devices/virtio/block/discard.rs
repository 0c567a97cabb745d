// SPDX-License-Identifier: Apache-2.0
//! Discard and write zeroes (virtio 1.2, section 5.2.6): requests whose data is a list of ranges
//! that lose what they hold. The list is copied once, and all of it is checked before the first
//! range is touched.
//!
//! A discarded range becomes a hole where the file can have one; discard is advice, so where it
//! can't, nothing is done. Zeroes are a promise: they are written where nothing cheaper makes them.

use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use super::direct::Direct;
use super::request::{Buffers, Disk, IO_ERROR, SECTOR, UNSUPPORTED};

/// Most ranges of one request.
pub(super) const MAX_RANGES: u32 = 16;
/// Most sectors of a range to discard: 1 GiB.
pub(super) const MAX_DISCARD: u32 = 1 << 21;
/// Most sectors of a range to fill with zeroes: 64 MiB, as they may have to be written one by one
/// while the driver's next requests wait.
pub(super) const MAX_ZEROES: u32 = 1 << 17;

/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE: usize = 16;
/// Its flag: the sectors may be given back to the host.
const UNMAP: u32 = 1;

/// Zeroes written at a time.
const PIECE: u64 = 64 << 10;

/// What is to become of the ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Clearing {
    /// The driver doesn't mind.
    Discard,
    /// They read as zeroes.
    Zeroes,
}

/// Bytes of the disk.
#[derive(Debug, Clone, Copy)]
struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

impl Disk {
    /// Clears the ranges that `list` describes.
    pub(super) fn clear(&self, clearing: Clearing, list: &Buffers<'_>) -> Result<(), u8> {
        for range in self.ranges(clearing, list)? {
            match clearing {
                // Done or not makes no difference to what the driver may expect.
                Clearing::Discard => self.allocate(FallocateFlags::PUNCH_HOLE, range).map(drop)?,
                Clearing::Zeroes => self.zero(range)?,
            }
        }
        Ok(())
    }

    /// The ranges with something in them; none of them if one is bad.
    fn ranges(&self, clearing: Clearing, list: &Buffers<'_>) -> Result<Vec<Range>, u8> {
        let max = usize::try_from(MAX_RANGES).unwrap_or_default();
        if list.len() > max.saturating_mul(RANGE) {
            return Err(IO_ERROR);
        }
        let mut bytes = vec![0; list.len()];
        list.read(&mut bytes).ok_or(IO_ERROR)?;
        let (descriptions, rest) = bytes.as_chunks::<RANGE>();
        if descriptions.is_empty() || !rest.is_empty() {
            return Err(IO_ERROR);
        }
        let mut ranges = Vec::with_capacity(descriptions.len());
        for description in descriptions {
            let range = self.range_described(clearing, description)?;
            // The kernel refuses an empty range.
            if range.len > 0 {
                ranges.push(range);
            }
        }
        Ok(ranges)
    }

    fn range_described(&self, clearing: Clearing, description: &[u8; RANGE]) -> Result<Range, u8> {
        let &[
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            c0,
            c1,
            c2,
            c3,
            f0,
            f1,
            f2,
            f3,
        ] = description;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let (known, max) = match clearing {
            // To unmap is what a discard is: it has no flag for it (section 5.2.6.2).
            Clearing::Discard => (0, MAX_DISCARD),
            Clearing::Zeroes => (UNMAP, MAX_ZEROES),
        };
        if flags & !known != 0 {
            return Err(UNSUPPORTED);
        }
        if count > max {
            return Err(IO_ERROR);
        }
        let offset = self.offset(sector, count.into())?;
        Ok(Range {
            offset,
            len: u64::from(count).checked_mul(SECTOR).ok_or(IO_ERROR)?,
            unmap: flags & UNMAP != 0,
        })
    }

    fn zero(&self, range: Range) -> Result<(), u8> {
        // A hole reads as zeroes.
        if range.unmap && self.allocate(FallocateFlags::PUNCH_HOLE, range)? {
            return Ok(());
        }
        if self.allocate(FallocateFlags::ZERO_RANGE, range)? {
            return Ok(());
        }
        let mut zeroes = vec![0_u8; usize::try_from(PIECE).unwrap_or_default()];
        let (mut offset, mut left) = (range.offset, range.len);
        while left > 0 {
            let step = left.min(PIECE);
            let len = usize::try_from(step).map_err(|_| IO_ERROR)?;
            let piece = zeroes.get_mut(..len).ok_or(IO_ERROR)?;
            self.write(Buffers::of(piece), offset)?;
            self.filled.fetch_add(step, Ordering::Relaxed);
            offset = offset.saturating_add(step);
            left = left.saturating_sub(step);
        }
        Ok(())
    }

    /// Changes how the file holds a range, and never its size; false if it can't.
    fn allocate(&self, mode: FallocateFlags, range: Range) -> Result<bool, u8> {
        let mode = mode | FallocateFlags::KEEP_SIZE;
        let _shared = self.direct.as_ref().map(Direct::share);
        match retry_on_intr(|| fallocate(&self.file, mode, range.offset, range.len)) {
            Ok(()) => Ok(true),
            // Not on this file system, not with this kind of file, not at this place: a block
            // device takes whole blocks of its own only.
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::INVAL) => Ok(false),
            Err(error) => Err(self.failed(&error.into())),
        }
    }
}
