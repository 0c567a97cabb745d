// SPDX-License-Identifier: Apache-2.0
//! The whole device, thread included, between a guest's driver and host programs.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

mod passed;

use super::Vsock;
use super::muxer::MAX_STREAMS;
use super::packet::Header;
use super::test_driver::{Driver, GUEST_CID, NoInterrupt, Sink, from_guest};
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

const NO_MORE_READING: u32 = 1;
const NO_MORE_WRITING: u32 = 2;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

struct Machine {
    driver: Driver,
    device: Vsock,
    sink: Arc<Sink>,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Machine {
    /// A device in use; the guest has offered no buffers yet.
    fn without_buffers() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let sink = Arc::new(Sink::default());
        let cid = u32::try_from(GUEST_CID).unwrap();
        let device = Vsock::new(cid, listener.into(), Arc::clone(&sink) as _);
        let mut machine = Self {
            driver: Driver::new(),
            device,
            sink,
            path,
            _folder: folder,
        };
        machine.activate();
        machine
    }

    fn new() -> Self {
        let mut machine = Self::without_buffers();
        machine.driver.offer_buffers();
        machine
    }

    fn activate(&mut self) {
        let driver = &self.driver;
        self.device
            .activate(Activation {
                memory: driver.guest_memory(),
                features: 0,
                queues: vec![
                    driver.receive.active(),
                    driver.transmit.active(),
                    driver.event.active(),
                ],
                interrupt: Arc::new(NoInterrupt),
            })
            .unwrap();
    }

    fn host(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn send(&mut self, header: &Header, data: &[u8]) {
        let end = Instant::now() + PATIENCE;
        while !self.driver.send(header, data) {
            assert!(Instant::now() < end, "the transmit queue stays full");
            thread::sleep(Duration::from_micros(50));
        }
    }

    fn try_receive(&mut self, patience: Duration) -> Option<(Header, Vec<u8>)> {
        let end = Instant::now() + patience;
        loop {
            if let Some(packet) = self.driver.receive() {
                return Some(packet);
            }
            if Instant::now() > end {
                return None;
            }
            thread::sleep(Duration::from_micros(50));
        }
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.try_receive(PATIENCE).expect("a packet for the guest")
    }

    #[track_caller]
    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// The guest closes a stream for good, and is told that it is over.
    #[track_caller]
    fn close(&mut self, guest_port: u32, port: u32) {
        let mut shutdown = from_guest(guest_port, port, SHUTDOWN, 0);
        shutdown.flags = NO_MORE_READING | NO_MORE_WRITING;
        self.send(&shutdown, &[]);
        loop {
            match self.receive().0.op {
                CREDIT_UPDATE => {}
                op => break assert_eq!(op, RESET),
            }
        }
    }

    #[track_caller]
    fn expect_silence(&mut self) {
        let packet = self.try_receive(Duration::from_millis(50));
        assert!(packet.is_none(), "{packet:?}");
    }

    /// A stream that the host opened to a guest port; its host port too.
    fn open_from_host(&mut self, guest_port: u32) -> (UnixStream, u32) {
        let mut host = self.host();
        writeln!(host, "CONNECT {guest_port}").unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.dst_port, guest_port);
        assert_eq!((request.src_cid, request.dst_cid), (2, GUEST_CID));
        self.send(&from_guest(guest_port, request.src_port, RESPONSE, 0), &[]);
        assert_eq!(read_line(&mut host), format!("OK {}\n", request.src_port));
        (host, request.src_port)
    }

    /// A stream that the guest opened to a host port.
    fn open_from_guest(&mut self, guest_port: u32, host_port: u32) -> UnixStream {
        self.send(&from_guest(guest_port, host_port, REQUEST, 0), &[]);
        let response = self.expect(RESPONSE);
        assert_eq!(
            (response.src_port, response.dst_port),
            (host_port, guest_port)
        );
        let (port, stream) = self.sink.take().unwrap();
        assert_eq!(port, host_port);
        let stream = UnixStream::from(stream);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

fn read_line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') && stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0].into());
    }
    line
}

