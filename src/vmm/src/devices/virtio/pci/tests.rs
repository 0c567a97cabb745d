// SPDX-License-Identifier: Apache-2.0
//! The transport as a driver sees it: through configuration space and BARs.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::VirtioPciFunction;
use super::common::status;
use crate::devices::virtio::{
    ActivateError, Activation, DeviceType, GuestMemory, Interrupt, VirtioDevice,
};
use crate::interrupt::DoorbellAddress;
use crate::interrupt::mock::{MockController, MockDoorbells, Sent};
use crate::pci::PciFunction;

const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const MSIX: u64 = 0x4000;
const MSIX_CONTROL: u16 = 0x40 + 4 * 20 + 2;
const WINDOW: u16 = 0x40 + 4 * 20 + 12;

#[derive(Debug, Clone, Default)]
struct Seen {
    activation: Arc<Mutex<Option<Activation>>>,
    resets: Arc<AtomicUsize>,
    changed: Arc<AtomicBool>,
    refuse: bool,
}

#[derive(Debug)]
struct MockDevice(Seen);

impl VirtioDevice for MockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[128, 64]
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(offset..) {
            *byte = value as u8;
        }
    }

    fn look_again(&mut self) -> io::Result<bool> {
        Ok(self.0.changed.load(Ordering::SeqCst))
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.0.refuse {
            return Err(ActivateError::QueueCount {
                expected: 2,
                enabled: 1,
            });
        }
        *self.0.activation.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.0.resets.fetch_add(1, Ordering::SeqCst);
        *self.0.activation.lock().unwrap() = None;
    }
}

struct Driver {
    function: VirtioPciFunction,
    seen: Seen,
    bells: MockDoorbells,
    sent: Sent,
}

impl Driver {
    fn new(seen: Seen) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let controller = MockController::default();
        let bells = MockDoorbells::default();
        let function = VirtioPciFunction::new(
            "mock",
            Box::new(MockDevice(seen.clone())),
            GuestMemory::new(memory),
            (0xc000_0000, 0x1000),
            &controller,
            Arc::new(bells.clone()),
        )
        .unwrap();
        function.write_config(4, &[7, 0]);
        let sent = controller.sent;
        Self {
            function,
            seen,
            bells,
            sent,
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.write_bar(0, offset, data);
    }

    fn status(&self) -> u8 {
        let mut data = [0];
        self.function.read_bar(0, COMMON + 0x14, &mut data);
        data[0]
    }

    fn config(&self, offset: u16) -> [u8; 4] {
        let mut data = [0; 4];
        self.function.read_config(offset, &mut data);
        data
    }

    fn vector(&self, vector: u8) {
        let at = MSIX + u64::from(vector) * 16;
        self.write(at, &[0, 0x10, 0xe0, 0xfe]);
        self.write(at + 8, &[vector, 0, 0, 0]);
        self.write(at + 12, &[0; 4]);
    }

    /// A driver's way to DRIVER_OK, with queue 1 at `rings`.
    fn start(&self, rings: u64) {
        for value in [1, 3] {
            self.write(COMMON + 0x14, &[value]);
        }
        self.write(COMMON + 0x08, &[1, 0, 0, 0]);
        self.write(COMMON + 0x0c, &[1, 0, 0, 0]);
        self.write(COMMON + 0x14, &[11]);
        self.function.write_config(MSIX_CONTROL, &[0, 0x80]);
        for vector in 0..3 {
            self.vector(vector);
        }
        self.write(COMMON + 0x10, &[0, 0]);
        self.write(COMMON + 0x16, &[1, 0]);
        self.write(COMMON + 0x1a, &[2, 0]);
        for (register, at) in [
            (0x20, rings),
            (0x28, rings + 0x1000),
            (0x30, rings + 0x2000),
        ] {
            self.write(COMMON + register, &at.to_le_bytes());
        }
        self.write(COMMON + 0x1c, &[1, 0]);
        self.write(COMMON + 0x14, &[15]);
    }

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        let activation = self.seen.activation.lock().unwrap();
        Arc::clone(&activation.as_ref().unwrap().interrupt)
    }
}

#[test]
fn the_capabilities_name_all_blocks() {
    let driver = Driver::new(Seen::default());
    assert_eq!(driver.config(0), [0xf4, 0x1a, 0x42, 0x10]);
    let mut at = u16::from(driver.config(0x34)[0]);
    let mut kinds = Vec::new();
    while at != 0 {
        let [id, next, len, kind] = driver.config(at);
        kinds.push((id, if id == 9 { kind } else { 0 }));
        assert!(id != 9 || matches!(len, 16 | 20));
        at = next.into();
    }
    assert_eq!(kinds, [(9, 1), (9, 3), (9, 2), (9, 4), (0x11, 0), (9, 5)]);
}

#[test]
fn a_started_device_has_its_queues_bells_and_interrupts() {
    let driver = Driver::new(Seen::default());
    driver.start(0x1000);
    assert_eq!(driver.status(), 15);
    {
        let activation = driver.seen.activation.lock().unwrap();
        let activation = activation.as_ref().unwrap();
        assert_eq!(activation.queues.len(), 1);
        assert_eq!(activation.queues[0].index(), 1);
        assert_eq!(activation.queues[0].rings().size(), 64);
    }
    let bells = [DoorbellAddress::Port(0x1000), DoorbellAddress::Port(0x1004)];
    assert_eq!(*driver.bells.0.lock().unwrap(), bells);
    driver.interrupt().signal_queue(1).unwrap();
    assert_eq!(driver.sent.take()[0].data, 2);
    driver.interrupt().signal_queue(0).unwrap();
    driver.interrupt().signal_queue(7).unwrap();
    assert!(driver.sent.take().is_empty());
}

