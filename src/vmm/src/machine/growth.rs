// SPDX-License-Identifier: Apache-2.0
//! vCPUs and memory that come and go while the machine runs.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
use kvm_ioctls::VcpuFd;

use super::slots::{FIXED, Slots};
use super::vcpu::Vcpus;
use super::{MachineError, MachineEvents};
use crate::arch::x86_64::vcpu::{CpuModel, VcpuSetupError};
use crate::devices::virtio::mem::{MemDevice, Plugged, Resizer};
use crate::devices::{Ejected, HotplugRegisters};
use crate::interrupt::Line;
use crate::kvm::Vm;

/// Refuses a size that a machine can't have.
pub(super) fn check(
    what: &'static str,
    least: u32,
    most: u32,
    asked: u32,
) -> Result<(), MachineError> {
    if (least..=most).contains(&asked) {
        return Ok(());
    }
    Err(MachineError::Size {
        what,
        least,
        most,
        asked,
    })
}

/// The vCPUs above those that the machine boots with. KVM makes one when it is plugged first, and
/// never takes it back.
#[derive(Debug)]
pub(super) struct HotVcpus {
    range: Range<u8>,
    vcpus: Arc<Vcpus>,
    vm: Arc<Vm>,
    model: CpuModel,
    registers: Arc<HotplugRegisters>,
    /// Those whose plug has failed, for the next time.
    spare: Mutex<Vec<Spare>>,
}

/// A vCPU of KVM's that is not in use.
#[derive(Debug)]
struct Spare {
    id: u8,
    vcpu: VcpuFd,
    /// It has run before.
    is_used: bool,
}

impl HotVcpus {
    /// None of `range` is plugged. Returns the registers as well.
    pub(super) fn new(
        range: Range<u8>,
        vcpus: &Arc<Vcpus>,
        vm: &Arc<Vm>,
        model: CpuModel,
        line: Arc<dyn Line>,
    ) -> (Self, Arc<HotplugRegisters>) {
        let ejected = Arc::new(Retire {
            range: range.clone(),
            vcpus: Arc::downgrade(vcpus),
        });
        let registers = Arc::new(HotplugRegisters::new(line, ejected));
        let hot = Self {
            range,
            vcpus: Arc::clone(vcpus),
            vm: Arc::clone(vm),
            model,
            registers: Arc::clone(&registers),
            spare: Mutex::default(),
        };
        (hot, registers)
    }

    /// Plugs the first ones that are missing, or asks for the last ones that are there.
    pub(super) fn resize(&self, count: u8) -> Result<(), MachineError> {
        let (least, most) = (self.range.start, self.range.end);
        check("vCPUs", least.into(), most.into(), count.into())?;
        let wanted = usize::from(count.saturating_sub(least));
        let (present, missing): (Vec<u8>, Vec<u8>) = self
            .range
            .clone()
            .partition(|id| self.registers.is_present(*id));
        for id in present.iter().take(wanted) {
            // A request to shrink that was before this one.
            self.registers.keep(*id);
        }
        let more = wanted.saturating_sub(present.len());
        for id in missing.into_iter().take(more) {
            self.plug(id)?;
        }
        let fewer = present.len().saturating_sub(wanted);
        for id in present.into_iter().rev().take(fewer) {
            self.registers.request_eject(id);
        }
        Ok(())
    }

    /// What fails on the way is kept: it may be tried again.
    fn plug(&self, id: u8) -> Result<(), MachineError> {
        let Spare { vcpu, is_used, .. } = self.unused(id)?;
        let prepared = if is_used {
            renew(&vcpu, id)
        } else {
            self.model.set_up(&vcpu, id, None)
        };
        if let Err(error) = prepared {
            self.spare().push(Spare { id, vcpu, is_used });
            return Err(error.into());
        }
        if let Err((vcpu, error)) = self.vcpus.add(id, vcpu) {
            self.spare().push(Spare { id, vcpu, is_used });
            return Err(MachineError::Thread(error));
        }
        self.registers.announce(id);
        Ok(())
    }

    /// The vCPU `id`, a new one if KVM has made none yet.
    fn unused(&self, id: u8) -> Result<Spare, MachineError> {
        if let Some(vcpu) = self.vcpus.take_retired(id) {
            let is_used = true;
            return Ok(Spare { id, vcpu, is_used });
        }
        let mut spare = self.spare();
        if let Some(at) = spare.iter().position(|spare| spare.id == id) {
            return Ok(spare.swap_remove(at));
        }
        let vcpu = self.vm.create_vcpu(id)?;
        let is_used = false;
        Ok(Spare { id, vcpu, is_used })
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Spare>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has a vCPU wait for its INIT, as one that KVM has just made: INIT sets the rest.
fn renew(vcpu: &VcpuFd, id: u8) -> Result<(), VcpuSetupError> {
    let state = kvm_mp_state {
        mp_state: KVM_MP_STATE_UNINITIALIZED,
    };
    let what = "to have it wait for INIT";
    vcpu.set_mp_state(state)
        .map_err(|source| VcpuSetupError { id, what, source })
}

/// Has vCPUs leave that the guest has let go of. Others it can't let go of.
#[derive(Debug)]
struct Retire {
    range: Range<u8>,
    /// They reach the registers, and so this.
    vcpus: Weak<Vcpus>,
}

impl Ejected for Retire {
    fn ejected(&self, id: u8) {
        if let Some(vcpus) = self.vcpus.upgrade()
            && self.range.contains(&id)
        {
            vcpus.retire(id);
        }
    }
}

/// Memory above what the machine boots with.
#[derive(Debug)]
pub(super) struct HotMemory {
    booted_mib: u32,
    most_mib: u32,
    resizer: Resizer,
}

impl HotMemory {
    /// Puts a device for the region at `range` in a slot. The machine booted with the first of these sizes and
    /// has at most the second: the region may be larger, as Linux uses whole blocks of its own alone.
    pub(super) fn plug(
        range: &Range<u64>,
        (booted_mib, most_mib): (u32, u32),
        slots: &Slots,
        events: &Arc<dyn MachineEvents>,
    ) -> Result<Self, MachineError> {
        let device = MemDevice::new(range, Arc::new(Told(Arc::clone(events))));
        let resizer = device.resizer();
        slots.plug(FIXED, "memory".to_owned(), Box::new(device))?;
        Ok(Self {
            booted_mib,
            most_mib,
            resizer,
        })
    }

    /// Wants the guest to have `mib` in all.
    pub(super) fn resize(&self, mib: u32) -> Result<(), MachineError> {
        check("MiB", self.booted_mib, self.most_mib, mib)?;
        let more = u64::from(mib.saturating_sub(self.booted_mib)) << 20;
        self.resizer.request(more).map_err(MachineError::Tell)
    }

    /// What the guest has of it.
    pub(super) fn plugged_mib(&self) -> u32 {
        mib(self.resizer.plugged())
    }
}

fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

/// The machine's events as the memory device knows them.
#[derive(Debug)]
struct Told(Arc<dyn MachineEvents>);

impl Plugged for Told {
    fn changed(&self) {
        self.0.resized();
    }
}
