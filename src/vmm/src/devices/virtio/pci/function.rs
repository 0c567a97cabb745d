// SPDX-License-Identifier: Apache-2.0
//! A virtio device as a PCI function: configuration space, the register blocks behind its BARs,
//! doorbells, and the device's life between reset and DRIVER_OK.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::common::{BadQueue, CommonConfig, Effect};
use super::signal::Signal;
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, GuestMemory, Interrupt, VirtioDevice,
};
use crate::interrupt::{DoorbellAddress, Doorbells, MsiController};
use crate::pci::{Bar, BarKind, BarRange, ConfigSpace, Identity, Msix, PciFunction, touches};

/// Vendor of all virtio devices, and the number modern device IDs start from (section 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// PCI capability IDs.
const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 0x09;

/// Types of virtio's capabilities (section 4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Base address registers: register blocks in memory, doorbells in ports.
const REGISTERS: usize = 0;
const BELLS: usize = 1;

/// Register blocks in the memory BAR, one to a page.
pub(super) const COMMON: Range<u64> = 0x0000..0x1000;
pub(super) const ISR: Range<u64> = 0x1000..0x2000;
pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
pub(super) const MSIX_TABLE: Range<u64> = 0x4000..0x5000;
pub(super) const MSIX_PENDING: Range<u64> = 0x5000..0x6000;

/// Bytes from one queue's doorbell to the next.
const BELL_STRIDE: u8 = 4;

#[derive(Debug)]
struct State {
    config: ConfigSpace,
    common: CommonConfig,
    device: Box<dyn VirtioDevice>,
    /// One for each queue, for the life of the function.
    kicks: Vec<EventFd>,
    /// Doorbells that are attached now, by queue index.
    attached: Vec<(u16, DoorbellAddress)>,
    /// Between activation and reset.
    active: bool,
}

/// A virtio device on the PCI bus.
#[derive(Debug)]
pub struct VirtioPciFunction {
    name: String,
    memory: GuestMemory,
    doorbells: Arc<dyn Doorbells>,
    msix: Arc<Msix>,
    msix_at: u16,
    window_at: u16,
    signal: Arc<Signal>,
    state: Mutex<State>,
}

impl VirtioPciFunction {
    /// Bytes of memory and of ports that a function's BARs take.
    pub const MEMORY_SIZE: u32 = 0x8000;
    /// See `MEMORY_SIZE`.
    pub const PORTS_SIZE: u32 = 64;
    /// As many doorbells as the ports have room for.
    const MAX_QUEUES: u32 = Self::PORTS_SIZE / 4;