fn pattern(len: usize) -> Vec<u8> {
    let mut state: u32 = 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

fn at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

#[test]
fn the_host_connects_and_bytes_go_both_ways() {
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    host.write_all(b"hello guest").unwrap();
    let (header, data) = machine.receive();
    assert_eq!((header.op, header.len), (DATA, 11));
    assert_eq!(data, b"hello guest");
    machine.send(&from_guest(1024, port, DATA, 10), b"hello host");
    let mut answer = [0; 10];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello host");
}

#[test]
fn bytes_right_behind_the_line_reach_the_guest() {
    let mut machine = Machine::new();
    let mut host = machine.host();
    host.write_all(b"connect 7\nearly").unwrap();
    let port = machine.expect(REQUEST).src_port;
    machine.send(&from_guest(7, port, RESPONSE, 0), &[]);
    let (header, data) = machine.receive();
    assert_eq!((header.op, data.as_slice()), (DATA, &b"early"[..]));
}

#[test]
fn the_guest_connects() {
    let mut machine = Machine::new();
    let mut host = machine.open_from_guest(5000, 1024);
    machine.send(&from_guest(5000, 1024, DATA, 5), b"ready");
    let mut word = [0; 5];
    host.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ready");
    drop(host);
    let header = machine.expect(SHUTDOWN);
    assert_eq!(header.flags, NO_MORE_READING | NO_MORE_WRITING);
}

#[test]
fn what_the_sink_refuses_is_reset() {
    let mut machine = Machine::new();
    machine.send(&from_guest(5000, Sink::REFUSED, REQUEST, 0), &[]);
    let reset = machine.expect(RESET);
    assert_eq!((reset.src_port, reset.dst_port), (Sink::REFUSED, 5000));
}

#[test]
fn a_refusal_of_the_guest_closes_the_hosts_stream() {
    let mut machine = Machine::new();
    let mut host = machine.host();
    writeln!(host, "CONNECT 1").unwrap();
    let port = machine.expect(REQUEST).src_port;
    machine.send(&from_guest(1, port, RESET, 0), &[]);
    assert!(at_end(&mut host));
}

#[test]
fn a_line_that_is_none_closes_the_stream() {
    let mut machine = Machine::new();
    let mut host = machine.host();
    host.write_all(b"LISTEN 1\n").unwrap();
    assert!(at_end(&mut host));
    machine.expect_silence();
}

#[test]
fn ten_mebibytes_reach_the_guest_within_its_credit() {
    const LEN: usize = 10 << 20;
    const GRANT: u32 = 100_000;
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    let sent = pattern(LEN);
    let expected = sent.clone();
    let writer = thread::spawn(move || {
        host.write_all(&sent).unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        host
    });
    let mut update = from_guest(1024, port, CREDIT_UPDATE, 0);
    update.buf_alloc = GRANT;
    machine.send(&update, &[]);
    let mut received = Vec::with_capacity(LEN);
    let mut forwarded = 0_u32;
    loop {
        let (header, data) = machine.receive();
        match header.op {
            DATA => received.extend_from_slice(&data),
            CREDIT_REQUEST => {
                forwarded = u32::try_from(received.len()).unwrap();
                update.fwd_cnt = forwarded;
                machine.send(&update, &[]);
            }
            SHUTDOWN => {
                assert_eq!(header.flags, NO_MORE_WRITING);
                break;
            }
            op => panic!("operation {op}"),
        }
        // The first packets may have been sent on the grant of the response.
        if forwarded > 1 << 20 {
            assert!(u32::try_from(received.len()).unwrap() - forwarded <= GRANT);
        }
    }
    assert!(received == expected);
    drop(writer.join().unwrap());
}

#[test]
fn ten_mebibytes_reach_a_host_that_is_slow() {
    const LEN: usize = 10 << 20;
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    let sent = pattern(LEN);
    let reader = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        let mut all = Vec::with_capacity(LEN);
        host.read_to_end(&mut all).unwrap();
        all
    });
    let (mut window, mut forwarded) = (0, 0_u32);
    let mut position: usize = 0;
    while position < LEN {
        let in_flight = u32::try_from(position).unwrap() - forwarded;
        let room = usize::try_from(window - in_flight.min(window)).unwrap();
        let len = room.min(65_536).min(LEN - position);
        if len > 0 {
            let data = &sent[position..position + len];
            machine.send(&from_guest(1024, port, DATA, len), data);
            position += len;
        } else {
            if window == 0 {
                machine.send(&from_guest(1024, port, CREDIT_REQUEST, 0), &[]);
            }
            let header = machine.expect(CREDIT_UPDATE);
            (window, forwarded) = (header.buf_alloc, header.fwd_cnt);
        }
    }
    let mut shutdown = from_guest(1024, port, SHUTDOWN, 0);
    shutdown.flags = NO_MORE_WRITING;
    machine.send(&shutdown, &[]);
    assert!(reader.join().unwrap() == sent);
}

