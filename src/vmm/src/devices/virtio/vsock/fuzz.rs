// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, made of a fuzzer's bytes: packets that are mostly right and sometimes not,
//! against a device with real streams.

#![expect(clippy::expect_used, reason = "a fuzzer that can't go on should stop")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmm_sys_util::epoll::EventSet;

use super::muxer::Muxer;
use super::packet::{Buffers, Header, Packet};
use super::queues::Receiver;
use super::test_driver::{Driver, Sink, from_guest};
use crate::devices::virtio::Poller;
use crate::devices::virtio::fuzz_input::Input;

impl Input<'_> {
    /// A header that is right in all but, now and then, one field.
    fn header(&mut self) -> Header {
        let ports = u32::from(self.byte());
        let len = usize::from(self.byte()) * 64;
        let op = u16::from(self.byte() % 9);
        let mut header = from_guest(ports % 4, ports / 64, op, len);
        header.flags = u32::from(self.byte() % 8);
        header.fwd_cnt = u32::from(self.byte());
        match self.byte() {
            0 => header.src_cid = u64::from(self.word()),
            1 => header.dst_cid = u64::from(self.word()),
            2 => header.len = self.word(),
            3 => header.socket_type = u16::from(self.byte()),
            4 => header.op = u16::from(self.byte()),
            5 => header.buf_alloc = self.word(),
            6 => header.fwd_cnt = self.word(),
            _ => {}
        }
        header
    }
}

/// Feeds a device with what `bytes` say, until they are used up.
pub fn guest_packets(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut driver = Driver::new();
    let sink = Arc::new(Sink::default());
    let flags = SocketFlags::CLOEXEC;
    // Nobody connects: accepting from what doesn't listen fails, which must do no harm either.
    let (listener, _peer) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket pair");
    let mut muxer = Muxer::new(3, listener, Arc::clone(&sink) as _);
    let poller = Poller::new().expect("an epoll set");
    let memory = driver.memory.clone();
    let mut receive = driver.receive.active();
    let mut transmit = driver.transmit.active();
    let mut hosts: Vec<UnixStream> = Vec::new();
    driver.offer_buffers();
    while !input.is_empty() {
        match input.byte() % 8 {
            0 => {
                if let Some(host) = hosts.last_mut() {
                    let _ = host.write(&vec![7; usize::from(input.byte()) * 16]);
                }
            }
            1 => {
                if let Some(host) = hosts.first_mut() {
                    let _ = host.read(&mut [0; 4096]);
                }
            }
            2 => drop(hosts.pop()),
            3 => {
                // Wherever it points, whatever it says.
                let address = u64::from(input.word());
                let len = input.word() % 0x2_0000;
                let flags = u16::from(input.byte() & 2);
                driver.send_raw(&[(address, len, flags), (address ^ 0x40, len, 0)]);
            }
            4 => {
                for token in 16..32 {
                    let event = EventSet::from_bits_truncate(u32::from(input.byte()));
                    muxer.on_host_event(token, event, &poller);
                }
            }
            _ => {
                let header = input.header();
                let len = usize::try_from(header.len).unwrap_or_default() % 0x1_0000;
                driver.send(&header, &vec![input.byte(); len]);
            }
        }
        while muxer.takes_packets()
            && let Ok(Some(chain)) = transmit.pop(&memory)
        {
            let head = chain.head_index();
            if let Ok(packet) = Buffers::readable(&memory, chain).and_then(Packet::new) {
                muxer.receive(&packet, &poller);
            }
            if transmit.complete(&memory, head, 0).is_err() {
                return;
            }
        }
        while let Some((_, stream)) = sink.take() {
            let stream = UnixStream::from(stream);
            if stream.set_nonblocking(true).is_ok() {
                hosts.push(stream);
            }
        }
        if muxer
            .fill(&mut Receiver::new(&mut receive, &memory), &poller)
            .is_err()
        {
            return;
        }
        while driver.receive().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::fuzz_input::feed;

    #[test]
    fn random_guests_do_no_harm() {
        feed(200, guest_packets);
    }
}
