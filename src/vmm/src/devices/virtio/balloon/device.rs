// SPDX-License-Identifier: Apache-2.0
//! The device: its configuration and its worker.

use std::io;
use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::request::{inflate, report};
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceFault, DeviceType, EventHandler, GuestMemory,
    Interrupt, Poller, VirtioDevice, Worker, read_config,
};

/// Feature bits (section 5.5.3).
const DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const PAGE_REPORTING: u64 = 1 << 5;

/// Linux reports 32 ranges at a time and wants room for them.
const QUEUE_SIZE: u16 = 128;

const INFLATE: u64 = 0;
const DEFLATE: u64 = 1;
const REPORT: u64 = 2;

/// The configuration (section 5.5.4): the pages that the balloon is to have, none so far, and
/// those that it has, which the driver writes.
const ACTUAL: u64 = 4;
const CONFIG_LEN: usize = 8;

/// A balloon.
#[derive(Debug, Default)]
pub struct BalloonDevice {
    actual: [u8; 4],
    worker: Option<Worker>,
}

impl BalloonDevice {
    /// An empty balloon.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for BalloonDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    /// Section 5.5.2 numbers the reporting queue 4, behind two of features that aren't offered;
    /// drivers leave no gaps for those, and look for it here.
    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [a, b, c, d] = self.actual;
        let config: [u8; CONFIG_LEN] = [0, 0, 0, 0, a, b, c, d];
        read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.actual = actual;
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let (inflate, deflate, report);
        if activation.features & PAGE_REPORTING == 0 {
            [inflate, deflate] = activation.take_queues()?;
            report = None;
        } else {
            let last;
            [inflate, deflate, last] = activation.take_queues()?;
            report = Some(last);
        }
        let handler = Handler {
            memory: activation.memory,
            inflate,
            deflate,
            report,
            interrupt: Arc::clone(&activation.interrupt),
        };
        let worker = Worker::spawn("balloon", activation.interrupt, handler);
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.actual = [0; 4];
    }
}

#[derive(Debug)]
struct Handler {
    memory: GuestMemory,
    inflate: ActiveQueue,
    deflate: ActiveQueue,
    /// Where the driver reports free pages.
    report: Option<ActiveQueue>,
    interrupt: Arc<dyn Interrupt>,
}

impl EventHandler for Handler {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.inflate.kick(), INFLATE, EventSet::IN)?;
        poller.add(self.deflate.kick(), DEFLATE, EventSet::IN)?;
        match &self.report {
            Some(queue) => poller.add(queue.kick(), REPORT, EventSet::IN),
            None => Ok(()),
        }
    }

    fn handle(&mut self, _: &Poller, token: u64, _: EventSet) -> Result<(), DeviceFault> {
        let memory = self.memory.memory();
        let interrupt = &*self.interrupt;
        match (token, &mut self.report) {
            (INFLATE, _) => self
                .inflate
                .serve(&memory, interrupt, |chain| inflate(&memory, chain)),
            // The guest finds fresh pages where it touches those that were the balloon's.
            (DEFLATE, _) => self.deflate.serve(&memory, interrupt, |_| Ok(0)),
            (_, Some(queue)) => queue.serve(&memory, interrupt, |chain| report(&memory, chain)),
            (_, None) => Ok(()),
        }
    }
}
