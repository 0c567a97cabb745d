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
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

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

/// One queue of an activated device: frozen by the transport, owned by the device's worker.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its index among the device's queues.
    pub index: u16,
    /// Ring addresses and positions, validated when the driver enabled the queue.
    pub queue: Queue,
    /// Readable when the driver has made buffers available.
    pub kick: EventFd,
}

impl ActiveQueue {
    /// Serves the chains that the driver has made available, a queue's size of them at most, and
    /// interrupts the driver if it wants to know. `serve` returns the bytes it wrote.
    ///
    /// Reads the kick first, so call it when the kick is readable. If chains may be left, it
    /// kicks itself: the worker sees its other events in between.
    ///
    /// # Errors
    /// The ring is broken, `serve` failed, or the interrupt could not be raised.
    pub fn serve<F>(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        mut serve: F,
    ) -> Result<(), DeviceFault>
    where
        F: FnMut(DescriptorChain<&GuestMemoryMmap>) -> Result<u32, DeviceFault>,
    {
        // Nothing to read is fine: an earlier call has served what the kick was for.
        let _ = self.kick.read();
        let mut budget = self.queue.size();
        let mut served = false;
        loop {
            self.queue_op(|queue| queue.disable_notification(memory))?;
            while budget > 0 {
                let next = self.queue_op(|queue| Ok(queue.iter(memory)?.next()))?;
                let Some(chain) = next else { break };
                let head = chain.head_index();
                let written = serve(chain)?;
                self.queue_op(|queue| queue.add_used(memory, head, written))?;
                served = true;
                budget = budget.saturating_sub(1);
            }
            let more = self.queue_op(|queue| queue.enable_notification(memory))?;
            if !more || budget == 0 {
                break;
            }
        }
        if budget == 0 {
            let what = "can't kick the queue again";
            let again = self.kick.write(1);
            again.map_err(|source| DeviceFault::Host { what, source })?;
        }
        if served && self.queue_op(|queue| queue.needs_notification(memory))? {
            let what = "can't interrupt the driver";
            let signal = interrupt.signal_queue(self.index);
            signal.map_err(|source| DeviceFault::Host { what, source })?;
        }
        Ok(())
    }

    fn queue_op<T>(
        &mut self,
        operation: impl FnOnce(&mut Queue) -> Result<T, virtio_queue::Error>,
    ) -> Result<T, DeviceFault> {
        let queue = self.index;
        operation(&mut self.queue).map_err(|source| DeviceFault::Queue { queue, source })
    }
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

    /// Starts the device.
    ///
    /// # Errors
    /// The driver's set-up doesn't fit the device, or the worker could not start.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the worker, drains requests in flight and forgets the driver's set-up. Called at
    /// driver reset and before the device goes away; does nothing on a device that is not active.
    fn reset(&mut self);
}
