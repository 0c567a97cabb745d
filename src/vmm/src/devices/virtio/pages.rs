// SPDX-License-Identifier: Apache-2.0
//! Pages of guest memory, given back to the host.

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::DeviceFault;
use crate::sys::mmap;

/// Gives the whole pages of a range of guest memory back to the host. Where the guest uses them
/// again it finds zeroes.
pub(super) fn discard(
    memory: &GuestMemoryMmap,
    address: u64,
    len: usize,
) -> Result<(), DeviceFault> {
    let outside = |_| DeviceFault::Driver("a page lies outside of memory");
    let slices = memory.get_slices(GuestAddress(address), len, Permissions::Write);
    // The range may go on in the next region, which lies elsewhere on the host.
    for slice in slices.map_err(outside)? {
        let discarded = mmap::discard(slice.map_err(outside)?);
        discarded.map_err(|source| DeviceFault::Host {
            what: "can't give pages back to the host",
            source,
        })?;
    }
    Ok(())
}
