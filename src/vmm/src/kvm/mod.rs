// SPDX-License-Identifier: Apache-2.0
//! The VM as KVM knows it: created in the order that KVM wants, its memory slots, interrupt
//! routes and doorbells.

mod doorbell;
mod msi;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::errno;

use crate::arch::x86_64::layout;
use crate::interrupt::{Doorbells, MsiController};
use crate::sys::kvm as raw;

/// The only version of the KVM interface there has been since 2007.
const API_VERSION: i32 = 12;

/// Most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 32;

/// Why KVM makes no VM.
#[derive(Debug, Error)]
pub enum VmError {
    /// The descriptor is not `/dev/kvm`, or an interface from another world.
    #[error("the KVM descriptor is not /dev/kvm")]
    NotKvm,
    /// The host's KVM can't do what we need.
    #[error("the host's KVM lacks {0:?}")]
    Missing(Cap),
    /// More vCPUs than there can be.
    #[error("a VM has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    VcpuCount(u8),
    /// KVM refused a step.
    #[error("KVM refused to {what}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The kernel's word.
        #[source]
        source: errno::Error,
    },
}

/// What we can't do without.
const NEEDED: [Cap; 7] = [
    Cap::UserMemory,
    Cap::SplitIrqchip,
    Cap::Ioeventfd,
    Cap::Irqfd,
    Cap::ImmediateExit,
    Cap::SetTssAddr,
    Cap::ExtCpuid,
];

/// A VM with its interrupt controller, before its vCPUs.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    vm: Arc<VmFd>,
    /// One, as KVM takes all routes at once.
    router: Arc<msi::Router>,
}

impl Vm {
    /// Makes a VM of an open `/dev/kvm`. The local APICs are KVM's; there is no PIC or PIT,
    /// and the machine's I/O APIC sends messages as everything else does.
    ///
    /// # Errors
    /// Not KVM, too old, or out of resources.
    pub fn new(kvm: OwnedFd) -> Result<Self, VmError> {
        let kvm = raw::from_fd(kvm);
        if kvm.get_api_version() != API_VERSION {
            return Err(VmError::NotKvm);
        }
        if let Some(missing) = NEEDED.into_iter().find(|cap| !kvm.check_extension(*cap)) {
            return Err(VmError::Missing(missing));
        }
        let vm = kvm.create_vm().map_err(refused("create a VM"))?;
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or_default();
        vm.set_tss_address(tss).map_err(refused("place the TSS"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(refused("place the identity map"))?;
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        // No routes to keep for level-triggered pins: there are none.
        split.args = [0; 4];
        vm.enable_cap(&split)
            .map_err(refused("split the interrupt controller"))?;
        if vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) != 0 {
            // The counters are hidden in CPUID; this saves their context switch as well.
            let mut counters = kvm_enable_cap {
                cap: KVM_CAP_PMU_CAPABILITY,
                ..Default::default()
            };
            counters.args = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
            vm.enable_cap(&counters)
                .map_err(refused("turn performance counters off"))?;
        }
        let vm = Arc::new(vm);
        let router = Arc::new(msi::Router::new(Arc::clone(&vm)));
        Ok(Self { kvm, vm, router })
    }

    /// The system handle.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Shows guest memory to the guest, a slot a region.
    ///
    /// # Errors
    /// KVM refuses a region.
    pub fn add_memory(&self, memory: &GuestMemoryMmap) -> Result<(), VmError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            raw::add_memory(&self.vm, slot, region).map_err(refused("map guest memory"))?;
        }
        Ok(())
    }

    /// Makes vCPU `id`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, VmError> {
        self.vm
            .create_vcpu(id.into())
            .map_err(refused("create a vCPU"))
    }

    /// Gives out interrupts.
    #[must_use]
    pub fn interrupts(&self) -> Arc<dyn MsiController> {
        Arc::clone(&self.router) as _
    }

    /// Attaches doorbells.
    #[must_use]
    pub fn doorbells(&self) -> Arc<dyn Doorbells> {
        Arc::new(doorbell::IoEvents::new(Arc::clone(&self.vm)))
    }
}

fn refused(what: &'static str) -> impl FnOnce(errno::Error) -> VmError {
    move |source| VmError::Refused { what, source }
}

fn io_error(error: errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
