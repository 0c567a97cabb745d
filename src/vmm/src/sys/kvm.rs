// SPDX-License-Identifier: Apache-2.0
//! KVM calls that the bindings can't make safe.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::errno;

/// Takes over an open `/dev/kvm`.
pub(crate) fn from_fd(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is owned and given up; `Kvm` closes it.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// Shows a memory region to the guest.
pub(crate) fn add_memory(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionMmap,
) -> Result<(), errno::Error> {
    let memory = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr().addr().try_into().unwrap_or_default(),
    };
    // SAFETY: the region is a mapping of that size, and `Machine` drops it only after the VM.
    unsafe { vm.set_user_memory_region(memory) }
}

/// Bytes of a page; `struct kvm_run` begins with one.
const PAGE: usize = 4096;

/// Offset of `immediate_exit` in `struct kvm_run`.
const IMMEDIATE_EXIT: usize = 1;

/// The `immediate_exit` flag of a vCPU: set, KVM_RUN returns at once with EINTR. The vCPU's own
/// handle is its thread's alone, so other threads reach the flag by a mapping of their own.
#[derive(Debug)]
pub(crate) struct ImmediateExit {
    page: ptr::NonNull<u8>,
}

// SAFETY: the mapping belongs to the process, and only an atomic in it is used.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: `vcpu` stays open for this call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping at an address of the kernel's choice; nothing is replaced.
        let page = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                PAGE,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        let page = ptr::NonNull::new(page.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { page })
    }

    pub(crate) fn set(&self, value: bool) {
        // SAFETY: the offset lies in the mapped page.
        let flag = unsafe { self.page.add(IMMEDIATE_EXIT) };
        // SAFETY: valid while `self` lives; the kernel reads it as one byte.
        let flag = unsafe { AtomicU8::from_ptr(flag.as_ptr()) };
        flag.store(value.into(), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: this mapping was made in `new` and nothing else refers to it.
        let _ = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

/// Why KVM could not go on, from its last exit (`KVM_EXIT_INTERNAL_ERROR`).
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    // SAFETY: the caller has seen that exit reason, so the union holds this member; any bytes are
    // a valid number.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}
