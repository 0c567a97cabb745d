// SPDX-License-Identifier: Apache-2.0
//! Which blocks of the region the guest has, and how much it is to have.

use std::ops::Range;

/// Bytes of a block: what Linux plugs at a time, and a huge page of the host's.
pub(super) const BLOCK: u64 = 2 << 20;

/// What becomes of a request (virtio 1.2, section 5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is done.
    Done,
    /// It would go beyond what the guest is to have.
    Refused,
    /// It makes no sense.
    Wrong,
}

/// The state of a range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

/// The region.
#[derive(Debug)]
pub(super) struct Region {
    start: u64,
    /// Whether the guest has it.
    blocks: Vec<bool>,
    plugged: u64,
    requested: u64,
}

impl Region {
    /// A region of whole blocks, none of them plugged.
    pub(super) fn new(range: &Range<u64>) -> Self {
        let size = range.end.saturating_sub(range.start);
        let count = size.checked_div(BLOCK).unwrap_or_default();
        Self {
            start: range.start,
            blocks: vec![false; usize::try_from(count).unwrap_or_default()],
            plugged: 0,
            requested: 0,
        }
    }

    /// Address of the first block.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Bytes in all.
    pub(super) fn size(&self) -> u64 {
        bytes(self.blocks.len())
    }

    /// Bytes that the guest has.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Bytes of the blocks that the guest has, counted.
    #[cfg(any(test, fuzzing))]
    pub(super) fn count(&self) -> u64 {
        bytes(self.blocks.iter().filter(|plugged| **plugged).count())
    }

    /// Bytes that the guest is to have.
    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    /// Sets how much the guest is to have, up to whole blocks and no more than there are. Whether
    /// that is new.
    pub(super) fn request(&mut self, bytes: u64) -> bool {
        let size = self.size();
        let wanted = bytes.checked_next_multiple_of(BLOCK).unwrap_or(size);
        let before = std::mem::replace(&mut self.requested, wanted.min(size));
        self.requested != before
    }

    /// The guest takes blocks.
    pub(super) fn plug(&mut self, address: u64, count: u16) -> Verdict {
        let more = bytes(count.into());
        let requested = self.requested;
        let plugged = self.plugged.saturating_add(more);
        let Some(blocks) = self.find(address, count) else {
            return Verdict::Wrong;
        };
        if blocks.contains(&true) {
            return Verdict::Wrong;
        }
        if plugged > requested {
            return Verdict::Refused;
        }
        blocks.fill(true);
        self.plugged = plugged;
        Verdict::Done
    }

    /// The guest gives blocks back.
    pub(super) fn unplug(&mut self, address: u64, count: u16) -> Verdict {
        let Some(blocks) = self.find(address, count) else {
            return Verdict::Wrong;
        };
        if blocks.contains(&false) {
            return Verdict::Wrong;
        }
        blocks.fill(false);
        self.plugged = self.plugged.saturating_sub(bytes(count.into()));
        Verdict::Done
    }

    /// The guest has nothing any more.
    pub(super) fn unplug_all(&mut self) {
        self.blocks.fill(false);
        self.plugged = 0;
    }

    /// How these blocks are, if they are there.
    pub(super) fn state(&mut self, address: u64, count: u16) -> Option<State> {
        let blocks = self.find(address, count)?;
        Some(match (blocks.contains(&true), blocks.contains(&false)) {
            (true, true) => State::Mixed,
            (true, false) => State::Plugged,
            (false, _) => State::Unplugged,
        })
    }

    /// One block or more, at a block's address, all within the region.
    fn find(&mut self, address: u64, count: u16) -> Option<&mut [bool]> {
        let offset = address.checked_sub(self.start)?;
        if count == 0 || !offset.is_multiple_of(BLOCK) {
            return None;
        }
        let first = usize::try_from(offset.checked_div(BLOCK)?).ok()?;
        let end = first.checked_add(count.into())?;
        self.blocks.get_mut(first..end)
    }
}

/// Bytes of that many blocks.
pub(super) fn bytes(count: usize) -> u64 {
    u64::try_from(count)
        .unwrap_or(u64::MAX)
        .saturating_mul(BLOCK)
}