#[test]
fn a_guest_that_closes_for_good_loses_nothing() {
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    let mut sent = Vec::new();
    // More than the host's socket holds, so that some of it is kept in the device.
    for _ in 0..4 {
        let data = pattern(65_000);
        machine.send(&from_guest(1024, port, DATA, data.len()), &data);
        sent.extend_from_slice(&data);
    }
    machine.close(1024, port);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert!(all == sent);
}

#[test]
fn each_half_closes_by_itself() {
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    let mut shutdown = from_guest(1024, port, SHUTDOWN, 0);
    shutdown.flags = NO_MORE_WRITING;
    machine.send(&shutdown, &[]);
    assert!(at_end(&mut host));
    host.write_all(b"still here").unwrap();
    assert_eq!(machine.receive().1, b"still here");
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(
        machine.expect(SHUTDOWN).flags & NO_MORE_WRITING,
        NO_MORE_WRITING
    );

    let (mut host, port) = machine.open_from_host(1025);
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(machine.expect(SHUTDOWN).flags, NO_MORE_WRITING);
    machine.send(&from_guest(1025, port, DATA, 4), b"data");
    let mut word = [0; 4];
    host.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"data");
}

#[test]
fn a_guest_that_reads_no_more_breaks_the_hosts_pipe() {
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    let mut shutdown = from_guest(1024, port, SHUTDOWN, 0);
    shutdown.flags = NO_MORE_READING;
    machine.send(&shutdown, &[]);
    let end = Instant::now() + PATIENCE;
    let error = loop {
        match host.write_all(b"more") {
            Err(error) => break error,
            Ok(()) => assert!(Instant::now() < end),
        }
    };
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    machine.send(&from_guest(1024, port, DATA, 4), b"data");
    let mut word = [0; 4];
    host.read_exact(&mut word).unwrap();
    drop(host);
    assert_eq!(machine.expect(SHUTDOWN).flags, 3);
}

#[test]
fn a_host_that_closes_leaves_its_bytes_and_then_its_end() {
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    host.write_all(b"last words").unwrap();
    drop(host);
    assert_eq!(machine.receive().1, b"last words");
    let header = machine.expect(SHUTDOWN);
    assert_eq!(header.flags, 3);
    machine.send(&from_guest(1024, port, RESET, 0), &[]);
    machine.expect_silence();
}

#[test]
fn a_host_that_dies_with_unread_bytes_resets_the_stream() {
    let mut machine = Machine::new();
    let (host, port) = machine.open_from_host(1024);
    machine.send(&from_guest(1024, port, DATA, 6), b"unread");
    let end = Instant::now() + PATIENCE;
    while rustix::io::ioctl_fionread(&host).unwrap() == 0 {
        assert!(Instant::now() < end);
    }
    drop(host);
    let (header, _) = machine.receive();
    assert!([RESET, SHUTDOWN].contains(&header.op), "{header:?}");
}

#[test]
fn more_than_the_window_resets_the_stream() {
    let mut machine = Machine::new();
    let (_host, port) = machine.open_from_host(1024);
    let data = pattern(65_536);
    let mut resets = 0;
    for _ in 0..16 {
        machine.send(&from_guest(1024, port, DATA, data.len()), &data);
        while let Some((header, _)) = machine.driver.receive() {
            resets += u32::from(header.op == RESET);
        }
    }
    while resets == 0 {
        resets += u32::from(machine.receive().0.op == RESET);
    }
}

#[test]
fn what_fits_no_stream_is_reset_but_never_a_reset() {
    let mut machine = Machine::new();
    for op in [
        RESPONSE,
        SHUTDOWN,
        DATA,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
        0,
        8,
    ] {
        machine.send(&from_guest(1, 2, op, 0), &[]);
        let reset = machine.expect(RESET);
        assert_eq!((reset.src_cid, reset.dst_cid), (2, GUEST_CID));
        assert_eq!((reset.src_port, reset.dst_port), (2, 1));
    }
    machine.send(&from_guest(1, 2, RESET, 0), &[]);
    machine.expect_silence();
}

