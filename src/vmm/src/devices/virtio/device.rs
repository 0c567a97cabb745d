// SPDX-License-Identifier: Apache-2.0
//! What a virtio device is to its transport (virtio 1.2, sections 2 and 4.1).
//!
//! The transport owns the registers, the queues' addresses and the interrupts, and freezes all of
//! them at DRIVER_OK (CVE-2026-5747: a queue's size must not change under a running device). The
//! device owns what it does with the requests: `activate` hands it the frozen queues, which it
//! moves into a worker thread; `reset` ends that thread.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::ActiveQueue;

/// The guest's memory: cheap to clone; `memory()` gives a snapshot of the current regions.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Virtio device IDs (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    /// Network card, section 5.1.
    Net = 1,
    /// Block device, section 5.2.
    Block = 2,
    /// Entropy source, section 5.4.
    Rng = 4,
    /// Memory balloon, section 5.5.
    Balloon = 5,
    /// Socket, section 5.10.
    Vsock = 19,
    /// Memory, section 5.15.
    Mem = 24,
    /// File system, section 5.11.
    Fs = 26,
}

/// Interrupts a device raises, by queue index; the transport maps them to MSI-X vectors.
pub trait Interrupt: Debug + Send + Sync {
    /// Tells the driver that queue `queue` holds used buffers (section 2.3).
    ///
    /// # Errors
    /// The kernel refused the write to the interrupt's event descriptor.
    fn signal_queue(&self, queue: u16) -> io::Result<()>;

    /// Tells the driver that the device's configuration space changed.
    ///
    /// # Errors
    /// As for `signal_queue`.
    fn signal_config(&self) -> io::Result<()>;

    /// Says that the device met an error that only a reset can end (DEVICE_NEEDS_RESET,
    /// section 2.1.2): a ring that makes no sense, or a host resource that is gone.
    fn device_needs_reset(&self);
}

/// Why a device can't go on: of the guest's making (a broken ring) or the host's. Never ends the
/// VM; the device waits for its reset.
#[derive(Debug, Error)]
pub enum DeviceFault {
    /// The driver's ring makes no sense.
    #[error("queue {queue} is broken")]
    Queue {
        /// Its index among the device's queues.
        queue: u16,
        /// What is wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// The driver broke the device's protocol so that no answer is possible.
    #[error("the driver broke the protocol: {0}")]
    Driver(&'static str),
    /// A system call on the host failed.
    #[error("{what}")]
    Host {
        /// What the device tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Everything that a device needs to run, handed over at DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The feature bits both sides agreed on.
    pub features: u64,
    /// The enabled queues, in index order; a queue that the driver left disabled is absent.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

impl Activation {
    /// The queues of a device that needs exactly `N`.
    ///
    /// # Errors
    /// The driver enabled another number.
    pub fn take_queues<const N: usize>(&mut self) -> Result<[ActiveQueue; N], ActivateError> {
        let queues = std::mem::take(&mut self.queues);
        queues
            .try_into()
            .map_err(|queues: Vec<_>| ActivateError::QueueCount {
                expected: N,
                enabled: queues.len(),
            })
    }
}

/// Why a device could not start; the transport sets DEVICE_NEEDS_RESET and the VM goes on.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver enabled another set of queues than the device needs.
    #[error("device needs {expected} queues, driver enabled {enabled}")]
    QueueCount {
        /// Queues that the device can't do without.
        expected: usize,
        /// Queues that the driver enabled.
        enabled: usize,
    },
    /// The worker could not be set up.
    #[error("can't start the device's worker")]
    Worker(#[source] io::Error),
}

/// Reads `config`, a device's configuration, at `offset`; bytes past its end read as zero.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    data.fill(0);
    for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
        *to = *from;
    }
}

/// A virtio device behind a transport.
pub trait VirtioDevice: Debug + Send {
    /// What the driver takes it for.
    fn device_type(&self) -> DeviceType;

    /// The largest size of each queue; its length is the number of queues. Powers of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// Feature bits offered to the driver. The transport adds those of the ring itself:
    /// VERSION_1, INDIRECT_DESC and EVENT_IDX, all served by `Queue`.
    fn features(&self) -> u64;

    /// Reads the device-specific configuration at `offset`; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device-specific configuration at `offset`; writes to read-only or missing
    /// fields are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Looks again at what the device stands for on the host; whether that changed its configuration.
    ///
    /// # Errors
    /// The host's word, or a change that no driver can follow; then nothing has changed.
    fn look_again(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Starts the device.
    ///
    /// # Errors
    /// The driver's set-up doesn't fit the device, or the worker could not start.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the worker, drains requests in flight and forgets the driver's set-up. Called at
    /// driver reset and before the device goes away; does nothing on a device that is not active.
    fn reset(&mut self);
}
