// SPDX-License-Identifier: Apache-2.0
//! Builds a machine, in the order that KVM wants: VM and interrupt controller, memory, vCPUs,
//! then what they find.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use fuse_server::{Cache, Options};
use vm_memory::GuestMemoryMmap;

use super::growth::{HotMemory, HotVcpus};
use super::slots::{self, Slots};
use super::vcpu::{Buses, Vcpus};
use super::{Machine, MachineError, MachineEvents};
use crate::arch::x86_64::acpi::Tables;
use crate::arch::x86_64::kernel::Kernel;
use crate::arch::x86_64::vcpu::CpuModel;
use crate::arch::x86_64::{layout, pvh};
use crate::bus::{Bus, BusDevice};
use crate::control::{
    Block, Boot, Console, ExitReason, FileIndex, FsCache, Milestone, Net, VmConfig,
};
use crate::devices::virtio::balloon::BalloonDevice;
use crate::devices::virtio::block::BlockDevice;
use crate::devices::virtio::fs::{Fs, FsConfig, open_file_quota};
use crate::devices::virtio::net::{NetConfig, NetDevice};
use crate::devices::virtio::rng::RngDevice;
use crate::devices::virtio::vsock::{ConnectionSink, Vsock};
use crate::devices::virtio::{GuestMemory, VirtioDevice};
use crate::devices::{
    GenerationId, GuestEvents, HotplugRegisters, IoApic, PowerPorts, ProgressPort, PvPanic,
    SerialPort,
};
use crate::kvm::{MAX_VCPUS, Vm, VmError};
use crate::memory;
use crate::pci::{BarKind, PciBus};

/// A Linux kernel does not get far with less.
const MINIMUM_MIB: u32 = 32;

/// The files that came with a message, each to be taken once.
#[derive(Debug)]
pub struct Files(Vec<Option<OwnedFd>>);

impl Files {
    /// Files in the message's order.
    #[must_use]
    pub fn new(files: Vec<OwnedFd>) -> Self {
        Self(files.into_iter().map(Some).collect())
    }

    fn take(&mut self, index: FileIndex) -> Result<OwnedFd, MachineError> {
        let slot = usize::try_from(index.0).ok();
        let slot = slot.and_then(|slot| self.0.get_mut(slot));
        slot.and_then(Option::take)
            .ok_or(MachineError::File(index.0))
    }
}

impl Machine {
    /// Builds the machine that `config` describes; its vCPUs wait for `resume`.
    ///
    /// # Errors
    /// See `MachineError`.
    pub fn build(
        config: &VmConfig,
        files: &mut Files,
        events: &Arc<dyn MachineEvents>,
    ) -> Result<Self, MachineError> {
        let memory_mib = config.memory_mib;
        if memory_mib < MINIMUM_MIB {
            let minimum_mib = MINIMUM_MIB;
            return Err(MachineError::MemorySize {
                minimum_mib,
                memory_mib,
            });
        }
        let most_vcpus = config.most_vcpus.max(config.vcpus);
        for count in [config.vcpus, most_vcpus] {
            if !(1..=MAX_VCPUS).contains(&count) {
                return Err(VmError::VcpuCount(count).into());
            }
        }
        let vm = Arc::new(Vm::new(files.take(config.kvm)?)?);
        let bytes = u64::from(memory_mib) << 20;
        let growth = layout::growth(bytes, u64::from(config.most_memory_mib) << 20);
        let mut ranges = layout::memory_ranges(bytes);
        // Mapped as a whole; it costs nothing until the guest takes of it.
        ranges.extend(growth.clone());
        let memory = memory::allocate(&ranges)?;
        vm.add_memory(&memory)?;
        let mut vcpus = Vec::new();
        for id in 0..config.vcpus {
            vcpus.push(vm.create_vcpu(id)?);
        }
        events.milestone(Milestone::VmCreated);

        let entry = load(&config.boot, files, config, &memory)?;
        events.milestone(Milestone::KernelLoaded);
        let model = CpuModel::new(vm.kvm(), most_vcpus).map_err(MachineError::CpuModel)?;
        for (id, vcpu) in (0..).zip(&vcpus) {
            model.set_up(vcpu, id, (id == 0).then_some(entry))?;
        }

        let memory = GuestMemory::new(memory);
        let ram = memory.clone();
        let devices = devices(config, files, events)?;
        let slots = Slots::new(memory, vm.interrupts(), vm.doorbells(), Arc::clone(events));
        for (name, device) in devices {
            slots.plug(slots::FIXED, name, device)?;
        }
        let hot_memory = match growth {
            Some(range) => {
                let sizes = (memory_mib, config.most_memory_mib);
                Some(HotMemory::plug(&range, sizes, &slots, events)?)
            }
            None => None,
        };
        // All of these may be unplugged.
        for net in &config.nets {
            let (name, device) = net_device(net, files)?;
            slots.plug(layout::HOTPLUG_SLOTS, name, device)?;
        }
        let slots = Arc::new(slots);
        let io_apic = IoApic::new(layout::IO_APIC_PINS, &*vm.interrupts());
        let io_apic = Arc::new(io_apic.map_err(MachineError::Interrupt)?);
        let line = io_apic.line(layout::HOTPLUG_PIN.into());
        let hotplug = Arc::new(HotplugRegisters::new(line, Arc::clone(&slots) as _));
        let serial = match config.console {
            Console::Quiet => SerialPort::new(None),
            Console::File(file) => SerialPort::new(Some(File::from(files.take(file)?))),
        };
        let serial = Arc::new(serial);
        let mut buses = buses(slots.bus(), &serial, events)?;
        let (start, size) = (layout::IO_APIC.into(), IoApic::SIZE);
        let range = start..size.saturating_add(start);
        buses.memory.insert(range, Arc::clone(&io_apic) as _)?;
        let start = u64::from(layout::HOTPLUG_PORT);
        let range = start..start.saturating_add(HotplugRegisters::SIZE.into());
        buses.ports.insert(range, Arc::clone(&hotplug) as _)?;
        let line = io_apic.line(layout::HOTPLUG_PIN.into());
        let generation = GenerationId::new(ram, layout::GENERATION_ID, line);
        let generation = Arc::new(generation.map_err(MachineError::Generation)?);
        let start = u64::from(layout::GENERATION_PORT);
        let range = start..start.saturating_add(GenerationId::SIZE.into());
        buses.ports.insert(range, Arc::clone(&generation) as _)?;
        let all = Arc::new(Vcpus::new(events).map_err(MachineError::Thread)?);
        let hot_vcpus = if most_vcpus > config.vcpus {
            let range = config.vcpus..most_vcpus;
            let line = io_apic.line(layout::HOTPLUG_PIN.into());
            let (hot, registers) = HotVcpus::new(range, &all, &vm, model, line);
            let start = u64::from(layout::CPU_HOTPLUG_PORT);
            let range = start..start.saturating_add(HotplugRegisters::SIZE.into());
            buses.ports.insert(range, registers)?;
            Some(hot)
        } else {
            None
        };
        all.spawn(vcpus, buses).map_err(MachineError::Thread)?;
        Ok(Self {
            vcpus: all,
            hot_vcpus,
            hot_memory,
            memory_mib,
            slots,
            hotplug,
            generation,
            serial,
            _vm: vm,
        })
    }
}

