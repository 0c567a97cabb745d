// SPDX-License-Identifier: Apache-2.0
//! A pair of queues and the tap behind it, on their worker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::receive::{Received, Receiver};
use super::tap::Tap;
use super::transmit::{Sent, Transmitter};
use crate::devices::virtio::rate::Limit;
use crate::devices::virtio::{DeviceFault, EventHandler, GuestMemory, Interrupt, Poller};

const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const TAP: u64 = 2;
const RECEIVE_REST: u64 = 3;
const TRANSMIT_REST: u64 = 4;

/// What the queues of a pair may move in a second, where that is limited.
#[derive(Debug)]
pub(super) struct Limits {
    pub(super) receive: Option<Limit>,
    pub(super) transmit: Option<Limit>,
}

/// Whether the cable is plugged in. Shared by all pairs of a device.
#[derive(Debug)]
pub(super) struct Link(AtomicBool);

impl Link {
    pub(super) fn new() -> Self {
        Self(AtomicBool::new(true))
    }

    pub(super) fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// The interface is gone. True for the first who says so.
    pub(super) fn take_down(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// All that a pair's worker owns.
#[derive(Debug)]
pub(super) struct QueuePair {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) receiver: Receiver,
    pub(super) transmitter: Transmitter,
    pub(super) tap: Arc<Tap>,
    pub(super) link: Arc<Link>,
    limits: Limits,
    /// What the tap is waited for; none once it is gone.
    waits: Option<EventSet>,
}

impl QueuePair {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        (receiver, transmitter): (Receiver, Transmitter),
        tap: Arc<Tap>,
        link: Arc<Link>,
        limits: Limits,
    ) -> Self {
        Self {
            memory,
            interrupt,
            receiver,
            transmitter,
            tap,
            link,
            limits,
            waits: Some(EventSet::IN),
        }
    }

    fn receive(&mut self, memory: &GuestMemoryMmap, poller: &Poller) -> Result<(), DeviceFault> {
        let Some(waits) = self.waits else {
            return Ok(());
        };
        let tap = self.tap.file();
        let limit = self.limits.receive.as_ref().map(Limit::limiter);
        match self
            .receiver
            .receive(memory, &*self.interrupt, tap, limit)?
        {
            Received::All | Received::Turn => self.wait_for(poller, waits | EventSet::IN),
            Received::Limited => {
                self.wait_for(poller, waits.difference(EventSet::IN))?;
                self.limits.receive.as_mut().map_or(Ok(()), Limit::sleep)
            }
            // A full tap is no news until the driver has buffers.
            Received::Starved => self.wait_for(poller, waits.difference(EventSet::IN)),
            Received::Gone => self.lose_tap(memory, poller),
        }
    }

    fn transmit(&mut self, memory: &GuestMemoryMmap, poller: &Poller) -> Result<(), DeviceFault> {
        let Some(waits) = self.waits else {
            return self.transmitter.discard(memory, &*self.interrupt);
        };
        let tap = self.tap.file();
        let limit = self.limits.transmit.as_ref().map(Limit::limiter);
        match self
            .transmitter
            .send(memory, &*self.interrupt, tap, limit)?
        {
            Sent::All | Sent::Turn => self.wait_for(poller, waits.difference(EventSet::OUT)),
            Sent::Limited => {
                self.wait_for(poller, waits.difference(EventSet::OUT))?;
                self.limits.transmit.as_mut().map_or(Ok(()), Limit::sleep)
            }
            Sent::Blocked => self.wait_for(poller, waits | EventSet::OUT),
            Sent::Gone => self.lose_tap(memory, poller),
        }
    }

    /// Waits for these events of the tap from now on.
    fn wait_for(&mut self, poller: &Poller, events: EventSet) -> Result<(), DeviceFault> {
        if self.waits == Some(events) {
            return Ok(());
        }
        self.waits = Some(events);
        let what = "can't wait for the tap";
        let modified = poller.modify(self.tap.file(), TAP, events);
        modified.map_err(|source| DeviceFault::Host { what, source })
    }

    /// The interface was removed under the device: the guest sees its cable pulled, and sends into
    /// the void.
    fn lose_tap(&mut self, memory: &GuestMemoryMmap, poller: &Poller) -> Result<(), DeviceFault> {
        self.waits = None;
        let what = "can't let go of the tap";
        let removed = poller.remove(self.tap.file());
        removed.map_err(|source| DeviceFault::Host { what, source })?;
        if self.link.take_down() {
            tracing::warn!("a network device's tap interface was removed");
            let what = "can't tell the driver that its link is down";
            let told = self.interrupt.signal_config();
            told.map_err(|source| DeviceFault::Host { what, source })?;
        }
        self.transmitter.discard(memory, &*self.interrupt)
    }
}

impl EventHandler for QueuePair {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.receiver.queue.kick(), RECEIVE_KICK, EventSet::IN)?;
        poller.add(self.transmitter.queue.kick(), TRANSMIT_KICK, EventSet::IN)?;
        poller.add(self.tap.file(), TAP, EventSet::IN)?;
        if let Some(limit) = &self.limits.receive {
            poller.add(limit.timer(), RECEIVE_REST, EventSet::IN)?;
        }
        if let Some(limit) = &self.limits.transmit {
            poller.add(limit.timer(), TRANSMIT_REST, EventSet::IN)?;
        }
        // Whatever the driver did before there was a worker to kick.
        self.transmitter.queue.kick().write(1)
    }

    fn handle(&mut self, poller: &Poller, token: u64, events: EventSet) -> Result<(), DeviceFault> {
        let memory = self.memory.memory();
        match token {
            RECEIVE_KICK => {
                self.receiver.queue.forget_kicks();
                self.receive(&memory, poller)
            }
            TRANSMIT_KICK => {
                self.transmitter.queue.forget_kicks();
                self.transmit(&memory, poller)
            }
            RECEIVE_REST => {
                self.limits.receive.as_mut().map_or(Ok(()), Limit::awake)?;
                self.receive(&memory, poller)
            }
            TRANSMIT_REST => {
                self.limits.transmit.as_mut().map_or(Ok(()), Limit::awake)?;
                self.transmit(&memory, poller)
            }
            _ => {
                if events.contains(EventSet::OUT) {
                    self.transmit(&memory, poller)?;
                }
                // An error is told by a read, too.
                if events.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP) {
                    self.receive(&memory, poller)?;
                }
                Ok(())
            }
        }
    }
}
