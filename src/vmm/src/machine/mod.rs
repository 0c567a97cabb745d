// SPDX-License-Identifier: Apache-2.0
//! The machine: built from a configuration and open files, then started, paused, stopped.

mod build;
mod growth;
mod slots;
mod vcpu;

use std::fmt::Debug;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestMemoryError;
use vmm_sys_util::errno;

pub use build::Files;

use crate::arch::x86_64::kernel::KernelError;
use crate::arch::x86_64::layout;
use crate::arch::x86_64::pvh::StartInfoError;
use crate::arch::x86_64::vcpu::VcpuSetupError;
use crate::bus::RangeTaken;
use crate::control::{Block, ExitReason, Milestone, Net, Size};
use crate::devices::virtio::block::BlockError;
use crate::devices::virtio::fs::FsError;
use crate::devices::virtio::net::NetError;
use crate::devices::{GenerationId, HotplugRegisters, SerialPort};
use crate::kvm::{Vm, VmError};
use crate::memory::{MemoryError, PlaceError};
use growth::{HotMemory, HotVcpus};
use slots::Slots;
use vcpu::Vcpus;

/// Takes what happens to the machine. Called on its own threads; must not block.
pub trait MachineEvents: Debug + Send + Sync {
    /// The start came to this point, now.
    fn milestone(&self, milestone: Milestone);

    /// The guest's PID 1, or whoever writes there, wrote to the progress port.
    fn progress(&self, code: u8);

    /// The guest has ended or can't go on. The machine still needs `stop`. Only the first call
    /// counts.
    fn ended(&self, reason: ExitReason);

    /// A guest process connected to host port `port`.
    ///
    /// # Errors
    /// Nobody can take the connection; the guest sees it refused.
    fn connection(&self, port: u32, stream: OwnedFd) -> io::Result<()>;

    /// The guest has let go of the device called `name`, and its files are closed.
    fn unplugged(&self, name: &str);

    /// The machine may have another size.
    fn resized(&self);
}

