// SPDX-License-Identifier: Apache-2.0
//! What CPUID tells the guest: all that KVM supports, but for virtualization in the guest and
//! performance counters, with this machine's topology: one socket, a thread a core.
//!
//! With kvm-clock, TSC deadline and (from the host) invariant TSC, Linux calibrates no clock.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaves this file changes.
const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const PERFORMANCE_COUNTERS: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_SVM: u32 = 0x8000_000a;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// Leaf 1, ECX and EDX.
const VMX: u32 = 1 << 5;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;

/// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
const CORE_COUNTERS: u32 = 1 << 23;

/// Level types of leaf 0xb, in ECX bits 8 to 15.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The CPUID of processor `id` (its APIC ID) of `count`.
///
/// `supported` is what KVM answers; `deadline` whether it has the TSC deadline timer, which is
/// not part of that answer.
#[must_use]
pub fn entries(supported: &CpuId, id: u8, count: u8, deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let (id, count) = (u32::from(id), u32::from(count));
    let mut entries: Vec<_> = supported.as_slice().to_vec();
    entries.retain(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2 | AMD_TOPOLOGY_V2));
    for entry in &mut entries {
        adjust(entry, id, count, deadline);
    }
    let shift = id_bits(count);
    entries.push(level(0, 0, 1, LEVEL_SMT, id));
    entries.push(level(1, shift, count, LEVEL_CORE, id));
    entries.push(level(2, 0, 0, 0, id));
    entries
}

fn adjust(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, deadline: bool) {
    let last = count.saturating_sub(1);
    match entry.function {
        FEATURES => {
            // Initial APIC ID and number of processors, beside the cache line size.
            entry.ebx = (entry.ebx & 0xffff) | count << 16 | id << 24;
            entry.ecx |= HYPERVISOR | X2APIC;
            entry.ecx &= !(VMX | TSC_DEADLINE);
            if deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx &= !HTT;
            if count > 1 {
                entry.edx |= HTT;
            }
        }
        CACHES => {
            // The third level is the socket's, the others a core's.
            let sharing = if (entry.eax >> 5) & 7 >= 3 { last } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | last.min(63) << 26;
        }
        AMD_CACHES => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { last } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14;
        }
        PERFORMANCE_COUNTERS | AMD_SVM => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        AMD_FEATURES => entry.ecx &= !(SVM | CORE_COUNTERS),
        AMD_SIZES => {
            // Number of cores less one, and the bits of the APIC ID that they take.
            entry.ecx = (entry.ecx & !0xf0ff) | last | id_bits(count) << 12;
        }
        AMD_TOPOLOGY => {
            // Extended APIC ID; core ID with one thread a core; one node.
            (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
        }
        _ => {}
    }
}

/// One level of leaf 0xb: the APIC ID's bits below it, processors in it, its type.
fn level(index: u32, shift: u32, processors: u32, kind: u32, id: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind | index,
        edx: id,
        ..Default::default()
    }
}

/// Bits that number `count` processors.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn supported() -> CpuId {
        CpuId::from_entries(&[
            entry(1, [0, 0x0800, VMX, 0]),
            entry(4, [0x163, 0, 0, 0]),
            entry(0xa, [1, 2, 3, 4]),
            entry(0xb, [9, 9, 9, 9]),
            entry(0x1f, [9, 9, 9, 9]),
            entry(0x8000_0001, [0, 0, SVM | CORE_COUNTERS | 1, 0]),
            entry(0x8000_0008, [0x3030, 0, 0, 0]),
            entry(0x8000_001e, [0, 0x100, 7, 0]),
        ])
        .unwrap()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut hits = entries
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index));
        let hit = *hits.next().unwrap();
        assert!(hits.next().is_none());
        hit
    }

    #[test]
    fn a_processor_knows_its_place() {
        let entries = entries(&supported(), 5, 6, true);
        let features = find(&entries, 1, 0);
        assert_eq!(features.ebx, 0x0506_0800);
        assert_eq!(features.ecx, HYPERVISOR | X2APIC | TSC_DEADLINE);
        assert_eq!(features.edx & HTT, HTT);
        let core = find(&entries, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert_eq!(find(&entries, 0xb, 0).ebx, 1);
        assert_eq!(find(&entries, 4, 0).eax, 0x163 | 5 << 14 | 5 << 26);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 5 | 3 << 12);
        assert_eq!(find(&entries, 0x8000_001e, 0).eax, 5);
        assert!(!entries.iter().any(|entry| entry.function == 0x1f));
    }

    #[test]
    fn nested_virtualization_and_counters_are_hidden() {
        let entries = entries(&supported(), 0, 1, false);
        assert_eq!(find(&entries, 1, 0).ecx & (VMX | TSC_DEADLINE), 0);
        assert_eq!(find(&entries, 1, 0).edx & HTT, 0);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx, 1);
        assert_eq!(find(&entries, 0xa, 0).eax, 0);
        assert_eq!(find(&entries, 0xb, 1).eax, 0);
    }
}
