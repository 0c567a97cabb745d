// SPDX-License-Identifier: Apache-2.0
//! The device: its configuration and its workers.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuse_server::Complaints;
use thiserror::Error;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::direct::Direct;
use super::discard::{MAX_DISCARD, MAX_RANGES, MAX_ZEROES};
use super::engine::{Engine, Served};
use super::request::{Disk, Request, SECTOR, SERIAL_LEN};
use crate::devices::virtio::rate::{Limit, RateLimiter};
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceFault, DeviceType, EventHandler, GuestMemory,
    Interrupt, Poller, VirtioDevice, Worker, read_config,
};
use crate::sys::vectored;

/// Feature bits (section 5.2.3).
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLK_SIZE: u64 = 1 << 6;
pub(super) const FEATURE_FLUSH: u64 = 1 << 9;
pub(super) const FEATURE_MQ: u64 = 1 << 12;
pub(super) const FEATURE_DISCARD: u64 = 1 << 13;
pub(super) const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
const QUEUE: u64 = 0;
const TIMER: u64 = 1;
const DONE: u64 = 2;

/// Why a file can't be a disk.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The guest sees 20 bytes of it.
    #[error("its name is longer than {SERIAL_LEN} bytes")]
    Id,
    /// Its size is not to be had.
    #[error("can't read its size")]
    Size(#[source] io::Error),
    /// How it was opened, or what its blocks are, is not to be had.
    #[error("can't tell how it wants to be read and written")]
    Direct(#[source] io::Error),
    /// It can't have as many queues, or none.
    #[error("a disk has 1 to {max} queues, not {queues}")]
    Queues {
        /// The most.
        max: u16,
        /// What was asked for.
        queues: u16,
    },
    /// A disk has at least one sector.
    #[error("it is empty or ends within its first {SECTOR} bytes")]
    Empty,
}

/// A disk.
#[derive(Debug)]
pub struct BlockDevice {
    pub(super) disk: Arc<Disk>,
    /// Sectors that the file keeps or gives back as one.
    discard_alignment: u32,
    queue_sizes: Vec<u16>,
    limiter: Option<Arc<RateLimiter>>,
    io_uring: bool,
    /// One for each queue that the driver uses.
    workers: Vec<Worker>,
}

impl BlockDevice {
    /// Most queues.
    pub const MAX_QUEUES: u16 = crate::control::MAX_BLOCK_QUEUES;

    /// A disk called `id` with the contents of `file`, as large as the file is now, and larger once
    /// `look_again` finds it grown; bytes past
    /// its last whole sector are not seen, nor, if it was opened with O_DIRECT, those past its last
    /// whole block. Each of its `queues` is served by a thread of its own.
    ///
    /// # Errors
    /// The name is too long, the file has no size or no sector, or there are too many queues.
    pub fn new(id: &str, file: File, read_only: bool, queues: u16) -> Result<Self, BlockError> {
        if !(1..=Self::MAX_QUEUES).contains(&queues) {
            let max = Self::MAX_QUEUES;
            return Err(BlockError::Queues { max, queues });
        }
        let mut serial = [0; SERIAL_LEN];
        let slot = serial.get_mut(..id.len()).ok_or(BlockError::Id)?;
        slot.copy_from_slice(id.as_bytes());
        let direct = Direct::of(&file).map_err(BlockError::Direct)?;
        let sectors = Disk::count_sectors(&file, direct.as_ref()).map_err(BlockError::Size)?;
        if sectors == 0 {
            return Err(BlockError::Empty);
        }
        let block = file.metadata().map_err(BlockError::Size)?.blksize();
        let discard_alignment = u32::try_from(block / SECTOR).unwrap_or_default();
        Ok(Self {
            disk: Arc::new(Disk {
                name: format!("block-{id}"),
                file,
                direct,
                sectors: AtomicU64::new(sectors),
                filled: AtomicU64::new(0),
                read_only,
                serial,
                complaints: Complaints::default(),
            }),
            discard_alignment: discard_alignment.max(1),
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            limiter: None,
            io_uring: false,
            workers: Vec::new(),
        })
    }

    /// Lets it do no more than so much in a second, from its next start on; 0 is no limit.
    pub fn limit(&mut self, bytes: u64, operations: u64) {
        self.limiter = RateLimiter::new(bytes, operations).map(Arc::new);
    }

    /// Lets requests go on beside each other, from its next start on, where the host's kernel can do that.
    pub fn use_io_uring(&mut self) {
        self.io_uring = true;
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        let enabled = queues.len();
        // The others are there only for a driver that knows of them (section 5.2.2).
        let several = features & FEATURE_MQ != 0;
        for queue in queues {
            if queue.index() > 0 && !several {
                continue;
            }
            let name = format!("{}-{}", self.disk.name, queue.index());
            let handler = Handler {
                disk: Arc::clone(&self.disk),
                memory: memory.clone(),
                queue,
                interrupt: Arc::clone(&interrupt),
                features,
                limit: Limit::of(self.limiter.as_ref()).map_err(ActivateError::Worker)?,
                engine: if self.io_uring {
                    Engine::RingToBe
                } else {
                    Engine::InTurn
                },
            };
            let worker = Worker::spawn(&name, Arc::clone(&interrupt), handler);
            self.workers.push(worker.map_err(ActivateError::Worker)?);
        }
        if self.workers.is_empty() {
            let expected = 1;
            return Err(ActivateError::QueueCount { expected, enabled });
        }
        Ok(())
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let access = if self.disk.read_only {
            FEATURE_READ_ONLY
        } else {
            FEATURE_DISCARD | FEATURE_WRITE_ZEROES
        };
        let several = if self.queue_sizes.len() > 1 {
            FEATURE_MQ
        } else {
            0
        };
        FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_FLUSH | several | access
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Section 5.2.4, up to what is for secure erase only.
        let mut config = [0; 60];
        // A request's header and status take a buffer each.
        let segments = u32::from(QUEUE_SIZE.saturating_sub(2));
        let sector = u32::try_from(SECTOR).unwrap_or_default();
        let mut put = |at, bytes: &[u8]| {
            for (to, from) in config.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &segments.to_le_bytes());
        put(20, &sector.to_le_bytes());
        if self.queue_sizes.len() > 1 {
            let queues = u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX);
            put(34, &queues.to_le_bytes());
        }
        if !self.disk.read_only {
            put(36, &MAX_DISCARD.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &self.discard_alignment.to_le_bytes());
            put(48, &MAX_ZEROES.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            // Zeroes may end as a hole.
            put(56, &[1]);
        }
        read_config(&config, offset, data);
    }

    fn look_again(&mut self) -> io::Result<bool> {
        let disk = &self.disk;
        let sectors = Disk::count_sectors(&disk.file, disk.direct.as_ref())?;
        let before = disk.sectors();
        if sectors < before {
            return Err(io::Error::other(format!(
                "it has shrunk from {before} sectors to {sectors}"
            )));
        }
        disk.sectors.store(sectors, Ordering::Relaxed);
        Ok(sectors > before)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let started = self.start(activation);
        if started.is_err() {
            self.reset();
        }
        started
    }

    fn reset(&mut self) {
        // A worker waits for what is under way before it ends.
        for worker in self.workers.drain(..) {
            worker.stop();
        }
    }
}

#[derive(Debug)]
struct Handler {
    disk: Arc<Disk>,
    memory: GuestMemory,
    queue: ActiveQueue,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    limit: Option<Limit>,
    engine: Engine,
}

impl EventHandler for Handler {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.queue.kick(), QUEUE, EventSet::IN)?;
        match &self.limit {
            Some(limit) => poller.add(limit.timer(), TIMER, EventSet::IN),
            None => Ok(()),
        }
    }

    fn handle(&mut self, poller: &Poller, token: u64, _: EventSet) -> Result<(), DeviceFault> {
        let memory = self.memory.memory().into_inner();
        let mut served = Vec::new();
        if token == DONE {
            self.engine
                .finish(&self.disk, &memory, self.features, &mut served)?;
        } else {
            let size = self.queue.size();
            self.engine.prepare(&self.disk, size, poller, DONE);
            if token == TIMER
                && let Some(limit) = &mut self.limit
            {
                limit.awake()?;
            }
            self.serve(&memory, &mut served)?;
        }
        if served.is_empty() {
            return Ok(());
        }
        self.queue.complete_all(&memory, &served)?;
        self.queue.signal(&memory, &*self.interrupt)
    }
}

