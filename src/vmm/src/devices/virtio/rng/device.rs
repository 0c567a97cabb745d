// SPDX-License-Identifier: Apache-2.0
//! The device and its worker.

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceFault, DeviceType, EventHandler, GuestMemory,
    Interrupt, Poller, VirtioDevice, Worker,
};

const QUEUE_SIZE: u16 = 64;
const QUEUE: u64 = 0;

/// Bytes given for one request; the driver asks again if it wants more (section 5.4.6.2 lets a
/// device fill less than the buffer).
const MAX_BYTES: usize = 4096;

/// An entropy source.
#[derive(Debug, Default)]
pub struct RngDevice {
    worker: Option<Worker>,
}

impl RngDevice {
    /// A source.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        let handler = Handler {
            memory: activation.memory,
            queue,
            interrupt: Arc::clone(&activation.interrupt),
        };
        let worker = Worker::spawn("rng", activation.interrupt, handler);
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[derive(Debug)]
struct Handler {
    memory: GuestMemory,
    queue: ActiveQueue,
    interrupt: Arc<dyn Interrupt>,
}

impl EventHandler for Handler {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.queue.kick(), QUEUE, EventSet::IN)
    }

    fn handle(&mut self, _: &Poller, _token: u64, _: EventSet) -> Result<(), DeviceFault> {
        let memory = self.memory.memory();
        self.queue
            .serve(&memory, &*self.interrupt, |chain| fill(&memory, chain))
    }
}

/// Fills the buffers of one request.
fn fill(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<u32, DeviceFault> {
    let mut left = MAX_BYTES;
    for descriptor in chain.writable() {
        let wanted = usize::try_from(descriptor.len()).unwrap_or(left).min(left);
        let mut bytes = vec![0; wanted];
        getrandom(&mut bytes, GetRandomFlags::empty()).map_err(|error| DeviceFault::Host {
            what: "can't get random numbers",
            source: error.into(),
        })?;
        memory
            .write_slice(&bytes, descriptor.addr())
            .map_err(|_| DeviceFault::Driver("a buffer lies outside of memory"))?;
        left = left.saturating_sub(wanted);
    }
    Ok(u32::try_from(MAX_BYTES.saturating_sub(left)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    use super::*;

    fn ask(addr: u64, len: u32, flags: u16) -> (Result<u32, DeviceFault>, Vec<u8>) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let queue = MockSplitQueue::new(&memory, 16);
        let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, 0));
        let chain = queue.build_desc_chain(&[descriptor]).unwrap();
        let result = fill(&memory, chain);
        let mut bytes = vec![0; 0x2000];
        memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        (result, bytes)
    }

    #[test]
    fn a_buffer_is_filled_up_to_the_limit() {
        let write = VRING_DESC_F_WRITE as u16;
        let (result, bytes) = ask(0x8000, 64, write);
        assert_eq!(result.unwrap(), 64);
        assert!(bytes[..64].iter().any(|byte| *byte != 0));
        assert!(bytes[64..].iter().all(|byte| *byte == 0));
        assert_eq!(ask(0x8000, 0x2000, write).0.unwrap(), 4096);
    }

    #[test]
    fn bad_buffers_do_no_harm() {
        let write = VRING_DESC_F_WRITE as u16;
        assert_eq!(ask(0x8000, 64, 0).0.unwrap(), 0);
        assert_eq!(ask(0x8000, 0, write).0.unwrap(), 0);
        assert!(ask(0xffff, 64, write).0.is_err());
        assert!(ask(u64::MAX, 64, write).0.is_err());
    }
}
