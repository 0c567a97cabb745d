// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, made of a fuzzer's bytes: accesses to a function's configuration space and registers, with
//! those of a driver that starts the device among them.

#![expect(clippy::expect_used, reason = "a fuzzer that can't go on should stop")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::VirtioPciFunction;
use super::function::{COMMON, DEVICE, ISR, MSIX_PENDING, MSIX_TABLE};
use crate::devices::virtio::fuzz_input::Input;
use crate::devices::virtio::{
    ActivateError, Activation, DeviceType, GuestMemory, Interrupt, VirtioDevice,
};
use crate::interrupt::mock::{MockController, MockDoorbells};
use crate::pci::PciFunction;

const QUEUES: usize = 2;
/// Bytes of an access, as KVM hands them over.
const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// Where the registers are that do something, and how many bytes of each block.
const BLOCKS: [(u64, u64); 5] = [
    (COMMON.start, 0x40),
    (ISR.start, 1),
    (DEVICE.start, 16),
    (MSIX_TABLE.start, 64),
    (MSIX_PENDING.start, 8),
];

/// A device that keeps what it was started with.
#[derive(Debug, Default)]
struct Idle(Arc<Mutex<Option<Activation>>>);

impl VirtioDevice for Idle {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256; QUEUES]
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(offset..) {
            *byte = value.to_le_bytes().into_iter().next().unwrap_or_default();
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut started = lock(&self.0);
        assert!(started.is_none(), "started twice");
        *started = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        *lock(&self.0) = None;
    }
}

impl Input<'_> {
    fn width(&mut self) -> usize {
        let choice = usize::from(self.byte()) % WIDTHS.len();
        WIDTHS.get(choice).copied().unwrap_or(1)
    }

    /// Data of an access, mostly of small numbers.
    fn data(&mut self) -> Vec<u8> {
        let width = self.width();
        let mut data = vec![0; width];
        let small = self.byte() != 0;
        for (at, byte) in data.iter_mut().enumerate() {
            if at < 2 || !small {
                *byte = self.byte();
            }
        }
        data
    }

    /// An offset in the memory BAR, mostly of a register that there is.
    fn register(&mut self) -> u64 {
        let choice = self.byte();
        if choice == 0 {
            return self.word().into();
        }
        let (start, len) = BLOCKS
            .get(usize::from(choice) % BLOCKS.len())
            .copied()
            .unwrap_or_default();
        start + u64::from(self.byte()) % len
    }
}

/// What a driver does to start the device with both queues (section 3.1.1), its vectors unmasked.
fn start(function: &VirtioPciFunction, vector: u8) {
    let write = |offset, data: &[u8]| function.write_bar(0, offset, data);
    write(0x14, &[1]);
    write(0x14, &[3]);
    write(0x08, &1_u32.to_le_bytes());
    write(0x0c, &1_u32.to_le_bytes());
    write(0x14, &[11]);
    for queue in 0..u8::try_from(QUEUES).unwrap_or_default() {
        write(0x16, &[queue, 0]);
        write(0x1a, &[vector, 0]);
        for (register, page) in [(0x20, 0x10_u8), (0x28, 0x20), (0x30, 0x30)] {
            write(register, &[0, page, queue, 0, 0, 0, 0, 0]);
        }
        write(0x1c, &[1, 0]);
    }
    write(0x14, &[15]);
}

/// Does what `bytes` say, until they are used up.
pub fn guest_accesses(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("memory");
    let device = Idle::default();
    let started = Arc::clone(&device.0);
    let bells = MockDoorbells::default();
    let controller = MockController::default();
    let function = VirtioPciFunction::new(
        "fuzzed",
        Box::new(device),
        GuestMemory::new(memory),
        (0xc000_0000, 0x1000),
        &controller,
        Arc::new(bells.clone()),
    )
    .expect("a function");
    while !input.is_empty() {
        let mut answer = [0; 8];
        match input.byte() % 16 {
            0 => start(&function, input.byte() % 5),
            1 => function.write_bar(0, 0x14, &[0]),
            2 | 3 => {
                let at = u16::from(input.byte()) | u16::from(input.byte() % 17) << 8;
                function.write_config(at, &input.data());
            }
            4 => {
                let answer = answer.get_mut(..input.width()).unwrap_or_default();
                function.read_config(input.byte().into(), answer);
            }
            5 => {
                let answer = answer.get_mut(..input.width()).unwrap_or_default();
                function.read_bar(usize::from(input.byte() % 7), input.register(), answer);
            }
            6 => function.write_bar(1, input.byte().into(), &input.data()),
            7 => {
                if let Some(activation) = &*lock(&started) {
                    signal(&activation.interrupt, input.byte());
                }
            }
            _ => function.write_bar(0, input.register(), &input.data()),
        }
        let attached = lock(&bells.0);
        let active = lock(&started).is_some();
        assert!(
            attached.is_empty() || active && attached.len() == QUEUES,
            "doorbells of a device that does not run"
        );
    }
    drop(function);
    assert!(lock(&bells.0).is_empty(), "doorbells outlive their device");
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device's side; where an interrupt can't be sent is the host's affair.
fn signal(interrupt: &Arc<dyn Interrupt>, choice: u8) {
    let _ = match choice % 4 {
        0 => interrupt.signal_config(),
        1 => interrupt.signal_queue(choice.into()),
        queue => interrupt.signal_queue(u16::from(queue) - 2),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::fuzz_input::feed;

    #[test]
    fn random_guests_do_no_harm() {
        feed(500, guest_accesses);
    }
}
