// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, made of a fuzzer's bytes: buffers that are mostly right and sometimes not, on
//! all kinds of queues, against a socket in the tap's place.

#![expect(clippy::expect_used, reason = "a fuzzer that can't go on should stop")]

use std::fs::File;
use std::io::{Read, Write};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::control;
use super::receive::Receiver;
use super::transmit::Transmitter;
use crate::devices::virtio::fuzz_input::Input;
use crate::devices::virtio::test_ring::{NEXT, NoInterrupt, Ring, WRITE};

const MEMORY: usize = 0x10_0000;
const SIZE: u16 = 16;

impl Input<'_> {
    /// Writes a descriptor and offers it, or more of a chain, which may bite its own tail.
    fn offer(&mut self, ring: &mut Ring, flags: u16) {
        let id = u16::from(self.byte()) % SIZE;
        let next = u16::from(self.byte()) % SIZE;
        let (address, len) = match self.byte() {
            0 => (u64::from(self.word()) << 32, self.word()),
            1 => (u64::from(self.word()), self.word()),
            _ => (ring.buffer(id).0, u32::from(self.byte()) * 8),
        };
        let chained = if self.byte().is_multiple_of(4) {
            NEXT
        } else {
            0
        };
        let wrong = if self.byte().is_multiple_of(16) {
            WRITE
        } else {
            0
        };
        ring.describe(id, address, len, (flags ^ wrong) | chained, next);
        ring.offer(id);
        if self.byte() == 0 {
            // Wherever the index points.
            ring.set_available(u16::from(self.byte()));
        }
    }
}

/// Feeds a device with what `bytes` say, until they are used up or the device gives up.
pub fn guest_buffers(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let memory =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("a guest's memory");
    let ring = |index, base| Ring::new(memory.clone(), index, base, SIZE, 2048);
    let (mut receive, mut transmit) = (ring(0, 0x1_0000), ring(1, 0x4_0000));
    let mut commands = ring(2, 0x8_0000);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, host) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .expect("a pair of sockets");
    let (tap, mut host) = (File::from(tap), File::from(host));
    let mut receiver = Receiver::new(receive.active(), !input.byte().is_multiple_of(4));
    let mut transmitter = Transmitter::new(transmit.active());
    let mut control = commands.active();
    while !input.is_empty() {
        let served = match input.byte() % 8 {
            0..=2 => {
                input.offer(&mut receive, WRITE);
                Ok(())
            }
            3 => {
                let len = usize::from(input.byte()) * 64;
                let _ = host.write(&vec![input.byte(); len.max(1)]);
                receiver
                    .receive(&memory, &NoInterrupt, &tap, None)
                    .map(drop)
            }
            4 | 5 => {
                input.offer(&mut transmit, 0);
                transmitter
                    .send(&memory, &NoInterrupt, &tap, None)
                    .map(drop)
            }
            6 => {
                input.offer(&mut commands, 0);
                control.serve(&memory, &NoInterrupt, |chain| {
                    control::serve(&memory, chain, 4, |pairs| {
                        assert!((1..=4).contains(&pairs));
                        Ok(())
                    })
                })
            }
            _ => {
                let _ = host.read(&mut [0; 0x1_1000]);
                while receive.take_used().is_some() {}
                Ok(())
            }
        };
        if served.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::fuzz_input::feed;

    #[test]
    fn random_guests_do_no_harm() {
        feed(2000, guest_buffers);
    }
}