/// Puts kernel, boot information and tables in memory; returns the entry point.
fn load(
    boot: &Boot,
    files: &mut Files,
    config: &VmConfig,
    memory: &GuestMemoryMmap,
) -> Result<u32, MachineError> {
    let bytes = u64::from(config.memory_mib) << 20;
    let file = File::from(files.take(boot.kernel)?);
    let low = bytes.min(layout::LOW_RAM_END);
    let kernel = Kernel::parse(|offset, buffer| file.read_exact_at(buffer, offset), low)?;
    for segment in &kernel.segments {
        let (offset, size) = (segment.file_offset, segment.file_size);
        memory::place(memory, &file, offset, size, segment.address)?;
    }
    let tables = Tables {
        vcpus: config.vcpus,
        most_vcpus: config.most_vcpus,
        serial: matches!(config.console, Console::File(_)),
    };
    let rsdp = tables.write(memory).map_err(MachineError::Acpi)?;
    pvh::write_start_info(memory, bytes, &boot.cmdline, rsdp)?;
    Ok(kernel.entry)
}

/// A device and its name in logs and errors.
pub(super) type Named = (String, Box<dyn VirtioDevice>);

fn cache(policy: FsCache) -> Cache {
    match policy {
        FsCache::Never => Cache::Never,
        FsCache::Auto => Cache::Auto,
        FsCache::Always => Cache::Always,
    }
}

/// The virtio devices in slot order.
fn devices(
    config: &VmConfig,
    files: &mut Files,
    events: &Arc<dyn MachineEvents>,
) -> Result<Vec<Named>, MachineError> {
    let mut devices: Vec<Named> = Vec::new();
    for block in &config.blocks {
        devices.push(block_device(block, files)?);
    }
    let quota = open_file_quota(config.filesystems.len(), config.most_memory_mib);
    for filesystem in &config.filesystems {
        let device = Fs::new(FsConfig {
            tag: filesystem.tag.clone(),
            root: files.take(filesystem.directory)?,
            options: Options {
                read_only: filesystem.read_only,
                cache: cache(filesystem.cache),
                cache_below: filesystem
                    .cache_below
                    .iter()
                    .map(|(folder, below)| (PathBuf::from(folder), cache(*below)))
                    .collect(),
                writeback: true,
                max_open_files: quota,
                ..Options::default()
            },
        })?;
        devices.push((format!("fs {}", filesystem.tag), Box::new(device)));
    }
    if let Some(vsock) = &config.vsock {
        let sink = Arc::new(Sink(Arc::clone(events)));
        let device = Vsock::new(vsock.cid, files.take(vsock.listener)?, sink);
        devices.push(("vsock".to_owned(), Box::new(device)));
    }
    if config.rng {
        devices.push(("rng".to_owned(), Box::new(RngDevice::new())));
    }
    if config.balloon {
        devices.push(("balloon".to_owned(), Box::new(BalloonDevice::new())));
    }
    Ok(devices)
}