    /// Puts `device`, called `name` in logs, behind BARs at `registers` (memory) and `bells`
    /// (ports), which are multiples of the sizes above.
    ///
    /// # Errors
    /// The kernel gives no event descriptors or interrupt sources, or the device has too many
    /// queues.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        bars: (u32, u32),
        controller: &dyn MsiController,
        doorbells: Arc<dyn Doorbells>,
    ) -> io::Result<Self> {
        let sizes = device.queue_max_sizes();
        let queues = u16::try_from(sizes.len()).unwrap_or(u16::MAX);
        if u32::from(queues) > Self::MAX_QUEUES {
            return Err(io::Error::other("a virtio device has too many queues"));
        }
        // One vector for each queue and one for configuration changes.
        let vectors = queues.saturating_add(1);
        let msix = Arc::new(Msix::new(vectors, controller)?);
        let mut kicks = Vec::with_capacity(sizes.len());
        for _ in sizes {
            kicks.push(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        }
        let signal = Arc::new(Signal::new(Arc::clone(&msix), sizes.len()));
        let common = CommonConfig::new(device.features(), sizes, vectors);
        let Some((config, msix_at, window_at)) =
            configuration(device.device_type(), bars, &msix, queues)
        else {
            return Err(io::Error::other("capabilities don't fit"));
        };
        Ok(Self {
            name: name.to_owned(),
            memory,
            doorbells,
            msix,
            msix_at,
            window_at,
            signal,
            state: Mutex::new(State {
                config,
                common,
                device,
                kicks,
                attached: Vec::new(),
                active: false,
            }),
        })
    }

    /// Resets the device: its worker has ended when this returns.
    pub fn reset(&self) {
        self.reset_locked(&mut self.lock());
    }

    /// Has the device look again at what it stands for, and tells the driver if that has changed it.
    ///
    /// # Errors
    /// See `VirtioDevice::look_again`, or the driver can't be told.
    pub fn look_again(&self) -> io::Result<()> {
        let mut state = self.lock();
        if state.device.look_again()? && state.active {
            self.signal.signal_config()?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset_locked(&self, state: &mut State) {
        self.detach(state);
        if state.active {
            state.device.reset();
            state.active = false;
        }
        state.common.reset();
        self.signal.reset();
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        let before = self.signal.status();
        let mut status = before;
        let effect = state.common.write(offset, data, &mut status);
        self.signal.raise_status(status & !before);
        match effect {
            Effect::None => {}
            Effect::Reset => self.reset_locked(state),
            Effect::Activate => {
                if let Err(error) = self.activate(state) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(device = self.name, error, "can't start the device");
                    self.detach(state);
                    self.signal.device_needs_reset();
                }
            }
        }
    }

    fn activate(&self, state: &mut State) -> Result<(), StartError> {
        let memory = self.memory.memory();
        let mut queues = Vec::new();
        for (index, queue) in state.common.queues(&memory)? {
            let kick = state.kicks.get(usize::from(index)).map(EventFd::try_clone);
            let kick = kick.ok_or(BadQueue(index))?.map_err(StartError::Host)?;
            // A kick from before the last reset means nothing to this life of the device.
            let _ = kick.read();
            queues.push(ActiveQueue::new(index, queue, kick));
        }
        let config_vector = state.common.config_vector();
        self.signal
            .set_vectors(config_vector, state.common.queue_vectors());
        self.attach(state).map_err(StartError::Host)?;
        let activation = Activation {
            memory: self.memory.clone(),
            features: state.common.features(),
            queues,
            interrupt: Arc::clone(&self.signal) as Arc<dyn Interrupt>,
        };
        state.device.activate(activation)?;
        state.active = true;
        Ok(())
    }

    /// Has the kernel watch the doorbells where the BAR is now.
    fn attach(&self, state: &mut State) -> io::Result<()> {
        let ranges = state.config.decoded();
        let Some(bells) = ranges.iter().find(|range| range.index == BELLS) else {
            return Ok(());
        };
        for (index, kick) in (0_u16..).zip(&state.kicks) {
            let offset = u32::from(index).saturating_mul(BELL_STRIDE.into());
            let Ok(port) = u16::try_from(bells.bar.base.saturating_add(offset)) else {
                return Err(io::Error::other("the doorbells lie above the last port"));
            };
            let address = DoorbellAddress::Port(port);
            self.doorbells.attach(address, kick)?;
            state.attached.push((index, address));
        }
        Ok(())
    }

    fn detach(&self, state: &mut State) {
        for (index, address) in state.attached.drain(..) {
            let Some(kick) = state.kicks.get(usize::from(index)) else {
                continue;
            };
            if let Err(error) = self.doorbells.detach(address, kick) {
                tracing::warn!(device = self.name, %error, "can't detach a doorbell");
            }
        }
    }

    fn write_registers(&self, state: &mut State, offset: u64, data: &[u8]) {
        if COMMON.contains(&offset) {
            self.write_common(state, offset, data);
        } else if DEVICE.contains(&offset) {
            let offset = offset.saturating_sub(DEVICE.start);
            state.device.write_config(offset, data);
        } else if MSIX_TABLE.contains(&offset) {
            self.msix
                .write_table(offset.saturating_sub(MSIX_TABLE.start), data);
        }
    }

    fn read_registers(&self, state: &State, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if COMMON.contains(&offset) {
            let (status, generation) = (self.signal.status(), self.signal.generation());
            state.common.read(offset, data, status, generation);
        } else if ISR.start == offset {
            if let Some(byte) = data.first_mut() {
                *byte = self.signal.take_isr();
            }
        } else if DEVICE.contains(&offset) {
            let offset = offset.saturating_sub(DEVICE.start);
            state.device.read_config(offset, data);
        } else if MSIX_TABLE.contains(&offset) {
            let offset = offset.saturating_sub(MSIX_TABLE.start);
            self.msix.read_table(offset, data);
        } else if MSIX_PENDING.contains(&offset) {
            let offset = offset.saturating_sub(MSIX_PENDING.start);
            self.msix.read_pending(offset, data);
        }
    }

    /// The access that the PCI configuration access capability describes (section 4.1.4.9), when
    /// `offset` names its data field.
    fn window(&self, state: &State, offset: u16, len: usize) -> Option<(u64, usize)> {
        let data = self.window_at.saturating_add(16);
        let target = state.config.u32_at(self.window_at.saturating_add(8));
        let length = usize::try_from(state.config.u32_at(self.window_at.saturating_add(12)));
        let length = length.ok().filter(|length| matches!(length, 1 | 2 | 4))?;
        let bar = state.config.u16_at(self.window_at.saturating_add(4)) & 0xff;
        let hit = offset == data && len >= length && usize::from(bar) == REGISTERS;
        hit.then_some((target.into(), length))
    }
}

impl PciFunction for VirtioPciFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        state.config.read(offset, data);
        if let Some((target, length)) = self.window(&state, offset, data.len())
            && let Some(data) = data.get_mut(..length)
        {
            self.read_registers(&state, target, data);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let state = &mut *self.lock();
        let before = state.config.decoded();
        state.config.write(offset, data);
        if let Some((target, length)) = self.window(state, offset, data.len())
            && let Some(data) = data.get(..length)
        {
            self.write_registers(state, target, data);
        }
        let control_at = self.msix_at.saturating_add(2);
        if touches(offset, data.len(), control_at..control_at.saturating_add(2)) {
            self.msix.set_control(state.config.u16_at(control_at));
        }
        if state.active && state.config.decoded() != before {
            self.detach(state);
            if let Err(error) = self.attach(state) {
                tracing::warn!(device = self.name, %error, "can't move the doorbells");
                self.signal.device_needs_reset();
            }
        }
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.lock().config.decoded()
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar == REGISTERS {
            self.read_registers(&self.lock(), offset, data);
        } else {
            data.fill(0);
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        let state = &mut *self.lock();
        if bar == REGISTERS {
            self.write_registers(state, offset, data);
        } else if state.active {
            // Only in the moment between DRIVER_OK and the doorbell's own event.
            let queue = usize::try_from(offset >> BELL_STRIDE.trailing_zeros()).ok();
            if let Some(kick) = queue.and_then(|queue| state.kicks.get(queue)) {
                let _ = kick.write(1);
            }
        }
    }
}

impl Drop for VirtioPciFunction {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("the driver set up a bad queue")]
    Queue(#[from] BadQueue),
    #[error("can't set up doorbells")]
    Host(#[source] io::Error),
    #[error("the device refused")]
    Device(#[from] ActivateError),
}

/// The configuration space, and where in it MSI-X and the access window are.
fn configuration(
    device_type: DeviceType,
    (registers, bells): (u32, u32),
    msix: &Msix,
    queues: u16,
) -> Option<(ConfigSpace, u16, u16)> {
    let device = DEVICE_BASE.checked_add(device_type as u16)?;
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device,
        // Revision 1 and up: no legacy interface (section 4.1.2.1).
        revision: 1,
        class: class(device_type),
        subsystem_vendor: VENDOR,
        subsystem: device,
    });
    config.set_bar(
        REGISTERS,
        Bar {
            kind: BarKind::Memory,
            base: registers,
            size: VirtioPciFunction::MEMORY_SIZE,
        },
    );
    config.set_bar(
        BELLS,
        Bar {
            kind: BarKind::Io,
            base: bells,
            size: VirtioPciFunction::PORTS_SIZE,
        },
    );
    // Drivers walk the list for each type in turn: in the order of their questions it is short.
    let block =
        |kind, bar: usize, start: u64, len: u32, more: u32| capability(kind, bar, start, len, more);
    let page = 0x1000;
    config.add_capability(
        CAP_VENDOR,
        &block(COMMON_CFG, REGISTERS, COMMON.start, 0x38, 0)?,
        &[],
    )?;
    config.add_capability(
        CAP_VENDOR,
        &block(ISR_CFG, REGISTERS, ISR.start, 1, 0)?,
        &[],
    )?;
    let bells = u32::from(queues).checked_mul(BELL_STRIDE.into())?;
    let notify = block(NOTIFY_CFG, BELLS, 0, bells, BELL_STRIDE.into())?;
    config.add_capability(CAP_VENDOR, &notify, &[])?;
    config.add_capability(
        CAP_VENDOR,
        &block(DEVICE_CFG, REGISTERS, DEVICE.start, page, 0)?,
        &[],
    )?;
    let table = u32::try_from(MSIX_TABLE.start).ok()?;
    let pending = u32::try_from(MSIX_PENDING.start).ok()?;
    let (body, writable) = msix.capability(u8::try_from(REGISTERS).ok()?, table, pending);
    let msix_at = config.add_capability(CAP_MSIX, &body, &writable)?;
    // Its BAR, offset, length and data are the driver's to write.
    let mut writable = [0xff; 18];
    for fixed in [0, 1, 3, 4, 5] {
        if let Some(byte) = writable.get_mut(fixed) {
            *byte = 0;
        }
    }
    let mut window = [0; 18];
    let fields = block(PCI_CFG, REGISTERS, 0, 0, 0)?;
    for (byte, value) in window.iter_mut().zip(fields.iter().take(14)) {
        *byte = *value;
    }
    if let Some(length) = window.first_mut() {
        *length = 20;
    }
    let window_at = config.add_capability(CAP_VENDOR, &window, &writable)?;
    Some((config, msix_at, window_at))
}

/// `struct virtio_pci_cap` after the ID and link: length, type, BAR, ID, padding, offset, length;
/// the notify capability's multiplier follows, zero elsewhere.
fn capability(kind: u8, bar: usize, start: u64, len: u32, more: u32) -> Option<[u8; 18]> {
    let mut body = [0; 18];
    let bar = u8::try_from(bar).ok()?;
    let size = if kind == NOTIFY_CFG { 20 } else { 16 };
    let head = [size, kind, bar, 0, 0, 0];
    let start = u32::try_from(start).ok()?.to_le_bytes();
    let (len, more) = (len.to_le_bytes(), more.to_le_bytes());
    let fields = head.iter().chain(&start).chain(&len).chain(&more);
    for (byte, value) in body.iter_mut().zip(fields) {
        *byte = *value;
    }
    Some(body)
}

/// PCI class codes; what fits no class is "unclassified" (0xff).
fn class(device_type: DeviceType) -> u32 {
    match device_type {
        DeviceType::Net => 0x02_00_00,
        DeviceType::Block | DeviceType::Fs => 0x01_80_00,
        DeviceType::Vsock => 0x07_80_00,
        DeviceType::Mem | DeviceType::Balloon => 0x05_80_00,
        DeviceType::Rng => 0xff_00_00,
    }
}
