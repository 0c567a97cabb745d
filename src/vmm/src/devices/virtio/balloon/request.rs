// SPDX-License-Identifier: Apache-2.0
//! Pages that the guest gives away: into the balloon by their numbers (virtio 1.2, section 5.5.6),
//! or as ranges that are free (section 5.5.6.7). The host gets them back at once, and where the
//! guest uses them again it finds zeroes.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::devices::virtio::DeviceFault;
use crate::devices::virtio::pages::discard;

/// Bytes of a page of the balloon, whatever the guest's own pages are, and bits of their number.
const PAGE: usize = 1 << PAGE_SHIFT;
const PAGE_SHIFT: u32 = 12;

/// Bytes of a page's number.
const NUMBER: usize = 4;

/// Most of what a request may name, so that the worker comes back from it: Linux sends 256 pages
/// and 32 ranges at a time.
pub(super) const MAX_PAGES: usize = 4096;
pub(super) const MAX_RANGES: usize = 128;

/// Takes the pages whose numbers a request holds. Returns the bytes written to it, none.
pub(super) fn inflate(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<u32, DeviceFault> {
    let mut pages = page_numbers(memory, chain)?;
    // Neighbours go together, whichever comes first.
    pages.sort_unstable();
    pages.dedup();
    for run in pages.chunk_by(|page, next| page.checked_add(1) == Some(*next)) {
        if let Some(first) = run.first() {
            let address = u64::from(*first) << PAGE_SHIFT;
            discard(memory, address, run.len().saturating_mul(PAGE))?;
        }
    }
    Ok(0)
}

/// Takes the ranges that a request reports as free: its buffers themselves. Returns the bytes
/// written to them, none.
pub(super) fn report(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<u32, DeviceFault> {
    for (number, range) in chain.writable().enumerate() {
        if number >= MAX_RANGES {
            return Err(DeviceFault::Driver("a request reports too many ranges"));
        }
        let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
        discard(memory, range.addr().0, len)?;
    }
    Ok(0)
}

/// Copies the numbers out of a request, however the driver has cut it.
fn page_numbers(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<Vec<u32>, DeviceFault> {
    let mut bytes = Vec::new();
    for descriptor in chain.readable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let start = bytes.len();
        let end = start.saturating_add(len);
        if end > MAX_PAGES.saturating_mul(NUMBER) {
            return Err(DeviceFault::Driver("a request names too many pages"));
        }
        bytes.resize(end, 0);
        memory
            .read_slice(
                bytes.get_mut(start..).unwrap_or_default(),
                descriptor.addr(),
            )
            .map_err(|_| DeviceFault::Driver("a buffer lies outside of memory"))?;
    }
    let (numbers, rest) = bytes.as_chunks::<NUMBER>();
    if !rest.is_empty() {
        return Err(DeviceFault::Driver("a request ends within a page's number"));
    }
    Ok(numbers.iter().copied().map(u32::from_le_bytes).collect())
}
