// SPDX-License-Identifier: Apache-2.0
//! virtio-net (virtio 1.2, section 5.1): a network card whose cable is a tap of the host.
//!
//! Each pair of queues has a tap descriptor and a worker of its own. Packets go between tap and
//! guest memory with no copy between; checksums and segmentation are left to whoever comes last.

mod control;
mod device;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod pair;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;

pub use device::{NetConfig, NetDevice, NetError};

use super::rate::RateLimiter;

/// Bytes of `struct virtio_net_hdr_v1`, which comes before each packet (section 5.1.6).
const HEADER_LEN: usize = 12;

/// The most bytes of a packet with its header: 64 KiB, as segmentation offload makes them, behind
/// an Ethernet header with a VLAN tag.
const MAX_PACKET: usize = HEADER_LEN + 18 + 65536;

/// Whether the limit asks for a rest before the next packet.
fn must_rest(limit: Option<&RateLimiter>) -> bool {
    limit.is_some_and(|limit| limit.wait().is_some())
}

/// Pays for a packet of `len` bytes, without its virtio header.
fn pay(limit: Option<&RateLimiter>, len: usize) {
    if let Some(limit) = limit {
        limit.pay(u64::try_from(len).unwrap_or(u64::MAX));
    }
}
