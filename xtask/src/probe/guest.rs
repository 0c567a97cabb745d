// SPDX-License-Identifier: Apache-2.0
//! The smallest VM: one page of memory, one vCPU, one loop. Holds the only unsafe call of xtask.

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const LOAD: u64 = 0x1000;
const SIZE: u64 = 0x1000;

/// Runs `rounds` of a two-instruction loop in real mode and returns how long it took.
pub(crate) fn run_loop(rounds: u32) -> Result<Duration> {
    // mov ecx, rounds; again: dec ecx; jnz again; hlt
    let [a, b, c, d] = rounds.to_le_bytes();
    let code = [0x66, 0xb9, a, b, c, d, 0x66, 0x49, 0x75, 0xfc, 0xf4];

    let kvm = Kvm::new().context("opening /dev/kvm")?;
    let vm = kvm.create_vm().context("creating a VM")?;
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(LOAD), usize::try_from(SIZE)?)])?;
    memory.write_slice(&code, GuestAddress(LOAD))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: LOAD,
        memory_size: SIZE,
        userspace_addr: u64::try_from(memory.get_host_address(GuestAddress(LOAD))?.addr())?,
        flags: 0,
    };
    // SAFETY: the region is the page that `memory` maps, and `memory` outlives `vm` and its vCPU.
    unsafe { vm.set_user_memory_region(region) }.context("giving the VM memory")?;

    let mut vcpu = vm.create_vcpu(0).context("creating a vCPU")?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = LOAD;
    // Bit 1 of the flags is always set.
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;

    let begin = Instant::now();
    let exit = vcpu.run().context("running the vCPU")?;
    let time = begin.elapsed();
    if !matches!(exit, VcpuExit::Hlt) {
        bail!("the guest ended with {exit:?}");
    }
    Ok(time)
}