/// A disk with its name.
pub(super) fn block_device(block: &Block, files: &mut Files) -> Result<Named, MachineError> {
    let file = File::from(files.take(block.file)?);
    let device = BlockDevice::new(&block.id, file, block.read_only, block.queues);
    let mut device = device.map_err(|source| MachineError::Block {
        id: block.id.clone(),
        source,
    })?;
    device.limit(block.limits.bytes, block.limits.operations);
    if block.io_uring {
        device.use_io_uring();
    }
    Ok((block_name(&block.id), Box::new(device)))
}

/// The name of disk `id` among all devices.
pub(super) fn block_name(id: &str) -> String {
    format!("block {id}")
}

/// A network device with its name.
pub(super) fn net_device(net: &Net, files: &mut Files) -> Result<Named, MachineError> {
    let mut take = |indices: &[FileIndex]| -> Result<Vec<OwnedFd>, MachineError> {
        indices.iter().map(|index| files.take(*index)).collect()
    };
    let config = NetConfig {
        id: net.id.clone(),
        mac: net.mac,
        mtu: net.mtu,
        taps: take(&net.queues)?,
        vhost: take(&net.vhost)?,
        receive: net.receive,
        transmit: net.transmit,
    };
    let device = NetDevice::new(config).map_err(|source| MachineError::Net {
        id: net.id.clone(),
        source,
    })?;
    Ok((net_name(&net.id), Box::new(device)))
}

/// The name of network device `id` among all devices.
pub(super) fn net_name(id: &str) -> String {
    format!("net {id}")
}

fn buses(
    pci: &Arc<PciBus>,
    serial: &Arc<SerialPort>,
    events: &Arc<dyn MachineEvents>,
) -> Result<Buses, MachineError> {
    let mut memory = Bus::default();
    let window = |kind, base| -> Arc<dyn BusDevice> {
        let pci = Arc::clone(pci);
        Arc::new(Window { pci, kind, base })
    };
    let range = layout::PCI_MEMORY;
    let start = range.start;
    memory.insert(range, window(BarKind::Memory, start))?;
    memory.insert(layout::ECAM, Arc::new(Ecam(Arc::clone(pci))))?;

    let events: Arc<dyn GuestEvents> = Arc::new(Guest(Arc::clone(events)));
    let power = PowerPorts::new(
        Arc::clone(&events),
        layout::SLEEP_TYPE_S5,
        layout::RESET_VALUE,
    );
    let progress = ProgressPort::new(Arc::clone(&events));
    let mut ports = Bus::default();
    let mut insert = |start: u16, size: u16, device| {
        let start = u64::from(start);
        ports.insert(start..start.saturating_add(size.into()), device)
    };
    insert(layout::PROGRESS_PORT, 1, Arc::new(progress))?;
    let size = layout::SERIAL_PORTS.len().try_into().unwrap_or_default();
    insert(
        layout::SERIAL_PORTS.start,
        size,
        Arc::clone(serial) as Arc<dyn BusDevice>,
    )?;
    insert(layout::PVPANIC_PORT, 1, Arc::new(PvPanic::new(events)))?;
    insert(
        layout::SLEEP_CONTROL_PORT,
        PowerPorts::SIZE,
        Arc::new(power),
    )?;
    let range = layout::PCI_PORTS;
    let size = range.len().try_into().unwrap_or_default();
    insert(range.start, size, window(BarKind::Io, range.start.into()))?;
    Ok(Buses { memory, ports })
}

/// The configuration space of PCI bus 0.
#[derive(Debug)]
struct Ecam(Arc<PciBus>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_ecam(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_ecam(offset, data);
    }
}

/// Addresses in which PCI functions have their BARs.
#[derive(Debug)]
struct Window {
    pci: Arc<PciBus>,
    kind: BarKind,
    base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = self.base.saturating_add(offset);
        self.pci.read(self.kind, address, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let address = self.base.saturating_add(offset);
        self.pci.write(self.kind, address, data);
    }
}

/// The machine's events as the devices know them.
#[derive(Debug)]
struct Guest(Arc<dyn MachineEvents>);

impl GuestEvents for Guest {
    fn progress(&self, code: u8) {
        self.0.progress(code);
    }

    fn ended(&self, reason: ExitReason) {
        self.0.ended(reason);
    }
}

/// The same for the socket device.
#[derive(Debug)]
struct Sink(Arc<dyn MachineEvents>);

impl ConnectionSink for Sink {
    fn connect(&self, port: u32, stream: OwnedFd) -> std::io::Result<()> {
        self.0.connection(port, stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_taken_once() {
        let file = tempfile::tempfile().unwrap();
        let mut files = Files::new(vec![file.into()]);
        assert!(matches!(
            files.take(FileIndex(1)),
            Err(MachineError::File(1))
        ));
        files.take(FileIndex(0)).unwrap();
        assert!(matches!(
            files.take(FileIndex(0)),
            Err(MachineError::File(0))
        ));
    }
}
