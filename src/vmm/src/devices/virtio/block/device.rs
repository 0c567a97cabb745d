// SPDX-License-Identifier: Apache-2.0
//! The device: its configuration and its worker.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::request::{Disk, SECTOR, SERIAL_LEN};
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceFault, DeviceType, EventHandler, GuestMemory,
    Interrupt, Poller, VirtioDevice, Worker, read_config,
};
use crate::sys::vectored;

/// Feature bits (section 5.2.3).
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;

const QUEUE_SIZE: u16 = 256;
const QUEUE: u64 = 0;

/// Why a file can't be a disk.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The guest sees 20 bytes of it.
    #[error("its name is longer than {SERIAL_LEN} bytes")]
    Id,
    /// Its size is not to be had.
    #[error("can't read its size")]
    Size(#[source] io::Error),
    /// A disk has at least one sector.
    #[error("it is empty or ends within its first {SECTOR} bytes")]
    Empty,
}

/// A disk.
#[derive(Debug)]
pub struct BlockDevice {
    name: String,
    disk: Arc<Disk>,
    worker: Option<Worker>,
}

impl BlockDevice {
    /// A disk called `id` with the contents of `file`, as large as the file is now; bytes past
    /// its last whole sector are not seen.
    ///
    /// # Errors
    /// The name is too long, or the file has no size or no sector.
    pub fn new(id: &str, mut file: File, read_only: bool) -> Result<Self, BlockError> {
        let mut serial = [0; SERIAL_LEN];
        let slot = serial.get_mut(..id.len()).ok_or(BlockError::Id)?;
        slot.copy_from_slice(id.as_bytes());
        // Works for a block device too, where the metadata says 0.
        let bytes = file.seek(SeekFrom::End(0)).map_err(BlockError::Size)?;
        let sectors = bytes / SECTOR;
        if sectors == 0 {
            return Err(BlockError::Empty);
        }
        Ok(Self {
            name: format!("block-{id}"),
            disk: Arc::new(Disk {
                file,
                sectors,
                read_only,
                serial,
            }),
            worker: None,
        })
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only { READ_ONLY } else { 0 };
        SEG_MAX | BLK_SIZE | FLUSH | read_only
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 24];
        // A request's header and status take a buffer each.
        let segments = u32::from(QUEUE_SIZE.saturating_sub(2));
        let sector = u32::try_from(SECTOR).unwrap_or_default();
        let fields = [
            (0, &self.disk.sectors.to_le_bytes()[..]),
            (12, &segments.to_le_bytes()[..]),
            (20, &sector.to_le_bytes()[..]),
        ];
        for (at, bytes) in fields {
            for (to, from) in config.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        }
        read_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.take_queues()?;
        let handler = Handler {
            disk: Arc::clone(&self.disk),
            memory: activation.memory,
            queue,
            interrupt: Arc::clone(&activation.interrupt),
            // A driver that can't flush expects what is written to be safe (section 5.2.6.2).
            write_through: activation.features & FLUSH == 0,
        };
        let worker = Worker::spawn(&self.name, activation.interrupt, handler);
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        // Requests are served one by one: when the worker has ended, none is in flight.
        self.worker = None;
    }
}

#[derive(Debug)]
struct Handler {
    disk: Arc<Disk>,
    memory: GuestMemory,
    queue: ActiveQueue,
    interrupt: Arc<dyn Interrupt>,
    write_through: bool,
}

impl EventHandler for Handler {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.queue.kick(), QUEUE, EventSet::IN)
    }

    fn handle(&mut self, _: &Poller, _token: u64, _: EventSet) -> Result<(), DeviceFault> {
        let memory = self.memory.memory();
        let (disk, write_through) = (&self.disk, self.write_through);
        self.queue.serve(&memory, &*self.interrupt, |chain| {
            disk.serve(&memory, chain, write_through)
        })
    }
}

/// Buffers of one request that a call can take.
pub(super) const MAX_BUFFERS: usize = vectored::MAX_BUFFERS;
