// SPDX-License-Identifier: Apache-2.0
//! Packets between a driver's rings and a socket in a tap's place: it keeps packets apart, and is
//! full one day, as a tap does.

use std::fs::File;
use std::io::{self, Read, Write};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::control;
use super::receive::{Received, Receiver};
use super::transmit::{Sent, Transmitter};
use crate::devices::virtio::DeviceFault;
use crate::devices::virtio::rate::RateLimiter;
use crate::devices::virtio::test_ring::{NEXT, NoInterrupt, Ring, WRITE};

const BUFFER: u32 = 1024;
const SIZE: u16 = 8;
const MEMORY: usize = 0x20_0000;
/// What `num_buffers` holds before the device writes it.
const STALE: u8 = 0xee;

struct Fixture {
    memory: GuestMemoryMmap,
    ring: Ring,
    tap: File,
    host: File,
}

impl Fixture {
    fn new(size: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let ring = Ring::new(memory.clone(), 0, 0x1_0000, size, BUFFER);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::SEQPACKET;
        let (tap, host) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        Self {
            memory,
            ring,
            tap: tap.into(),
            host: host.into(),
        }
    }

    fn receiver(&self, mergeable: bool) -> Receiver {
        Receiver::new(self.ring.active(), mergeable)
    }

    fn transmitter(&self) -> Transmitter {
        Transmitter::new(self.ring.active())
    }

    fn offer(&mut self, ids: impl IntoIterator<Item = u16>) {
        for id in ids {
            let at = self.ring.buffer(id).0;
            self.ring.describe(id, at, BUFFER, WRITE, 0);
            self.ring.offer(id);
        }
    }

    fn receive(&self, receiver: &mut Receiver) -> Result<Received, DeviceFault> {
        receiver.receive(&self.memory, &NoInterrupt, &self.tap, None)
    }

    fn send(&self, transmitter: &mut Transmitter) -> Result<Sent, DeviceFault> {
        transmitter.send(&self.memory, &NoInterrupt, &self.tap, None)
    }

    /// The next packet that the driver has got, and in how many buffers.
    fn packet(&mut self) -> Option<(Vec<u8>, u16)> {
        let mut packet = Vec::new();
        let mut buffers = 1;
        let mut taken = 0;
        while taken < buffers {
            let (id, len) = self.ring.take_used()?;
            let mut bytes = vec![0; len as usize];
            let at = self.ring.buffer(id);
            self.memory.read_slice(&mut bytes, at).unwrap();
            packet.extend(bytes);
            if taken == 0 {
                buffers = u16::from_le_bytes(packet[10..12].try_into().unwrap());
            }
            taken += 1;
        }
        Some((packet, buffers))
    }

    fn read_host(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; 0x2_0000];
        let len = self.host.read(&mut bytes)?;
        bytes.truncate(len);
        Ok(bytes)
    }
}

/// A packet of `len` bytes with its header.
fn packet(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at / 251 + at) as u8).collect();
    bytes[10..12].fill(STALE);
    bytes
}

fn assert_same(found: &[u8], sent: &[u8]) {
    assert_eq!(found.len(), sent.len());
    assert_eq!(found[..10], sent[..10]);
    assert_eq!(found[12..], sent[12..]);
}

#[test]
fn a_packet_takes_as_many_buffers_as_it_needs() {
    for (len, buffers) in [(12, 1), (60, 1), (1024, 1), (1025, 2), (3000, 3), (8192, 8)] {
        let mut fixture = Fixture::new(SIZE);
        let mut receiver = fixture.receiver(true);
        fixture.offer(0..SIZE);
        fixture.host.write_all(&packet(len)).unwrap();
        fixture.receive(&mut receiver).unwrap();
        let (found, count) = fixture.packet().unwrap();
        assert_eq!(count, buffers, "{len}");
        assert_same(&found, &packet(len));
        assert!(fixture.packet().is_none());
    }
}

#[test]
fn packets_come_in_order_and_buffers_are_used_again() {
    let mut fixture = Fixture::new(SIZE);
    let mut receiver = fixture.receiver(true);
    fixture.offer(0..SIZE);
    let mut next = 0;
    for len in (0..100).map(|round| 12 + (round * 977) % 4000) {
        fixture.host.write_all(&packet(len)).unwrap();
        fixture.receive(&mut receiver).unwrap();
        let (found, count) = fixture.packet().unwrap();
        assert_same(&found, &packet(len));
        fixture.offer((next..next + count).map(|id| id % SIZE));
        next = (next + count) % SIZE;
    }
}

#[test]
fn a_packet_waits_for_buffers_and_loses_nothing() {
    let mut fixture = Fixture::new(SIZE);
    let mut receiver = fixture.receiver(true);
    fixture.host.write_all(&packet(3000)).unwrap();
    assert_eq!(fixture.receive(&mut receiver).unwrap(), Received::Starved);
    for id in 0..2 {
        fixture.offer([id]);
        assert_eq!(fixture.receive(&mut receiver).unwrap(), Received::Starved);
        assert!(fixture.packet().is_none());
    }
    fixture.offer([2]);
    fixture.receive(&mut receiver).unwrap();
    let (found, count) = fixture.packet().unwrap();
    assert_eq!(count, 3);
    assert_same(&found, &packet(3000));
}

