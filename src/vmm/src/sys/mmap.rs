// SPDX-License-Identifier: Apache-2.0
//! Anonymous memory, aligned so that huge pages fit, and pages of it given back.

use std::{io, ptr};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::param::page_size;
use vm_memory::VolatileSlice;
use vm_memory::mmap::MmapRegion;

/// Bytes of a huge page. KVM maps one into the guest where guest and host address agree modulo
/// this; guest regions start at multiples of it.
const HUGE_PAGE: usize = 2 << 20;

/// Maps `len` bytes, a multiple of the page size, of private memory.
///
/// The mapping lives as long as the process, which serves one machine: `MmapRegion` does not
/// unmap what it did not map itself.
///
/// # Errors
/// `len` is 0, or there is no address space for it.
pub(crate) fn anonymous(len: usize) -> io::Result<MmapRegion> {
    let reserved = len
        .checked_add(HUGE_PAGE)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    if len == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice; nothing is replaced.
    let start = unsafe { mmap_anonymous(ptr::null_mut(), reserved, prot, flags) }?;
    let skipped = start.align_offset(HUGE_PAGE);
    let rest = HUGE_PAGE.saturating_sub(skipped);
    let start = start.cast::<u8>();
    // SAFETY: `skipped` is at most a huge page, and so within the mapping.
    let aligned = unsafe { start.add(skipped) };
    // SAFETY: `len` bytes and less than a huge page follow.
    let end = unsafe { aligned.add(len) };
    // What surrounds the aligned part is only address space; a refusal changes nothing.
    if skipped > 0 {
        // SAFETY: the first part of the mapping just made, which nobody knows of.
        let _ = unsafe { munmap(start.cast(), skipped) };
    }
    if rest > 0 {
        // SAFETY: the last part, likewise.
        let _ = unsafe { munmap(end.cast(), rest) };
    }
    // Without huge pages the guest is only slower.
    // SAFETY: the range is the mapping that is left; the advice does not change its contents.
    let _ = unsafe { madvise(aligned.cast(), len, Advice::LinuxHugepage) };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the range is mapped with these flags and is never unmapped.
    unsafe { MmapRegion::build_raw(aligned, len, prot, flags) }.map_err(io::Error::other)
}

/// Gives the whole pages within `slice` back to the host. They stay mapped, and those of private
/// anonymous memory read as zero from then on. What surrounds them in the slice is left alone.
///
/// # Errors
/// The memory is locked, or not of a kind that can be given back.
pub(crate) fn discard(slice: VolatileSlice<'_>) -> io::Result<()> {
    let page = page_size();
    let skipped = slice.ptr_guard_mut().as_ptr().align_offset(page);
    let rest = slice.len().saturating_sub(skipped);
    let len = rest.saturating_sub(rest.checked_rem(page).unwrap_or(rest));
    if len == 0 {
        return Ok(());
    }
    let pages = slice.subslice(skipped, len).map_err(io::Error::other)?;
    let start = pages.ptr_guard_mut();
    // SAFETY: the range is whole pages of the slice, which keeps them mapped; memory that is only
    // reached through such slices may change its contents at any time.
    unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontNeed) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileMemory;

    use super::*;

    #[test]
    fn whole_pages_alone_are_discarded() {
        let page = page_size();
        for (offset, len, first, last) in [
            (0, 4 * page, 0, 4),
            (page, page, 1, 2),
            (1, 3 * page, 1, 3),
            (page, 2 * page - 1, 1, 2),
            (page - 1, page + 2, 1, 2),
            (1, page, 0, 0),
            (page, page - 1, 0, 0),
            (page, 0, 0, 0),
        ] {
            let region = anonymous(4 * page).unwrap();
            let all = region.get_slice(0, 4 * page).unwrap();
            all.copy_from(&vec![0xab_u8; 4 * page]);
            discard(region.get_slice(offset, len).unwrap()).unwrap();
            let mut bytes = vec![0_u8; 4 * page];
            all.copy_to(&mut bytes);
            for (number, bytes) in bytes.chunks(page).enumerate() {
                let expected = if (first..last).contains(&number) {
                    0
                } else {
                    0xab
                };
                assert!(
                    bytes.iter().all(|byte| *byte == expected),
                    "page {number} of {offset}, {len}"
                );
            }
        }
    }
}
