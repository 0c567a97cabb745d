// SPDX-License-Identifier: Apache-2.0
//! The device: its configuration, its worker, and the handle by which it is told its size.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::region::{BLOCK, Region};
use super::request::serve;
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceFault, DeviceType, EventHandler, GuestMemory,
    Interrupt, Poller, VirtioDevice, Worker, read_config,
};

/// Feature bit (section 5.15.3): the driver leaves unplugged memory alone.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Linux has one request in flight.
const QUEUE_SIZE: u16 = 16;

const REQUESTS: u64 = 0;

/// Hears that the guest has taken or given memory. Called on the device's worker; must not block.
pub trait Plugged: Debug + Send + Sync {
    /// It has another size.
    fn changed(&self);
}

/// The region, and the way to a driver that runs.
#[derive(Debug)]
struct Shared {
    region: Region,
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// Tells the device how much memory the guest is to have.
#[derive(Debug, Clone)]
pub struct Resizer(Arc<Mutex<Shared>>);

impl Resizer {
    /// Wants the guest to have so many bytes of the region.
    ///
    /// # Errors
    /// The guest can't be interrupted.
    pub fn request(&self, bytes: u64) -> io::Result<()> {
        let mut shared = self.lock();
        if !shared.region.request(bytes) {
            return Ok(());
        }
        // A driver that comes later reads it at its start.
        let interrupt = shared.interrupt.clone();
        drop(shared);
        interrupt.map_or(Ok(()), |interrupt| interrupt.signal_config())
    }

    /// Bytes of the region that the guest has.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.lock().region.plugged()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A region of memory that the guest may have more or less of.
#[derive(Debug)]
pub struct MemDevice {
    shared: Resizer,
    plugged: Arc<dyn Plugged>,
    worker: Option<Worker>,
}

impl MemDevice {
    /// A device for the addresses `range`, which are the guest's memory already.
    #[must_use]
    pub fn new(range: &Range<u64>, plugged: Arc<dyn Plugged>) -> Self {
        let shared = Shared {
            region: Region::new(range),
            interrupt: None,
        };
        Self {
            shared: Resizer(Arc::new(Mutex::new(shared))),
            plugged,
            worker: None,
        }
    }

    /// How to tell it.
    #[must_use]
    pub fn resizer(&self) -> Resizer {
        self.shared.clone()
    }
}

impl VirtioDevice for MemDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    /// Section 5.15.4. Any block may be plugged at any time: the usable region is all of it.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = self.shared.lock();
        let region = &shared.region;
        let fields = [
            BLOCK,
            // A node, and padding.
            0,
            region.start(),
            region.size(),
            region.size(),
            region.plugged(),
            region.requested(),
        ];
        let config: Vec<u8> = fields.into_iter().flat_map(u64::to_le_bytes).collect();
        drop(shared);
        read_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        let handler = Handler {
            memory: activation.memory,
            queue,
            shared: self.shared.clone(),
            plugged: Arc::clone(&self.plugged),
            interrupt: Arc::clone(&activation.interrupt),
        };
        self.shared.lock().interrupt = Some(Arc::clone(&activation.interrupt));
        let worker = Worker::spawn("mem", activation.interrupt, handler);
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    /// What is plugged stays: it is memory that the guest uses. A driver that
    /// starts anew gives it all back first.
    fn reset(&mut self) {
        self.worker = None;
        self.shared.lock().interrupt = None;
    }
}

#[derive(Debug)]
struct Handler {
    memory: GuestMemory,
    queue: ActiveQueue,
    shared: Resizer,
    plugged: Arc<dyn Plugged>,
    interrupt: Arc<dyn Interrupt>,
}

impl EventHandler for Handler {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.queue.kick(), REQUESTS, EventSet::IN)
    }

    fn handle(&mut self, _: &Poller, _: u64, _: EventSet) -> Result<(), DeviceFault> {
        let memory = self.memory.memory();
        let before = self.shared.plugged();
        let served = self.queue.serve(&memory, &*self.interrupt, |chain| {
            serve(&mut self.shared.lock().region, &memory, chain)
        });
        if self.shared.plugged() != before {
            self.plugged.changed();
        }
        served
    }
}