impl Handler {
    /// Serves what the driver has made available, or begins to. What was under way and is done by then goes
    /// into `served`.
    fn serve(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        served: &mut Vec<Served>,
    ) -> Result<(), DeviceFault> {
        let (disk, features, engine) = (&self.disk, self.features, &mut self.engine);
        let limiter = self.limit.as_ref().map(Limit::limiter);
        let ready = || limiter.is_none_or(|limiter| limiter.wait().is_none());
        let interrupt = &*self.interrupt;
        let left = self.queue.serve_while(ready, memory, interrupt, |chain| {
            if let Some(limiter) = limiter {
                let lens = chain.clone().map(|buffer| u64::from(buffer.len()));
                // What moves more than the disk holds is refused, and moves nothing.
                limiter.pay(lens.fold(0, u64::saturating_add).min(disk.bytes()));
            }
            let head = chain.head_index();
            let request = Request::of(memory, chain)?;
            if engine.start(disk, memory, head, &request) {
                return Ok(None);
            }
            if disk.direct.is_some() {
                // It may have to be the only one that writes.
                engine.settle(disk, memory, features, served)?;
            }
            let written = disk.serve(memory, request, features);
            if let Some(limiter) = limiter {
                limiter.pay_more(disk.filled.swap(0, Ordering::Relaxed));
            }
            written.map(Some)
        })?;
        self.engine.submit()?;
        match &mut self.limit {
            // The driver need not kick for what it has left.
            Some(limit) if left => limit.sleep(),
            _ => Ok(()),
        }
    }
}

/// Buffers of one request that a call can take.
pub(super) const MAX_BUFFERS: usize = vectored::MAX_BUFFERS;
