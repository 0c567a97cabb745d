// SPDX-License-Identifier: Apache-2.0
//! The device as its transport sees it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ConnectionSink;
use super::handler::{Handler, Queues};
use super::muxer::Muxer;
use crate::devices::virtio::{
    ActivateError, Activation, DeviceType, GuestMemory, Interrupt, VirtioDevice, Worker,
    read_config,
};

/// Receive, transmit, event. Linux keeps the receive queue full of 4 KiB buffers: this is half a
/// MiB of guest memory, and holds twice what a turn moves.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// `VIRTIO_VSOCK_F_STREAM` (section 5.10.3).
const F_STREAM: u64 = 1;

/// The guest's socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    listener: OwnedFd,
    sink: Arc<dyn ConnectionSink>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    reset_transport: EventFd,
    worker: Worker,
}

impl Vsock {
    /// A device for the guest with context ID `guest_cid`. Host programs connect to `listener`, a
    /// listening Unix stream socket; connections of the guest go to `sink`.
    #[must_use]
    pub fn new(guest_cid: u32, listener: OwnedFd, sink: Arc<dyn ConnectionSink>) -> Self {
        Self {
            guest_cid,
            listener,
            sink,
            running: None,
        }
    }

    /// Drops all connections and tells the guest so (section 5.10.6.7): after a restore they
    /// exist on its side only. Does nothing on a device that is not active.
    pub fn reset_transport(&self) {
        if let Some(running) = &self.running {
            // Fails only if the counter is at its maximum, and then the worker is told already.
            let _ = running.reset_transport.write(1);
        }
    }

    fn start(&self, mut activation: Activation) -> Result<Running, ActivateError> {
        let [receive, transmit, event] = activation.take_queues()?;
        let queues = Queues {
            receive,
            transmit,
            event,
        };
        self.spawn(queues, activation.memory, activation.interrupt)
            .map_err(ActivateError::Worker)
    }

    fn spawn(
        &self,
        queues: Queues,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Running> {
        let reset_transport = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let muxer = Muxer::new(
            u64::from(self.guest_cid),
            self.listener.try_clone()?,
            Arc::clone(&self.sink),
        );
        let told = reset_transport.try_clone()?;
        let handler = Handler::new(memory, Arc::clone(&interrupt), queues, muxer, told)?;
        Ok(Running {
            reset_transport,
            worker: Worker::spawn("vsock", interrupt, handler)?,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        self.running = Some(self.start(activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(running) = self.running.take() {
            running.worker.stop();
        }
    }
}
