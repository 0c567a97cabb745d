// SPDX-License-Identifier: Apache-2.0
//! What the configuration says of networks.

use vmm::control::{MAX_QUEUE_PAIRS, RateLimits};

/// How an interface is joined to the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Model {
    /// Not at all: the guest has no network.
    None,
    /// By a tap and redirecting filters on both.
    TcFilter,
    /// By a tap on top of it.
    Macvtap,
}

/// How networks are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) model: Model,
    /// The most queue pairs of an interface: no machine has more than CPUs.
    pub(crate) queues: usize,
    /// Whether the host's kernel moves the packets, where it can; where they are limited it can't.
    pub(crate) vhost: bool,
    /// The most that comes to a guest's interface.
    pub(crate) receive: RateLimits,
    /// The most that the guest sends by one.
    pub(crate) transmit: RateLimits,
}

impl Settings {
    /// Whether any of it is limited.
    pub(super) fn limited(&self) -> bool {
        [self.receive, self.transmit] != [RateLimits::default(); 2]
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: Model::TcFilter,
            queues: MAX_QUEUE_PAIRS,
            vhost: true,
            receive: RateLimits::default(),
            transmit: RateLimits::default(),
        }
    }
}