#[test]
fn other_guests_and_other_types_get_nowhere() {
    let mut machine = Machine::new();
    let mut spoofed = from_guest(1, 1024, REQUEST, 0);
    spoofed.src_cid = 4;
    machine.send(&spoofed, &[]);
    machine.expect_silence();
    let mut elsewhere = from_guest(1, 1024, REQUEST, 0);
    elsewhere.dst_cid = 77;
    machine.send(&elsewhere, &[]);
    assert_eq!(machine.expect(RESET).src_cid, 77);
    let mut packets = from_guest(1, 1024, REQUEST, 0);
    packets.socket_type = 2;
    machine.send(&packets, &[]);
    machine.expect(RESET);
    assert!(machine.sink.take().is_none());
}

#[test]
fn a_second_request_or_response_resets_the_stream() {
    for op in [REQUEST, RESPONSE] {
        let mut machine = Machine::new();
        let mut host = machine.open_from_guest(1, 1024);
        machine.send(&from_guest(1, 1024, op, 0), &[]);
        machine.expect(RESET);
        assert!(at_end(&mut host));
    }
}

#[test]
fn chains_that_hold_no_packet_are_given_back() {
    let mut machine = Machine::new();
    machine.driver.send_raw(&[(0x1000, 10, 0)]);
    machine.driver.send_raw(&[(0xffff_ffff_0000, 44, 0)]);
    machine.driver.send_raw(&[(0x1000, 44, 2)]);
    thread::sleep(Duration::from_millis(20));
    let header = from_guest(1, 2, DATA, 100);
    machine.driver.memory_write(0x1000, &header.to_bytes());
    machine.driver.send_raw(&[(0x1000, 44, 0), (0x2000, 99, 0)]);
    machine.expect(RESET);
    let _host = machine.open_from_guest(1, 1024);
}

#[test]
fn a_broken_ring_stops_the_device_and_a_reset_mends_it() {
    let mut machine = Machine::new();
    machine.driver.transmit.set_available(1000);
    machine.driver.transmit.kick.write(1).unwrap();
    thread::sleep(Duration::from_millis(20));
    machine.device.reset();
    machine.driver = Driver::new();
    machine.activate();
    machine.driver.offer_buffers();
    let _host = machine.open_from_host(1024);
}

#[test]
fn a_guest_without_buffers_holds_up_only_itself() {
    let mut machine = Machine::without_buffers();
    // Many more than the device answers without buffers; the last do not fit its queue.
    let mut sent = 0;
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end && sent < 2000 {
        sent += u32::from(machine.driver.send(&from_guest(1, 2, DATA, 0), &[]));
    }
    assert!((256..600).contains(&sent), "{sent}");
    let mut host = machine.host();
    writeln!(host, "CONNECT 1024").unwrap();
    machine.driver.offer_buffers();
    let mut answers = 0;
    loop {
        let (header, _) = machine.receive();
        match header.op {
            RESET => answers += 1,
            op => {
                assert_eq!(op, REQUEST);
                machine.send(&from_guest(1024, header.src_port, RESPONSE, 0), &[]);
                break;
            }
        }
    }
    while answers < sent {
        machine.expect(RESET);
        answers += 1;
    }
    assert!(read_line(&mut host).starts_with("OK "));
}

#[test]
fn a_greedy_stream_leaves_the_others_their_turns() {
    const LEN: usize = 100_000;
    let mut machine = Machine::new();
    let mut hosts = Vec::new();
    let mut updates = Vec::new();
    for guest_port in [1, 2] {
        let mut host = machine.host();
        writeln!(host, "CONNECT {guest_port}").unwrap();
        let port = machine.expect(REQUEST).src_port;
        let mut response = from_guest(guest_port, port, RESPONSE, 0);
        response.buf_alloc = 0;
        machine.send(&response, &[]);
        read_line(&mut host);
        host.write_all(&pattern(LEN)).unwrap();
        machine.expect(CREDIT_REQUEST);
        updates.push(from_guest(guest_port, port, CREDIT_UPDATE, 0));
        hosts.push(host);
    }
    machine.driver.send_together(&updates);
    let mut received = [0, 0];
    while received != [LEN, LEN] {
        let (header, data) = machine.receive();
        let index = usize::try_from(header.dst_port).unwrap() - 1;
        received[index] += data.len();
        // One turn, not more, before the other's first.
        let alone = received.contains(&0);
        assert!(
            !alone || received[0] + received[1] <= 65_536,
            "{received:?}"
        );
    }
}

