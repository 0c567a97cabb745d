// SPDX-License-Identifier: Apache-2.0
//! The device as its transport sees it.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_server::{Options, ProcSelfFd, Server, ServerError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;

use super::pool::Pool;
use crate::devices::virtio::{ActivateError, Activation, DeviceType, VirtioDevice, read_config};

/// High-priority and request queue. Linux fits its largest request to the request queue's size: a
/// page a descriptor and four for headers, so this allows 1 MiB.
const QUEUE_SIZES: [u16; 2] = [64, 512];

/// Threads on the request queue, and how many there may be when the host hangs.
const REQUEST_THREADS: RangeInclusive<usize> = 4..=64;

/// The same on the high-priority queue. To forget a removed file may wait for the host, too; in which
/// order files are forgotten does not matter.
const FORGET_THREADS: RangeInclusive<usize> = 1..=8;

/// Length of the mount tag, padded with zeroes (section 5.11.4).
const TAG_LEN: usize = 36;

/// The most files that a process may have open (`fs.nr_open`, unless the host's owner changed it),
/// less what it keeps.
const MAX_FILES: u64 = (1 << 20) - RESERVED_FILES;

/// Descriptors that the process keeps for everything else; a thread that is added takes two.
const RESERVED_FILES: u64 = 512;

/// What a virtio-fs device shares and how.
#[derive(Debug)]
pub struct FsConfig {
    /// The name under which the guest mounts it: 1 to 36 bytes.
    pub tag: String,
    /// An open directory.
    pub root: OwnedFd,
    /// How the server treats it.
    pub options: Options,
}

/// Why a device can't be made.
#[derive(Debug, Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("the mount tag {0:?} is not 1 to {TAG_LEN} bytes long")]
    Tag(String),
    /// `/proc/self/fd` can't be opened.
    #[error("can't open the process's descriptor directory")]
    Proc(#[source] io::Error),
    /// The directory can't be served.
    #[error("can't serve the directory of {tag:?}")]
    Server {
        /// The device's mount tag.
        tag: String,
        /// Why not.
        #[source]
        source: ServerError,
    },
}

/// A shared file system.
#[derive(Debug)]
pub struct Fs {
    config: Vec<u8>,
    server: Arc<Server>,
    pools: Vec<Pool>,
}

impl Fs {
    /// Makes the device. Needs `/proc`, so call it before the process gives up its root.
    ///
    /// # Errors
    /// The tag is no tag, or the directory can't be served.
    pub fn new(config: FsConfig) -> Result<Self, FsError> {
        let FsConfig { tag, root, options } = config;
        if tag.is_empty() || tag.len() > TAG_LEN {
            return Err(FsError::Tag(tag));
        }
        let proc = ProcSelfFd::open().map_err(|errno| FsError::Proc(errno.into()))?;
        let server = match Server::new(&root, proc, options) {
            Ok(server) => Arc::new(server),
            Err(source) => return Err(FsError::Server { tag, source }),
        };
        let mut config = tag.into_bytes();
        config.resize(TAG_LEN, 0);
        config.extend_from_slice(&1_u32.to_le_bytes());
        Ok(Self {
            config,
            server,
            pools: Vec::new(),
        })
    }

    fn start(&self, mut activation: Activation) -> Result<Vec<Pool>, ActivateError> {
        let [high_priority, requests] = activation.take_queues()?;
        let start = |threads, queue| {
            let interrupt = &activation.interrupt;
            Pool::start(threads, queue, &activation.memory, interrupt, &self.server)
                .map_err(ActivateError::Worker)
        };
        Ok(vec![
            start(FORGET_THREADS, high_priority)?,
            start(REQUEST_THREADS, requests)?,
        ])
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        self.pools = self.start(activation)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.pools.clear();
        self.server.forget_session();
    }
}

/// How many files each of `filesystems` devices may hold open for a guest with `memory_mib` of
/// memory, and raises the process's limit for them as far as it may. Linux needs more than a KiB
/// of its own memory for each inode that it remembers, so a guest that only does what a kernel
/// does never meets the bound.
#[must_use]
pub fn open_file_quota(filesystems: usize, memory_mib: u32) -> usize {
    let wanted = u64::from(memory_mib).saturating_mul(1024).min(MAX_FILES);
    let limit = raised_limit(wanted.saturating_add(RESERVED_FILES));
    let shared = limit.saturating_sub(RESERVED_FILES).min(wanted);
    usize::try_from(shared)
        .unwrap_or(usize::MAX)
        .checked_div(filesystems)
        .unwrap_or(0)
}

/// The process's limit of open files after raising it to `wanted` or as near as it may be.
fn raised_limit(wanted: u64) -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let maximum = limit.maximum.unwrap_or(u64::MAX);
    if current >= wanted {
        return current;
    }
    // The maximum itself takes CAP_SYS_RESOURCE.
    for (current, maximum) in [(wanted, maximum.max(wanted)), (maximum, maximum)] {
        let raised = Rlimit {
            current: Some(current),
            maximum: Some(maximum),
        };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            return current;
        }
    }
    current
}