#[test]
fn a_packet_that_never_fits_is_dropped() {
    let mut fixture = Fixture::new(2);
    let mut receiver = fixture.receiver(true);
    fixture.offer(0..2);
    fixture.host.write_all(&packet(3000)).unwrap();
    fixture.host.write_all(&packet(2000)).unwrap();
    fixture.receive(&mut receiver).unwrap();
    let (found, _) = fixture.packet().unwrap();
    assert_same(&found, &packet(2000));
}

#[test]
fn without_mergeable_buffers_a_packet_has_one_chain() {
    let mut fixture = Fixture::new(SIZE);
    let mut receiver = fixture.receiver(false);
    // A chain of two parts, then one of one.
    let at = fixture.ring.buffer(0).0;
    fixture.ring.describe(0, at, 100, WRITE | NEXT, 1);
    fixture.ring.describe(1, at + 100, 900, WRITE, 0);
    fixture.ring.offer(0);
    fixture.offer([2]);
    for len in [1100, 1000, 1024] {
        fixture.host.write_all(&packet(len)).unwrap();
    }
    fixture.receive(&mut receiver).unwrap();
    for len in [1000, 1024] {
        let (found, count) = fixture.packet().unwrap();
        assert_eq!(count, 1);
        assert_same(&found, &packet(len));
    }
}

#[test]
fn bad_receive_buffers_do_no_harm() {
    let mut fixture = Fixture::new(SIZE);
    let mut receiver = fixture.receiver(true);
    let at = fixture.ring.buffer(0).0;
    // Nothing to write to: it goes back empty.
    fixture.ring.describe(0, at, BUFFER, 0, 0);
    fixture.ring.offer(0);
    fixture.host.write_all(&packet(60)).unwrap();
    assert_eq!(fixture.receive(&mut receiver).unwrap(), Received::Starved);
    assert_eq!(fixture.ring.take_used(), Some((0, 0)));
    for (address, len) in [
        (MEMORY as u64, 64),
        (MEMORY as u64 - 1, 64),
        (u64::MAX, 64),
        (at, u32::MAX),
    ] {
        let mut fixture = Fixture::new(SIZE);
        let mut receiver = fixture.receiver(true);
        fixture.ring.describe(0, address, len, WRITE, 0);
        fixture.ring.offer(0);
        fixture.host.write_all(&packet(60)).unwrap();
        let received = fixture.receive(&mut receiver);
        // A buffer longer than memory is as good as one that ends there.
        assert!(len == u32::MAX || received.is_err(), "{address:#x}");
    }
}

#[test]
fn a_ring_that_lies_is_a_fault() {
    let fixture = Fixture::new(SIZE);
    let mut receiver = fixture.receiver(true);
    let mut transmitter = fixture.transmitter();
    fixture.ring.set_available(SIZE + 1);
    assert!(fixture.receive(&mut receiver).is_err());
    assert!(fixture.send(&mut transmitter).is_err());
}

#[test]
fn a_packet_is_sent_in_one_piece() {
    let mut fixture = Fixture::new(SIZE);
    let mut transmitter = fixture.transmitter();
    let bytes = packet(2000);
    let at = fixture.ring.buffer(0).0;
    fixture
        .memory
        .write_slice(&bytes, GuestAddress(at))
        .unwrap();
    let ring = &mut fixture.ring;
    ring.describe(0, at, 5, NEXT, 1);
    ring.describe(1, at + 5, 7, NEXT, 2);
    ring.describe(2, at + 12, 0, NEXT, 3);
    ring.describe(3, at + 12, 1988, 0, 0);
    ring.offer(0);
    assert_eq!(fixture.send(&mut transmitter).unwrap(), Sent::All);
    assert_eq!(fixture.read_host().unwrap(), bytes);
    assert_eq!(fixture.ring.take_used(), Some((0, 0)));
}

#[test]
fn what_is_no_packet_is_dropped() {
    let mut fixture = Fixture::new(SIZE);
    let mut transmitter = fixture.transmitter();
    let at = fixture.ring.buffer(0).0;
    let ring = &mut fixture.ring;
    // Nothing, nothing to read, too much.
    ring.describe(0, at, 0, 0, 0);
    ring.describe(1, at, 100, WRITE, 0);
    ring.describe(2, at, 0x1_0100, 0, 0);
    for id in 0..3 {
        ring.offer(id);
    }
    assert_eq!(fixture.send(&mut transmitter).unwrap(), Sent::All);
    for id in 0..3 {
        assert_eq!(fixture.ring.take_used(), Some((id, 0)));
    }
    assert!(fixture.read_host().is_err());
    fixture.ring.describe(0, MEMORY as u64 - 50, 100, 0, 0);
    fixture.ring.offer(0);
    assert!(fixture.send(&mut transmitter).is_err());
}

