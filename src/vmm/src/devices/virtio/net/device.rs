// SPDX-License-Identifier: Apache-2.0
//! The device: its configuration, its features and its workers.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::GuestAddressSpace;

use super::control::{Control, use_pairs};
use super::pair::{Limits, Link, QueuePair};
use super::receive::Receiver;
use super::tap::Tap;
use super::transmit::Transmitter;
use super::vhost::{VhostNet, VhostPair};
use crate::control::RateLimits;
use crate::devices::virtio::rate::{Limit, RateLimiter};
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, Worker, read_config,
};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// Its name in logs.
    pub id: String,
    /// The guest interface's hardware address.
    pub mac: [u8; 6],
    /// The largest packet, if the guest is to be told.
    pub mtu: Option<u16>,
    /// A tap for each queue pair, all of one interface.
    pub taps: Vec<OwnedFd>,
    /// Empty, or an open `/dev/vhost-net` for each tap.
    pub vhost: Vec<OwnedFd>,
    /// The most that comes to the guest.
    pub receive: RateLimits,
    /// The most that the guest sends.
    pub transmit: RateLimits,
}

/// Why there can't be such a device.
#[derive(Debug, Error)]
pub enum NetError {
    /// Too few or too many taps.
    #[error("a network device has 1 to {max} queue pairs, not {pairs}")]
    Pairs {
        /// The most.
        max: usize,
        /// What was asked for.
        pairs: usize,
    },
    /// The kernel's devices don't fit the taps.
    #[error("it has {taps} taps, and {vhost} vhost devices for them")]
    Vhost {
        /// Taps.
        taps: usize,
        /// Descriptors of `/dev/vhost-net`.
        vhost: usize,
    },
    /// The kernel moves packets as fast as it can.
    #[error("its packets go through vhost, which knows no limits")]
    UnlimitedVhost,
    /// An address of a group.
    #[error("its hardware address is no address of one interface")]
    Mac,
    /// The descriptor is something else.
    #[error("its descriptor is no tap interface")]
    NotTap(#[source] io::Error),
    /// The interface was made otherwise.
    #[error("its tap was made with flags {flags:#x}, which lack some of {needed:#x}")]
    Flags {
        /// As they are.
        flags: i32,
        /// What is needed.
        needed: i32,
    },
    /// The kernel refused a step.
    #[error("its tap can't {what}")]
    Tap {
        /// Which.
        what: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

/// A network card.
#[derive(Debug)]
pub struct NetDevice {
    name: String,
    mac: [u8; 6],
    mtu: Option<u16>,
    taps: Vec<Arc<Tap>>,
    /// One for each tap, or none: the packets are ours to move.
    vhost: Vec<Arc<VhostNet>>,
    /// Shared by all pairs.
    receive_limiter: Option<Arc<RateLimiter>>,
    transmit_limiter: Option<Arc<RateLimiter>>,
    features: u64,
    queue_sizes: Vec<u16>,
    link: Arc<Link>,
    workers: Vec<Worker>,
}

impl NetDevice {
    /// Most queue pairs: a function has doorbells for 16 queues, and a guest's gain from more pairs
    /// than host threads to serve them is nil.
    pub const MAX_PAIRS: usize = crate::control::MAX_QUEUE_PAIRS;

    /// A card with this address on these taps.
    ///
    /// # Errors
    /// The taps are no taps, not made as they must be, or too many.
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        let pairs = config.taps.len();
        if !(1..=Self::MAX_PAIRS).contains(&pairs) {
            let max = Self::MAX_PAIRS;
            return Err(NetError::Pairs { max, pairs });
        }
        let given = config.vhost.len();
        if given != 0 && given != pairs {
            let (taps, vhost) = (pairs, given);
            return Err(NetError::Vhost { taps, vhost });
        }
        let limiter = |limits: RateLimits| RateLimiter::new(limits.bytes, limits.operations);
        let receive_limiter = limiter(config.receive).map(Arc::new);
        let transmit_limiter = limiter(config.transmit).map(Arc::new);
        if given != 0 && (receive_limiter.is_some() || transmit_limiter.is_some()) {
            return Err(NetError::UnlimitedVhost);
        }
        let vhost = config.vhost.into_iter().map(VhostNet::new);
        let vhost = vhost.map(|device| device.map(Arc::new));
        let vhost = vhost.collect::<io::Result<_>>().unwrap_or_else(|error| {
            tracing::warn!(%error, "vhost-net can't be used: the monitor moves the packets");
            Vec::new()
        });
        let [first, ..] = config.mac;
        if first & 1 != 0 {
            return Err(NetError::Mac);
        }
        let mut taps = Vec::with_capacity(pairs);
        for tap in config.taps {
            taps.push(Arc::new(Tap::new(tap, pairs > 1)?));
        }
        let mut features =
            1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;
        // Offloads are the interface's, not a queue's.
        if let Some(tap) = taps.first() {
            features |= tap.features()?;
        }
        if config.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let mut queue_sizes = vec![QUEUE_SIZE; pairs.saturating_mul(2)];
        if pairs > 1 {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Ok(Self {
            name: format!("net-{}", config.id),
            mac: config.mac,
            mtu: config.mtu,
            taps,
            vhost,
            receive_limiter,
            transmit_limiter,
            features,
            queue_sizes,
            link: Arc::new(Link::new()),
            workers: Vec::new(),
        })
    }

    fn limits(&self) -> io::Result<Limits> {
        Ok(Limits {
            receive: Limit::of(self.receive_limiter.as_ref())?,
            transmit: Limit::of(self.transmit_limiter.as_ref())?,
        })
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let multi_queue = activation.features & 1 << VIRTIO_NET_F_MQ != 0;
        let max_pairs = if multi_queue { self.taps.len() } else { 1 };
        if let Some(tap) = self.taps.first() {
            let told = tap.negotiate(activation.features);
            told.map_err(ActivateError::Worker)?;
        }
        if self.taps.len() > 1 {
            // Until the driver asks for more.
            use_pairs(&self.taps, 1).map_err(ActivateError::Worker)?;
        }
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        let enabled = queues.len();
        let mut queues = queues.into_iter().peekable();
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        for (number, tap) in (0_u16..).zip(self.taps.iter().take(max_pairs)) {
            let Some((receive, transmit)) = next_pair(&mut queues, number) else {
                if number == 0 {
                    let expected = 2;
                    return Err(ActivateError::QueueCount { expected, enabled });
                }
                continue;
            };
            let name = format!("{}-{number}", self.name);
            let interrupt = Arc::clone(&interrupt);
            let worker = match self.vhost.get(usize::from(number)) {
                Some(vhost) => VhostPair::start(
                    vhost,
                    Arc::clone(&interrupt),
                    (features, &memory.memory()),
                    &[receive, transmit],
                    tap,
                )
                .and_then(|pair| Worker::spawn(&name, interrupt, pair)),
                None => {
                    let pair = QueuePair::new(
                        memory.clone(),
                        Arc::clone(&interrupt),
                        (
                            Receiver::new(receive, mergeable),
                            Transmitter::new(transmit),
                        ),
                        Arc::clone(tap),
                        Arc::clone(&self.link),
                        self.limits().map_err(ActivateError::Worker)?,
                    );
                    Worker::spawn(&name, interrupt, pair)
                }
            };
            self.workers.push(worker.map_err(ActivateError::Worker)?);
        }
        // The control queue follows the pairs (section 5.1.2).
        let at = u16::try_from(max_pairs.saturating_mul(2)).unwrap_or(u16::MAX);
        if let Some(queue) = queues.find(|queue| queue.index() == at) {
            let control = Control {
                memory,
                interrupt: Arc::clone(&interrupt),
                queue,
                taps: self.taps.iter().take(max_pairs).cloned().collect(),
            };
            let name = format!("{}-control", self.name);
            let worker = Worker::spawn(&name, interrupt, control);
            self.workers.push(worker.map_err(ActivateError::Worker)?);
        }
        Ok(())
    }
}

/// Takes the queues of pair `number`, if the driver enabled both.
fn next_pair(
    queues: &mut std::iter::Peekable<impl Iterator<Item = ActiveQueue>>,
    number: u16,
) -> Option<(ActiveQueue, ActiveQueue)> {
    let first = number.checked_mul(2)?;
    let receive = queues.next_if(|queue| queue.index() == first);
    let transmit = queues.next_if(|queue| Some(queue.index()) == first.checked_add(1));
    receive.zip(transmit)
}

impl VirtioDevice for NetDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let up = u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or_default();
        let status = if self.link.is_up() { up } else { 0 };
        let pairs = u16::try_from(self.taps.len()).unwrap_or(u16::MAX);
        let mut config = self.mac.to_vec();
        config.extend(status.to_le_bytes());
        config.extend(pairs.to_le_bytes());
        config.extend(self.mtu.unwrap_or_default().to_le_bytes());
        read_config(&config, offset, data);
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
        for worker in self.workers.drain(..) {
            worker.stop();
        }
    }
}