/// Why there is no machine; each names what it is about.
#[derive(Debug, Error)]
pub enum MachineError {
    /// A message named a file that did not come with it, or that is used up.
    #[error("the boot request names file {0}, which did not come with it")]
    File(u32),
    /// KVM makes no VM.
    #[error("can't create the virtual machine")]
    Vm(#[from] VmError),
    /// No guest memory.
    #[error("can't set up guest memory")]
    Memory(#[from] MemoryError),
    /// Guest memory is below what any kernel boots with.
    #[error("a guest needs {minimum_mib} MiB of memory at least, not {memory_mib}")]
    MemorySize {
        /// The least.
        minimum_mib: u32,
        /// What was asked for.
        memory_mib: u32,
    },
    /// The kernel is not usable.
    #[error("can't use the guest kernel")]
    Kernel(#[from] KernelError),
    /// The kernel can't be loaded.
    #[error("can't load the guest kernel")]
    Place(#[from] PlaceError),
    /// The boot information can't be written.
    #[error("can't prepare the boot")]
    StartInfo(#[from] StartInfoError),
    /// The ACPI tables can't be written.
    #[error("can't write the ACPI tables")]
    Acpi(#[source] GuestMemoryError),
    /// A disk is not usable.
    #[error("can't use block device {id}")]
    Block {
        /// Its name.
        id: String,
        /// What is wrong.
        #[source]
        source: BlockError,
    },
    /// A network device is not usable.
    #[error("can't use network device {id}")]
    Net {
        /// Its name.
        id: String,
        /// What is wrong.
        #[source]
        source: NetError,
    },
    /// A file system is not usable.
    #[error("can't share a file system")]
    Filesystem(#[from] FsError),
    /// A device can't be put on the PCI bus.
    #[error("can't add device {name}")]
    Device {
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// More devices than slots.
    #[error("there are more devices than the PCI bus has slots for them")]
    Slots,
    /// A name that is taken.
    #[error("there is a device {0} already")]
    Twice(String),
    /// A name that nobody has, or a device that stays.
    #[error("there is no device {0} that could be unplugged or looked at again")]
    Missing(String),
    /// What a device stands for has changed in a way that the guest can't follow.
    #[error("can't tell the guest of the change of device {name}")]
    Changed {
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// More or less of something than the machine can have.
    #[error("this machine can have {least} to {most} {what}, not {asked}")]
    Size {
        /// Of what.
        what: &'static str,
        /// What it booted with.
        least: u32,
        /// What it may grow to.
        most: u32,
        /// What was asked for.
        asked: u32,
    },
    /// The guest does not hear of its memory's new size.
    #[error("can't tell the guest of its memory's size")]
    Tell(#[source] io::Error),
    /// The machine has no new generation ID.
    #[error("can't give the machine a new generation ID")]
    Generation(#[source] io::Error),
    /// The I/O APIC can't be had.
    #[error("can't set up the interrupt of hotplug")]
    Interrupt(#[source] io::Error),
    /// Two devices at one address: a bug in the layout.
    #[error("the machine's layout is wrong")]
    Layout(#[from] RangeTaken),
    /// A vCPU can't be set up.
    #[error("can't set up the processors")]
    VcpuSetup(#[from] VcpuSetupError),
    /// KVM does not say what it supports.
    #[error("can't ask KVM for the processor's features")]
    CpuModel(#[source] errno::Error),
    /// A vCPU's thread can't be started.
    #[error("can't start a vCPU's thread")]
    Thread(#[source] io::Error),
}

/// A built machine. Its vCPUs are paused until `resume`.
#[derive(Debug)]
pub struct Machine {
    // In the order in which they must go: nothing may run in the guest's memory once it is
    // unmapped.
    vcpus: Arc<Vcpus>,
    /// Those that come and go, where any may.
    hot_vcpus: Option<HotVcpus>,
    /// Memory that comes and goes, where any may.
    hot_memory: Option<HotMemory>,
    /// What it booted with.
    memory_mib: u32,
    slots: Arc<Slots>,
    hotplug: Arc<HotplugRegisters>,
    generation: Arc<GenerationId>,
    serial: Arc<SerialPort>,
    _vm: Arc<Vm>,
}

impl Machine {
    /// Stops all vCPUs where they are; returns when they have.
    pub fn pause(&self) {
        self.vcpus.pause();
    }

    /// Starts the vCPUs, or lets paused ones go on.
    pub fn resume(&self) {
        self.vcpus.resume();
    }

    /// Adds a network device; the guest is told.
    ///
    /// # Errors
    /// See `MachineError`.
    pub fn attach_net(&self, net: &Net, files: &mut Files) -> Result<(), MachineError> {
        let (name, device) = build::net_device(net, files)?;
        let slot = self.slots.plug(layout::HOTPLUG_SLOTS, name, device)?;
        self.hotplug.announce(slot);
        Ok(())
    }

    /// Adds a disk, and tells its slot; the guest is told.
    ///
    /// # Errors
    /// See `MachineError`.
    pub fn attach_block(&self, block: &Block, files: &mut Files) -> Result<u8, MachineError> {
        let (name, device) = build::block_device(block, files)?;
        let slot = self.slots.plug(layout::HOTPLUG_SLOTS, name, device)?;
        self.hotplug.announce(slot);
        Ok(slot)
    }

    /// Asks the guest to let go of network device `id`. When it has, `MachineEvents::unplugged`
    /// tells the name that is returned here.
    ///
    /// # Errors
    /// There is no such device.
    pub fn request_detach_net(&self, id: &str) -> Result<String, MachineError> {
        self.request_detach(build::net_name(id))
    }

    /// The same of disk `id`.
    ///
    /// # Errors
    /// There is no such disk, or it is one that stays.
    pub fn request_detach_block(&self, id: &str) -> Result<String, MachineError> {
        self.request_detach(build::block_name(id))
    }

    /// Tells the guest that disk `id` is larger, if its file is.
    ///
    /// # Errors
    /// There is no such disk, or it has become smaller.
    pub fn grow_block(&self, id: &str) -> Result<(), MachineError> {
        self.slots.look_again(&build::block_name(id))
    }

    fn request_detach(&self, name: String) -> Result<String, MachineError> {
        let Some(slot) = self.slots.find(&name) else {
            return Err(MachineError::Missing(name));
        };
        self.hotplug.request_eject(slot);
        Ok(name)
    }

    /// What the guest has now.
    #[must_use]
    pub fn size(&self) -> Size {
        let more = self.hot_memory.as_ref().map_or(0, HotMemory::plugged_mib);
        Size {
            vcpus: self.vcpus.count(),
            memory_mib: self.memory_mib.saturating_add(more),
        }
    }

    /// Offers the guest memory, or wants some back, for `mib` in all. What it does
    /// `MachineEvents::resized` tells.
    ///
    /// # Errors
    /// The machine can't have as much or as little.
    pub fn resize_memory(&self, mib: u32) -> Result<(), MachineError> {
        match &self.hot_memory {
            Some(memory) => memory.resize(mib),
            None => growth::check("MiB", self.memory_mib, self.memory_mib, mib),
        }
    }

    /// Plugs vCPUs, or asks the guest to let go of some, for `count` in all. What it lets go of
    /// `MachineEvents::resized` tells.
    ///
    /// # Errors
    /// The machine can't have as many or as few, or KVM refuses.
    pub fn resize_vcpus(&self, count: u8) -> Result<(), MachineError> {
        let now = self.vcpus.count().into();
        match &self.hot_vcpus {
            Some(vcpus) => vcpus.resize(count),
            None => growth::check("vCPUs", now, now, count.into()),
        }
    }

    /// Gives the machine another generation ID, and tells the guest, which then draws new random
    /// numbers: for a machine that was made of another's state.
    ///
    /// # Errors
    /// The host has no random bytes.
    pub fn renew_generation(&self) -> Result<(), MachineError> {
        self.generation.renew().map_err(MachineError::Generation)
    }

    /// Ends the vCPUs, and so the guest. Returns the last console output.
    #[must_use]
    pub fn halt(&self) -> String {
        self.vcpus.stop();
        self.serial.tail()
    }

    /// Ends the devices of a machine that was halted: they finish what they have begun, however long
    /// the host takes.
    pub fn close(self) {
        self.slots.reset();
    }

    /// Ends the vCPUs and leaves everything else to the end of the process, which must follow.
    pub fn abandon(self) {
        self.vcpus.stop();
        mem::forget(self);
    }
}