#[test]
fn a_full_tap_keeps_packets_in_the_ring() {
    let mut fixture = Fixture::new(SIZE);
    let mut transmitter = fixture.transmitter();
    let at = fixture.ring.buffer(0).0;
    let bytes = packet(60_000);
    fixture
        .memory
        .write_slice(&bytes, GuestAddress(at))
        .unwrap();
    let mut offered = 0;
    let mut back = 0;
    let sent = loop {
        let id = (offered % usize::from(SIZE)) as u16;
        fixture.ring.describe(id, at, 60_000, 0, 0);
        fixture.ring.offer(id);
        offered += 1;
        let sent = fixture.send(&mut transmitter).unwrap();
        if sent != Sent::All {
            break sent;
        }
        back += usize::from(fixture.ring.take_used().is_some());
    };
    assert_eq!(sent, Sent::Blocked);
    assert_eq!(back, offered - 1);
    assert!(fixture.ring.take_used().is_none());
    // As soon as there is room it goes.
    assert_eq!(fixture.read_host().unwrap(), bytes);
    while fixture.read_host().is_ok() {}
    assert_eq!(fixture.send(&mut transmitter).unwrap(), Sent::All);
    assert!(fixture.ring.take_used().is_some());
    assert_eq!(fixture.read_host().unwrap(), bytes);
}

#[test]
fn the_driver_sets_its_queue_pairs() {
    for (command, pairs, answer) in [
        (&[4, 0, 2, 0][..], Some(2), 0),
        (&[4, 0, 1, 0], Some(1), 0),
        (&[4, 0, 0, 0], None, 1),
        (&[4, 0, 5, 0], None, 1),
        (&[4, 0, 2], None, 1),
        (&[4, 1, 2, 0], None, 1),
        (&[0, 0, 2, 0], None, 1),
        (&[], None, 1),
    ] {
        let mut fixture = Fixture::new(SIZE);
        let mut queue = fixture.ring.active();
        let (at, end) = (fixture.ring.buffer(0), fixture.ring.buffer(1));
        fixture.memory.write_slice(command, at).unwrap();
        // The number in a part of its own, as Linux has it.
        let head = command.len().min(2) as u32;
        let ring = &mut fixture.ring;
        ring.describe(0, at.0, head, NEXT, 1);
        ring.describe(1, at.0 + 2, command.len() as u32 - head, NEXT, 2);
        ring.describe(2, end.0, 1, WRITE, 0);
        ring.offer(0);
        let chain = queue.pop(&fixture.memory).unwrap().unwrap();
        let mut used = None;
        let done = control::serve(&fixture.memory, chain, 4, |pairs| {
            used = Some(pairs);
            Ok(())
        });
        assert_eq!(done.unwrap(), 1);
        assert_eq!(used, pairs, "{command:?}");
        let code: u8 = fixture.memory.read_obj(end).unwrap();
        assert_eq!(code, answer, "{command:?}");
    }
}

#[test]
fn a_limit_stops_both_ways_and_loses_nothing() {
    // A packet pays for more than what may be saved up.
    let limiter = RateLimiter::new(1, 0).unwrap();
    let mut fixture = Fixture::new(SIZE);
    let mut receiver = fixture.receiver(true);
    fixture.offer(0..SIZE);
    for len in [112, 113] {
        fixture.host.write_all(&packet(len)).unwrap();
    }
    let (memory, tap) = (&fixture.memory, &fixture.tap);
    let received = receiver.receive(memory, &NoInterrupt, tap, Some(&limiter));
    assert_eq!(received.unwrap(), Received::Limited);
    assert_same(&fixture.packet().unwrap().0, &packet(112));
    assert!(fixture.packet().is_none());
    // The header is not the wire's: a hundred seconds, less what was saved up.
    let wait = limiter.wait().unwrap().as_secs();
    assert!((95..=100).contains(&wait), "{wait}");
    // It is still there when the rest is over.
    assert_eq!(fixture.receive(&mut receiver).unwrap(), Received::All);
    assert_same(&fixture.packet().unwrap().0, &packet(113));

    let limiter = RateLimiter::new(1, 0).unwrap();
    let mut fixture = Fixture::new(SIZE);
    let mut transmitter = fixture.transmitter();
    for id in 0..2 {
        let at = fixture.ring.buffer(id).0;
        fixture.ring.describe(id, at, 112, 0, 0);
        fixture.ring.offer(id);
    }
    let (memory, tap) = (&fixture.memory, &fixture.tap);
    let sent = transmitter.send(memory, &NoInterrupt, tap, Some(&limiter));
    assert_eq!(sent.unwrap(), Sent::Limited);
    let wait = limiter.wait().unwrap().as_secs();
    assert!((95..=100).contains(&wait), "{wait}");
    assert_eq!(fixture.read_host().unwrap().len(), 112);
    assert!(fixture.read_host().is_err());
    assert_eq!(fixture.send(&mut transmitter).unwrap(), Sent::All);
    assert_eq!(fixture.read_host().unwrap().len(), 112);
}