#[test]
fn a_half_that_closes_waits_for_what_the_host_has_not_taken() {
    let mut machine = Machine::new();
    let (mut host, port) = machine.open_from_host(1024);
    let mut sent = Vec::new();
    for _ in 0..4 {
        let data = pattern(65_000);
        machine.send(&from_guest(1024, port, DATA, data.len()), &data);
        sent.extend_from_slice(&data);
    }
    let mut shutdown = from_guest(1024, port, SHUTDOWN, 0);
    shutdown.flags = NO_MORE_WRITING;
    machine.send(&shutdown, &[]);
    // All of it has arrived, and not all has fitted, once the guest's buffers are its own again.
    while machine.driver.transmit_in_use() > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert!(all == sent);
}

#[test]
fn a_storm_of_connections_is_served_up_to_the_limit_and_ports_differ() {
    let mut machine = Machine::new();
    let mut hosts = Vec::new();
    let mut ports = std::collections::HashSet::new();
    for _ in 0..200 {
        let (host, port) = machine.open_from_host(1024);
        assert!(ports.insert(port));
        hosts.push(host);
    }
    for (host, port) in hosts.iter_mut().zip(&ports) {
        let _ = (host.write_all(b"x"), port);
    }
    let mut seen = std::collections::HashSet::new();
    for _ in 0..hosts.len() {
        assert!(seen.insert(machine.receive().0.src_port));
    }
    drop(hosts);
    for _ in 0..ports.len() {
        let port = machine.expect(SHUTDOWN).src_port;
        machine.send(&from_guest(1024, port, RESET, 0), &[]);
    }
    // Guest-made ones, past the limit: each costs the test two descriptors.
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if allowed.current.is_some_and(|count| count < 4096) {
        let mut raised = allowed;
        raised.current = raised.maximum.map_or(Some(4096), |max| Some(max.min(4096)));
        let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
    }
    let limit = u32::try_from(MAX_STREAMS).unwrap();
    for port in 0..limit {
        machine.send(&from_guest(port, 9, REQUEST, 0), &[]);
        machine.expect(RESPONSE);
    }
    machine.send(&from_guest(limit, 9, REQUEST, 0), &[]);
    machine.expect(RESET);
    machine.send(&from_guest(0, 9, RESET, 0), &[]);
    machine.send(&from_guest(limit, 9, REQUEST, 0), &[]);
    machine.expect(RESPONSE);
}

#[test]
fn a_transport_reset_drops_the_streams_and_tells_the_guest() {
    let mut machine = Machine::new();
    let (mut host, _) = machine.open_from_host(1024);
    machine.device.reset_transport();
    assert!(at_end(&mut host));
    let end = Instant::now() + PATIENCE;
    let event = loop {
        if let Some(event) = machine.driver.receive_event() {
            break event;
        }
        assert!(Instant::now() < end);
    };
    assert_eq!(event, [0; 4]);
    let _host = machine.open_from_host(1024);
}

#[test]
fn a_reset_of_the_device_ends_its_streams() {
    let mut machine = Machine::new();
    let (mut host, _) = machine.open_from_host(1024);
    machine.device.reset();
    assert!(at_end(&mut host));
    machine.device.reset();
}

#[test]
fn all_three_queues_are_needed() {
    let mut machine = Machine::new();
    machine.device.reset();
    let activation = Activation {
        memory: machine.driver.guest_memory(),
        features: 0,
        queues: vec![machine.driver.receive.active()],
        interrupt: Arc::new(NoInterrupt),
    };
    assert!(matches!(
        machine.device.activate(activation),
        Err(ActivateError::QueueCount {
            expected: 3,
            enabled: 1
        })
    ));
}

#[test]
fn the_configuration_is_the_context_id() {
    let machine = Machine::new();
    let mut config = [0xff; 12];
    machine.device.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    machine.device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 12]);
}
