// SPDX-License-Identifier: Apache-2.0
//! Bytes from the guest that the host's program has not taken yet.

use vm_memory::{VolatileSlice, WriteVolatile};

/// A queue of bytes. It grows no further than the stream's window, since `Window` admits no more
/// to it, and gives its memory back when it runs empty.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    /// How many of `bytes` have left.
    start: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes in order.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Adds what the guest's memory holds, leaving out the first `skip` bytes.
    pub(super) fn push_guest(&mut self, slices: &[VolatileSlice<'_>], skip: usize) {
        self.compact();
        let mut skip = skip;
        for slice in slices {
            let here = skip.min(slice.len());
            skip = skip.saturating_sub(here);
            if let Ok(rest) = slice.offset(here) {
                // Can't fail: a vector takes everything.
                let _ = self.bytes.write_all_volatile(&rest);
            }
        }
    }

    /// Forgets the first `count` bytes.
    pub(super) fn pop(&mut self, count: usize) {
        self.start = self.start.saturating_add(count);
        if self.start >= self.bytes.len() {
            *self = Self::default();
        }
    }

    /// Forgets everything; how much it was.
    pub(super) fn clear(&mut self) -> usize {
        let len = self.bytes().len();
        *self = Self::default();
        len
    }

    /// Moves the bytes to the front once half of the room is waste: constant cost a byte.
    fn compact(&mut self) {
        if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start.min(self.bytes.len()));
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_in_which_they_came() {
        let mut backlog = Backlog::default();
        let mut one = *b"abcdef";
        let mut two = *b"ghi";
        let slices = [
            VolatileSlice::from(&mut one[..]),
            VolatileSlice::from(&mut two[..]),
        ];
        backlog.push_guest(&slices, 7);
        assert_eq!(backlog.bytes(), b"hi");
        backlog.push_guest(&slices, 2);
        assert_eq!(backlog.bytes(), b"hicdefghi");
        backlog.pop(8);
        backlog.push_guest(&slices, 8);
        assert_eq!(backlog.bytes(), b"ii");
        backlog.pop(2);
        assert!(backlog.is_empty());
    }

    #[test]
    fn clearing_tells_what_was_lost() {
        let mut backlog = Backlog::default();
        let mut bytes = *b"abc";
        backlog.push_guest(&[VolatileSlice::from(&mut bytes[..])], 0);
        backlog.pop(1);
        assert_eq!(backlog.clear(), 2);
        assert!(backlog.is_empty());
    }
}
