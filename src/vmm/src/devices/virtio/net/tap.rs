// SPDX-License-Identifier: Apache-2.0
//! The host's end of the cable.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use super::{HEADER_LEN, NetError};
use crate::sys::tap as raw;

/// What a reader of the tap can take (Linux's `TUN_F_*`).
const CSUM: u32 = 0x01;
const TSO4: u32 = 0x02;
const TSO6: u32 = 0x04;
const TSO_ECN: u32 = 0x08;
/// Since Linux 6.2, both or neither.
const USO: u32 = 0x20 | 0x40;

/// How the owner must have made the interface.
const NEEDED: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// The features of a guest that takes packets as the tap has them, and the tap's name for each.
const GUEST_OFFLOADS: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, USO),
    (VIRTIO_NET_F_GUEST_USO6, USO),
];

/// What every tap takes of a guest. UDP fragmentation (UFO) is not offered in either direction:
/// Linux makes no such packets since 4.14.
const HOST_OFFLOADS: [u32; 4] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
];

/// One queue of a tap interface.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    /// Whether the interface hands it packets; the kernel refuses to say it twice.
    attached: AtomicBool,
}

impl Tap {
    /// Takes over an open `/dev/net/tun` that is attached to an interface.
    pub(super) fn new(fd: OwnedFd, multi_queue: bool) -> Result<Self, NetError> {
        let flags = raw::flags(&fd).map_err(NetError::NotTap)?;
        let needed = NEEDED
            | if multi_queue {
                libc::IFF_MULTI_QUEUE
            } else {
                0
            };
        if flags & needed != needed {
            return Err(NetError::Flags { flags, needed });
        }
        let failed = |source: rustix::io::Errno| NetError::Tap {
            what: "be made non-blocking",
            source: source.into(),
        };
        rustix::io::ioctl_fionbio(&fd, true).map_err(failed)?;
        // A macvtap's queues each have their own.
        let size = i32::try_from(HEADER_LEN).unwrap_or(i32::MAX);
        raw::set_header_size(&fd, size).map_err(|source| NetError::Tap {
            what: "be told the size of its headers",
            source,
        })?;
        Ok(Self {
            file: fd.into(),
            attached: AtomicBool::new(true),
        })
    }

    /// The descriptor that packets are read from and written to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The offload features that this tap can serve.
    pub(super) fn features(&self) -> Result<u64, NetError> {
        let mut offloads = CSUM | TSO4 | TSO6 | TSO_ECN;
        let segments_udp = raw::set_offloads(&self.file, offloads | USO).is_ok();
        let mut features = HOST_OFFLOADS.iter().fold(0, |all, bit| all | 1 << bit);
        if segments_udp {
            offloads |= USO;
            features |= 1 << VIRTIO_NET_F_HOST_USO;
        }
        for (feature, offload) in GUEST_OFFLOADS {
            if offloads & offload != 0 {
                features |= 1 << feature;
            }
        }
        // Until a driver says otherwise.
        self.set_offloads(0).map_err(|source| NetError::Tap {
            what: "be told what the guest can take",
            source,
        })?;
        Ok(features)
    }

    /// Has the tap speak as the driver agreed to: packets the guest can't take are checksummed and
    /// cut up before they are read.
    pub(super) fn negotiate(&self, features: u64) -> io::Result<()> {
        let mut offloads = 0;
        for (feature, offload) in GUEST_OFFLOADS {
            if features & 1 << feature != 0 {
                offloads |= offload;
            }
        }
        // A driver may take segments of one IP version only, which the tap can't tell apart.
        let both = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        if features & both != both {
            offloads &= !USO;
        }
        // Nothing is cut late that has its checksum early.
        if offloads & CSUM == 0 {
            offloads = 0;
        }
        self.set_offloads(offloads)
    }

    /// Whether the interface hands packets to this queue. Only for taps with several.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::Relaxed) != attached {
            raw::set_attached(&self.file, attached)?;
            self.attached.store(attached, Ordering::Relaxed);
        }
        Ok(())
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        raw::set_offloads(&self.file, offloads)
    }
}
