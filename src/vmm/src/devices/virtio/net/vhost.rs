// SPDX-License-Identifier: Apache-2.0
//! A pair of queues that the host's kernel serves (vhost-net): it takes the driver's kicks and
//! moves the packets. What is left here is to pass its calls on as interrupts, by way of the
//! vectors' masks.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::tap::Tap;
use crate::devices::virtio::{ActiveQueue, DeviceFault, EventHandler, Interrupt, Poller};
use crate::sys::vhost as raw;

/// The features that are the ring's and so the kernel's business; the header is the tap's.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The error events' tokens come after those of the calls.
const ERRORS: u64 = 2;

/// An open `/dev/vhost-net`.
#[derive(Debug)]
pub(super) struct VhostNet(File);

impl VhostNet {
    /// Takes a device for this process.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let device = File::from(fd);
        raw::set_owner(&device)?;
        let features = raw::features(&device)?;
        if features & RING_FEATURES != RING_FEATURES {
            return Err(io::Error::other(format!(
                "of the features {RING_FEATURES:#x} it has {features:#x}"
            )));
        }
        Ok(Self(device))
    }
}

/// One queue's events.
#[derive(Debug)]
struct Ring {
    index: u16,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

impl Ring {
    fn new(queue: &ActiveQueue) -> io::Result<Self> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        Ok(Self {
            index: queue.index(),
            kick: queue.kick().try_clone()?,
            call: event()?,
            error: event()?,
        })
    }
}

/// A pair that the kernel serves.
#[derive(Debug)]
pub(super) struct VhostPair {
    device: Arc<VhostNet>,
    interrupt: Arc<dyn Interrupt>,
    rings: Vec<Ring>,
}

impl VhostPair {
    /// Has the kernel serve both queues; it stops when the pair is dropped.
    pub(super) fn start(
        device: &Arc<VhostNet>,
        interrupt: Arc<dyn Interrupt>,
        (features, memory): (u64, &GuestMemoryMmap),
        queues: &[ActiveQueue; 2],
        tap: &Tap,
    ) -> io::Result<Self> {
        let mut pair = Self {
            device: Arc::clone(device),
            interrupt,
            rings: Vec::new(),
        };
        raw::set_features(&device.0, features & RING_FEATURES)?;
        raw::set_memory(&device.0, memory)?;
        for (index, queue) in (0..).zip(queues) {
            let ring = Ring::new(queue)?;
            let events = raw::Events {
                kick: &ring.kick,
                call: &ring.call,
                error: &ring.error,
            };
            raw::set_ring(&device.0, index, queue.rings(), memory, &events)?;
            pair.rings.push(ring);
        }
        for (index, ring) in (0..).zip(&pair.rings) {
            raw::set_backend(&device.0, index, Some(tap.file()))?;
            // Whatever the driver did before there was anyone to kick.
            ring.kick.write(1)?;
        }
        Ok(pair)
    }
}

impl Drop for VhostPair {
    fn drop(&mut self) {
        for index in 0..2 {
            if let Err(error) = raw::set_backend(&self.device.0, index, None::<&File>) {
                tracing::warn!(%error, "vhost-net can't let go of a tap");
            }
        }
    }
}

impl EventHandler for VhostPair {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        for (token, ring) in (0..).zip(&self.rings) {
            poller.add(&ring.call, token, EventSet::IN)?;
            poller.add(&ring.error, ERRORS.saturating_add(token), EventSet::IN)?;
        }
        Ok(())
    }

    fn handle(&mut self, _: &Poller, token: u64, _: EventSet) -> Result<(), DeviceFault> {
        if token >= ERRORS {
            return Err(DeviceFault::Driver("vhost-net found a queue broken"));
        }
        let ring = usize::try_from(token).ok();
        let Some(ring) = ring.and_then(|at| self.rings.get(at)) else {
            return Ok(());
        };
        // Nothing to read is fine: an interrupt more than needed.
        let _ = ring.call.read();
        let what = "can't interrupt the driver";
        let signal = self.interrupt.signal_queue(ring.index);
        signal.map_err(|source| DeviceFault::Host { what, source })
    }
}
