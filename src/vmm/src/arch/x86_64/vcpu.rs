// SPDX-License-Identifier: Apache-2.0
//! The state that a vCPU starts with: that of the PVH protocol on the first, "waiting for INIT"
//! on the others. The local APICs are in x2APIC mode from the start: an MSR costs less than a
//! memory access.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use thiserror::Error;
use vmm_sys_util::errno;

use super::{cpuid, layout};

/// Control register 0: protected mode, extension type.
const CR0: u64 = 1 << 0 | 1 << 4;
/// The bit of RFLAGS that is always set.
const RFLAGS: u64 = 1 << 1;

/// IA32_APIC_BASE: x2APIC mode.
const APIC_BASE_X2APIC: u64 = 1 << 10;

/// MSRs that firmware would set.
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string instructions.
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
/// MTRRs enabled, memory write-back by default.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Segment types: code, execute and read; data, read and write; busy task state.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TASK: u8 = 0xb;

/// A step of setting up a vCPU that KVM refused.
#[derive(Debug, Error)]
#[error("vCPU {id}: KVM refused {what}")]
pub struct VcpuSetupError {
    /// Which vCPU.
    pub id: u8,
    /// What was to be set or read.
    pub what: &'static str,
    /// The kernel's word.
    #[source]
    pub source: errno::Error,
}

/// The CPUID that KVM supports, asked for once for all vCPUs.
#[derive(Debug)]
pub struct CpuModel {
    supported: CpuId,
    deadline: bool,
    count: u8,
}

impl CpuModel {
    /// A model for `count` processors.
    ///
    /// # Errors
    /// KVM gives no answer.
    pub fn new(kvm: &Kvm, count: u8) -> Result<Self, errno::Error> {
        Ok(Self {
            supported: kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?,
            deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            count,
        })
    }

    /// Sets up processor `id`; `entry` is where the first one begins, absent for the others.
    /// CPUID comes first: KVM checks MSRs against it.
    ///
    /// # Errors
    /// KVM refuses a step.
    pub fn set_up(&self, vcpu: &VcpuFd, id: u8, entry: Option<u32>) -> Result<(), VcpuSetupError> {
        let failed = |what| move |source| VcpuSetupError { id, what, source };
        let invalid = |_| errno::Error::new(libc::EINVAL);
        let entries = cpuid::entries(&self.supported, id, self.count, self.deadline);
        let cpuid = CpuId::from_entries(&entries).map_err(invalid);
        let cpuid = cpuid.map_err(failed("the size of CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("CPUID"))?;

        let msrs = [
            (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            (IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
        ];
        for (index, data) in msrs {
            let msr = kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let msrs = Msrs::from_entries(&[msr]).map_err(invalid);
            let set = msrs.and_then(|msrs| vcpu.set_msrs(&msrs));
            // KVM counts the MSRs that it took.
            let set = set.map_err(failed("an MSR"))?;
            if set != 1 {
                tracing::debug!(vcpu = id, msr = index, "KVM has no such MSR");
            }
        }

        let mut sregs = vcpu.get_sregs().map_err(failed("reading registers"))?;
        sregs.apic_base |= APIC_BASE_X2APIC;
        if entry.is_some() {
            sregs.cr0 = CR0;
            sregs.cs = segment(CODE);
            let data = segment(DATA);
            (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
            sregs.tr = kvm_segment {
                limit: 0x67,
                s: 0,
                db: 0,
                g: 0,
                ..segment(TASK)
            };
        }
        vcpu.set_sregs(&sregs)
            .map_err(failed("special registers"))?;
        if let Some(entry) = entry {
            let regs = kvm_regs {
                rip: entry.into(),
                rbx: layout::START_INFO.0,
                rflags: RFLAGS,
                ..Default::default()
            };
            vcpu.set_regs(&regs).map_err(failed("registers"))?;
        }
        Ok(())
    }
}

/// A flat 32-bit segment.
fn segment(type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x8,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
