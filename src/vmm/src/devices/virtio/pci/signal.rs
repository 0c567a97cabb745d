// SPDX-License-Identifier: Apache-2.0
//! The device's way to its driver: MSI-X, or the ISR register for a driver that polls.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use super::common::{NO_VECTOR, status};
use crate::devices::virtio::Interrupt;
use crate::pci::Msix;

/// ISR bits (virtio 1.2, section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What the worker and the registers share. No lock: a worker interrupts from its data path.
#[derive(Debug)]
pub(super) struct Signal {
    msix: Arc<Msix>,
    status: AtomicU8,
    generation: AtomicU8,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Signal {
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets status bits; never takes one away, so that NEEDS_RESET of a worker is not lost.
    pub(super) fn raise_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Reading the ISR register clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// Takes over the driver's vectors, at DRIVER_OK.
    pub(super) fn set_vectors(&self, config: u16, queues: impl Iterator<Item = u16>) {
        self.config_vector.store(config, Ordering::SeqCst);
        for (slot, vector) in self.queue_vectors.iter().zip(queues) {
            slot.store(vector, Ordering::SeqCst);
        }
    }

    pub(super) fn reset(&self) {
        self.set_vectors(NO_VECTOR, self.queue_vectors.iter().map(|_| NO_VECTOR));
        self.isr.store(0, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    fn send(&self, vector: u16, isr: u8) -> io::Result<()> {
        if !self.msix.enabled() {
            self.isr.fetch_or(isr, Ordering::SeqCst);
        }
        self.msix.trigger(vector)
    }
}

impl Interrupt for Signal {
    fn signal_queue(&self, queue: u16) -> io::Result<()> {
        let vector = self.queue_vectors.get(usize::from(queue));
        let vector = vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst));
        self.send(vector, ISR_QUEUE)
    }

    fn signal_config(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.send(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG)
    }

    fn device_needs_reset(&self) {
        self.raise_status(status::NEEDS_RESET);
        // Section 2.1.2: once the driver runs, it is told by a configuration interrupt.
        if self.status() & status::DRIVER_OK != 0
            && let Err(error) = self.signal_config()
        {
            tracing::warn!(%error, "can't tell the driver that its device failed");
        }
    }
}