#[test]
fn the_queue_registers_are_frozen_while_the_device_runs() {
    let driver = Driver::new(Seen::default());
    driver.start(0x1000);
    driver.write(COMMON + 0x18, &[0, 0]);
    driver.write(COMMON + 0x20, &[0xff; 8]);
    let mut size = [0; 2];
    driver.function.read_bar(0, COMMON + 0x18, &mut size);
    assert_eq!(size, [64, 0]);
}

#[test]
fn reset_ends_the_device_and_forgets_the_set_up() {
    let driver = Driver::new(Seen::default());
    driver.start(0x1000);
    driver.write(COMMON + 0x14, &[0]);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.seen.resets.load(Ordering::SeqCst), 1);
    assert!(driver.bells.0.lock().unwrap().is_empty());
    driver.write(COMMON + 0x14, &[0]);
    assert_eq!(driver.seen.resets.load(Ordering::SeqCst), 1);
    driver.start(0x8000);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_bad_queue_or_a_device_that_refuses_needs_a_reset() {
    let driver = Driver::new(Seen::default());
    driver.start(0xf_f000);
    assert_eq!(driver.status(), 15 | status::NEEDS_RESET);
    assert!(driver.seen.activation.lock().unwrap().is_none());
    assert!(driver.bells.0.lock().unwrap().is_empty());
    driver.write(COMMON + 0x14, &[0]);
    assert_eq!(driver.status(), 0);

    let driver = Driver::new(Seen {
        refuse: true,
        ..Seen::default()
    });
    driver.start(0x1000);
    assert_eq!(driver.status(), 15 | status::NEEDS_RESET);
    assert!(driver.bells.0.lock().unwrap().is_empty());
}

#[test]
fn a_failed_device_says_so_by_a_configuration_interrupt() {
    let driver = Driver::new(Seen::default());
    driver.start(0x1000);
    driver.interrupt().device_needs_reset();
    assert_eq!(driver.sent.take()[0].data, 0);
    assert_eq!(driver.status() & status::NEEDS_RESET, status::NEEDS_RESET);
}

#[test]
fn a_device_that_finds_itself_changed_tells_a_driver_that_runs() {
    let driver = Driver::new(Seen::default());
    let changed = |changed| driver.seen.changed.store(changed, Ordering::SeqCst);
    let generation = || {
        let mut data = [0];
        driver.function.read_bar(0, COMMON + 0x15, &mut data);
        data[0]
    };
    changed(true);
    driver.function.look_again().unwrap();
    assert!(driver.sent.take().is_empty());
    driver.start(0x1000);
    changed(false);
    driver.function.look_again().unwrap();
    assert!(driver.sent.take().is_empty());
    let before = generation();
    changed(true);
    driver.function.look_again().unwrap();
    assert_eq!(driver.sent.take()[0].data, 0);
    // What was read before and after doesn't go together.
    assert_ne!(generation(), before);
}

#[test]
fn without_msix_the_isr_tells_and_clears() {
    let driver = Driver::new(Seen::default());
    driver.start(0x1000);
    driver.function.write_config(MSIX_CONTROL, &[0, 0]);
    driver.interrupt().signal_queue(1).unwrap();
    assert!(driver.sent.take().is_empty());
    let mut isr = [0];
    driver.function.read_bar(0, ISR, &mut isr);
    assert_eq!(isr, [1]);
    driver.function.read_bar(0, ISR, &mut isr);
    assert_eq!(isr, [0]);
}

#[test]
fn the_doorbells_follow_the_bar() {
    let driver = Driver::new(Seen::default());
    driver.start(0x1000);
    driver
        .function
        .write_config(0x14, &0x2000_u32.to_le_bytes());
    let bells = [DoorbellAddress::Port(0x2000), DoorbellAddress::Port(0x2004)];
    assert_eq!(*driver.bells.0.lock().unwrap(), bells);
    driver
        .function
        .write_config(0x14, &0xffff_ffff_u32.to_le_bytes());
    driver.function.write_config(4, &[0, 0]);
    assert!(driver.bells.0.lock().unwrap().is_empty());
}

#[test]
fn the_configuration_window_reaches_the_registers() {
    let driver = Driver::new(Seen::default());
    driver.function.write_config(WINDOW + 4, &[0]);
    driver
        .function
        .write_config(WINDOW + 8, &0x2004_u32.to_le_bytes());
    driver
        .function
        .write_config(WINDOW + 12, &4_u32.to_le_bytes());
    assert_eq!(driver.config(WINDOW + 16), [4, 5, 6, 7]);
    driver
        .function
        .write_config(WINDOW + 8, &0x14_u32.to_le_bytes());
    driver
        .function
        .write_config(WINDOW + 12, &1_u32.to_le_bytes());
    driver.function.write_config(WINDOW + 16, &[1]);
    assert_eq!(driver.status(), 1);
}

#[test]
fn odd_accesses_do_no_harm() {
    let driver = Driver::new(Seen::default());
    for offset in [
        0,
        0x37,
        0xfff,
        DEVICE - 1,
        DEVICE,
        0x3fff,
        0x5fff,
        0x7fff,
        u64::MAX,
    ] {
        for len in 0..=8 {
            driver.write(offset, &[0xff; 8][..len]);
            driver.function.read_bar(0, offset, &mut [0; 8][..len]);
            driver.function.write_bar(1, offset, &[0xff; 8][..len]);
            driver.function.read_bar(5, offset, &mut [0; 8][..len]);
        }
    }
    for offset in 0..=u16::MAX {
        driver.function.write_config(offset, &[0xff; 4]);
        driver.config(offset);
    }
}
