// SPDX-License-Identifier: Apache-2.0
//! How much each side of a stream may send (virtio 1.2, section 5.10.6.3).
//!
//! Counters run freely and wrap, as the standard has it.

use std::num::Wrapping;

/// What the guest grants us: it says in each header how much it can hold and has passed on.
#[derive(Debug, Default)]
pub(super) struct Grant {
    buf_alloc: u32,
    fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl Grant {
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.fwd_cnt = Wrapping(fwd_cnt);
    }

    /// Bytes that may be sent now. A guest that claims to have passed on more than it was sent,
    /// or that took buffer space back, has none to give.
    pub(super) fn available(&self) -> u32 {
        let in_flight = self.sent - self.fwd_cnt;
        self.buf_alloc.saturating_sub(in_flight.0)
    }

    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent += bytes;
    }
}

/// What we grant the guest.
#[derive(Debug)]
pub(super) struct Window {
    buf_alloc: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// The `forwarded` that the guest knows of.
    announced: Wrapping<u32>,
}

impl Window {
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
        }
    }

    /// Counts bytes that came; false if the guest had no right to send that many.
    #[must_use]
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let held = self.received - self.forwarded;
        let fits = held
            .0
            .checked_add(bytes)
            .is_some_and(|held| held <= self.buf_alloc);
        if fits {
            self.received += bytes;
        }
        fits
    }

    /// Counts bytes that left for the host.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded += bytes;
    }

    /// Whether so much has been forwarded that the guest should hear of it. A quarter of the
    /// window keeps a busy guest from ever waiting, at one small packet for many large ones.
    pub(super) fn update_due(&self) -> bool {
        (self.forwarded - self.announced).0 >= self.buf_alloc.div_ceil(4)
    }

    /// The values for a header that is about to be sent: `buf_alloc` and `fwd_cnt`.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (self.buf_alloc, self.forwarded.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grant_shrinks_and_grows() {
        let mut grant = Grant::default();
        assert_eq!(grant.available(), 0);
        grant.update(1000, 0);
        grant.sent(600);
        assert_eq!(grant.available(), 400);
        grant.update(1000, 600);
        assert_eq!(grant.available(), 1000);
    }

    #[test]
    fn counters_wrap() {
        let mut grant = Grant::default();
        grant.sent(u32::MAX - 9);
        grant.update(100, u32::MAX - 9);
        grant.sent(50);
        assert_eq!(grant.available(), 50);
        grant.update(100, 40);
        assert_eq!(grant.available(), 100);
    }

    #[test]
    fn a_lying_guest_gains_nothing() {
        let mut grant = Grant::default();
        grant.update(1000, 500);
        assert_eq!(grant.available(), 0);
        grant.update(0, 0);
        grant.sent(10);
        assert_eq!(grant.available(), 0);
    }

    #[test]
    fn the_window_is_never_exceeded() {
        let mut window = Window::new(100);
        assert!(window.receive(100));
        assert!(!window.receive(1));
        window.forward(30);
        assert!(!window.receive(31));
        assert!(window.receive(30));
        assert!(!window.receive(u32::MAX));
    }

    #[test]
    fn an_update_is_due_after_a_quarter() {
        let mut window = Window::new(100);
        assert!(window.receive(100));
        window.forward(24);
        assert!(!window.update_due());
        window.forward(1);
        assert!(window.update_due());
        assert_eq!(window.announce(), (100, 25));
        assert!(!window.update_due());
    }
}
