// SPDX-License-Identifier: Apache-2.0
//! What vhost devices are told by ioctl (Linux's `vhost.h`): where guest memory and its rings are,
//! which the kernel then serves itself.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

/// The type of the driver's ioctls.
const VHOST: libc::c_uint = 0xaf;

ioctl_ior_nr!(VHOST_GET_FEATURES, VHOST, 0x00, u64);
ioctl_iow_nr!(VHOST_SET_FEATURES, VHOST, 0x00, u64);
ioctl_io_nr!(VHOST_SET_OWNER, VHOST, 0x01);
// Its type is the table's head, without the regions.
ioctl_iow_nr!(VHOST_SET_MEM_TABLE, VHOST, 0x03, u64);
ioctl_iow_nr!(VHOST_SET_VRING_NUM, VHOST, 0x10, State);
ioctl_iow_nr!(VHOST_SET_VRING_ADDR, VHOST, 0x11, Addresses);
ioctl_iow_nr!(VHOST_SET_VRING_BASE, VHOST, 0x12, State);
ioctl_iow_nr!(VHOST_SET_VRING_KICK, VHOST, 0x20, Descriptor);
ioctl_iow_nr!(VHOST_SET_VRING_CALL, VHOST, 0x21, Descriptor);
ioctl_iow_nr!(VHOST_SET_VRING_ERR, VHOST, 0x22, Descriptor);
ioctl_iow_nr!(VHOST_NET_SET_BACKEND, VHOST, 0x30, Descriptor);

/// Regions of a memory table: this machine has two.
const MAX_REGIONS: usize = 8;

/// `struct vhost_vring_state`.
#[repr(C)]
struct State {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct Descriptor {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory_region`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Region {
    guest: u64,
    size: u64,
    host: u64,
    flags: u64,
}

/// `struct vhost_memory`.
#[repr(C)]
struct Table {
    count: u32,
    padding: u32,
    regions: [Region; MAX_REGIONS],
}

/// The events of one ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Events<'a, E: AsRawFd> {
    /// Written when the driver has made buffers available.
    pub(crate) kick: &'a E,
    /// To write when the driver is to be interrupted.
    pub(crate) call: &'a E,
    /// To write when the ring makes no sense.
    pub(crate) error: &'a E,
}

/// Makes the device this process's: it reaches memory as the process has it mapped.
pub(crate) fn set_owner(device: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: without an argument.
    check(unsafe { ioctl(device, VHOST_SET_OWNER()) })
}

/// The feature bits that the kernel can serve.
pub(crate) fn features(device: &impl AsRawFd) -> io::Result<u64> {
    let mut features = 0_u64;
    // SAFETY: the kernel writes 64 bits.
    check(unsafe { ioctl_with_mut_ref(device, VHOST_GET_FEATURES(), &mut features) })?;
    Ok(features)
}

/// Sets the features agreed on.
pub(crate) fn set_features(device: &impl AsRawFd, features: u64) -> io::Result<()> {
    // SAFETY: the kernel reads 64 bits.
    check(unsafe { ioctl_with_ref(device, VHOST_SET_FEATURES(), &features) })
}

/// Says where guest memory is. It stays mapped as long as the process lives.
pub(crate) fn set_memory(device: &impl AsRawFd, memory: &GuestMemoryMmap) -> io::Result<()> {
    let mut table = Table {
        count: 0,
        padding: 0,
        regions: [Region::default(); MAX_REGIONS],
    };
    for region in memory.iter() {
        let at = usize::try_from(table.count).unwrap_or(MAX_REGIONS);
        let slot = table.regions.get_mut(at);
        let slot = slot.ok_or_else(|| io::Error::other("guest memory has too many regions"))?;
        *slot = Region {
            guest: region.start_addr().0,
            size: region.len(),
            host: u64::try_from(region.as_ptr().addr()).map_err(io::Error::other)?,
            flags: 0,
        };
        table.count = table.count.saturating_add(1);
    }
    // SAFETY: the kernel reads the head and as many regions as it says.
    check(unsafe { ioctl_with_ref(device, VHOST_SET_MEM_TABLE(), &table) })
}

/// Says where ring `index` of the device is, and what its events are.
pub(crate) fn set_ring<E: AsRawFd>(
    device: &impl AsRawFd,
    index: u32,
    queue: &Queue,
    memory: &GuestMemoryMmap,
    events: &Events<'_, E>,
) -> io::Result<()> {
    let size = u32::from(queue.size());
    let number = State { index, value: size };
    // SAFETY: the kernel reads a `State`.
    check(unsafe { ioctl_with_ref(device, VHOST_SET_VRING_NUM(), &number) })?;
    let value = queue.next_avail().into();
    let base = State { index, value };
    // SAFETY: the kernel reads a `State`.
    check(unsafe { ioctl_with_ref(device, VHOST_SET_VRING_BASE(), &base) })?;
    // Sizes of the split ring's parts (virtio 1.2, section 2.7), each with its event index.
    let size = u64::from(size);
    let part = |address, entry: u64, more: u64| {
        host_address(
            memory,
            address,
            size.saturating_mul(entry).saturating_add(more),
        )
    };
    let addresses = Addresses {
        index,
        flags: 0,
        descriptors: part(queue.desc_table(), 16, 0)?,
        available: part(queue.avail_ring(), 2, 6)?,
        used: part(queue.used_ring(), 8, 6)?,
        log: 0,
    };
    // SAFETY: the kernel reads an `Addresses`; each part lies in one mapped region.
    check(unsafe { ioctl_with_ref(device, VHOST_SET_VRING_ADDR(), &addresses) })?;
    for (request, event) in [
        (VHOST_SET_VRING_KICK(), events.kick),
        (VHOST_SET_VRING_CALL(), events.call),
        (VHOST_SET_VRING_ERR(), events.error),
    ] {
        let fd = event.as_raw_fd();
        // SAFETY: the kernel reads a `Descriptor` and takes a reference to the file.
        check(unsafe { ioctl_with_ref(device, request, &Descriptor { index, fd }) })?;
    }
    Ok(())
}

/// Has the kernel move ring `index`'s packets from or to `tap`; with none it stops, and has
/// stopped when the call returns.
pub(crate) fn set_backend(
    device: &impl AsRawFd,
    index: u32,
    tap: Option<&impl AsRawFd>,
) -> io::Result<()> {
    let fd = tap.map_or(-1, AsRawFd::as_raw_fd);
    let backend = Descriptor { index, fd };
    // SAFETY: the kernel reads a `Descriptor` and takes a reference to the file.
    check(unsafe { ioctl_with_ref(device, VHOST_NET_SET_BACKEND(), &backend) })
}

/// Where `len` bytes of guest memory are in this process, if in one piece.
fn host_address(memory: &GuestMemoryMmap, address: u64, len: u64) -> io::Result<u64> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let slice = memory.get_slice(GuestAddress(address), len);
    let slice = slice.map_err(io::Error::other)?;
    u64::try_from(slice.ptr_guard().as_ptr().addr()).map_err(io::Error::other)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
