// SPDX-License-Identifier: Apache-2.0
//! Anonymous memory, aligned so that huge pages fit.

use std::{io, ptr};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
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
