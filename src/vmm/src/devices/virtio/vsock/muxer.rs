// SPDX-License-Identifier: Apache-2.0
//! All streams of one device: who a packet is for, whose turn it is, and the limits.
//!
//! What a guest can make us hold is bounded: `MAX_STREAMS` streams and handshakes, each with its
//! window, and `MAX_RESETS` answers to packets that fit no stream. When that many answers wait
//! because the guest offers no buffers, its own packets wait as well.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, socketpair};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Fate, Ports, Turn};
use super::endpoint::Control;
use super::handshake::{Handshake, Passed, Progress};
use super::packet::{Header, Operation, Packet, TYPE_STREAM};
use super::queues::Receiver;
use super::{ConnectionSink, HOST_CID};
use crate::devices::virtio::{DeviceFault, Poller};

/// The most streams, handshakes included.
pub(super) const MAX_STREAMS: usize = 1024;

/// The most RSTs that wait for the guest to offer buffers, before its packets wait too.
const MAX_RESETS: usize = 256;

/// The most turns between two looks at what else there is to do.
const MAX_TURNS: usize = 64;

/// How long a host program and the guest may take, together, to agree on a stream.
const SETUP_TIME: Duration = Duration::from_secs(10);

/// How long to wait before taking new streams again after the host ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Windows of a stream, in bytes, and what they should sum up to. The more streams there are, the
/// smaller is the window of a new one; so all together never exceed 80 MiB.
const LARGEST_WINDOW: usize = 256 * 1024;
const SMALLEST_WINDOW: usize = 32 * 1024;
const WINDOW_BUDGET: usize = 32 * 1024 * 1024;

/// The first port that streams from the host come from: above those that programs listen on.
const FIRST_PORT: u32 = 1 << 30;

/// Tokens of events: those below the listener's are not the muxer's.
pub(super) const LISTENER: u64 = 15;
const FIRST_STREAM: u64 = 16;

/// How filling the guest's buffers ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// Nothing waits.
    All,
    /// The guest has no more buffers.
    Starved,
    /// There is more to do.
    Partly,
}

/// The streams.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    listener: OwnedFd,
    sink: Arc<dyn ConnectionSink>,
    next_stream: u64,
    next_port: u32,
    handshakes: HashMap<u64, Handshake>,
    connections: HashMap<u64, Connection>,
    /// Sockets over which ends of streams were passed: whose.
    controls: HashMap<u64, u64>,
    /// The streams that the guest knows, or will.
    by_ports: HashMap<Ports, u64>,
    /// Streams that have something for the guest, in the order of their turns.
    line: VecDeque<u64>,
    resets: VecDeque<Header>,
    /// When the set-up of a stream must have ended; in order, since all get the same time.
    deadlines: VecDeque<(Instant, u64)>,
    /// Set while no new streams can be taken.
    accept_again: Option<Instant>,
}

impl Muxer {
    /// Host programs come by `listener`, guest-made streams go to `sink`.
    pub(super) fn new(guest_cid: u64, listener: OwnedFd, sink: Arc<dyn ConnectionSink>) -> Self {
        Self {
            guest_cid,
            listener,
            sink,
            next_stream: FIRST_STREAM,
            next_port: FIRST_PORT,
            handshakes: HashMap::new(),
            connections: HashMap::new(),
            controls: HashMap::new(),
            by_ports: HashMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: VecDeque::new(),
            accept_again: None,
        }
    }

    /// Watches the listener.
    pub(super) fn register(&self, poller: &Poller) -> io::Result<()> {
        // A client that gave up must not leave the worker waiting in accept.
        rustix::io::ioctl_fionbio(&self.listener, true)?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        poller.add(&self.listener, LISTENER, events)
    }

    /// Whether a packet of the guest can be taken now: its answer must have a place.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes a packet from the guest.
    pub(super) fn receive(&mut self, packet: &Packet<'_>, poller: &Poller) {
        let header = &packet.header;
        if header.src_cid != self.guest_cid {
            // Not from this guest, it says; an answer would go to somebody else.
            return;
        }
        let Some(operation) = header.operation() else {
            return self.refuse(header);
        };
        if header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM {
            return self.refuse(header);
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        match self.by_ports.get(&ports).copied() {
            Some(id) => {
                let fate = match (self.connections.get_mut(&id), &packet.data) {
                    (Some(connection), Ok(data)) => connection.receive(operation, header, data),
                    _ => Fate::Reset,
                };
                self.settle(id, fate, poller);
            }
            None if operation == Operation::Request && packet.data.is_ok() => {
                self.open_from_guest(header, ports, poller);
            }
            None => self.refuse(header),
        }
    }

    /// Answers by RST, except an RST: two sides must not reset each other for ever.
    fn refuse(&mut self, header: &Header) {
        if header.operation() != Some(Operation::Reset) {
            self.resets.push_back(header.reset());
        }
    }

    fn open_from_guest(&mut self, request: &Header, ports: Ports, poller: &Poller) {
        if self.is_full() {
            return self.refuse(request);
        }
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let Ok((ours, theirs)) = pair else {
            return self.refuse(request);
        };
        if self.sink.connect(ports.host, theirs).is_err() {
            return self.refuse(request);
        }
        let connection =
            Connection::from_guest(request, ports, self.guest_cid, ours, self.window());
        let id = self.new_stream();
        self.add(id, connection, poller);
    }

    /// Fills the guest's buffers, each stream in its turn.
    pub(super) fn fill(
        &mut self,
        receiver: &mut Receiver<'_, '_>,
        poller: &Poller,
    ) -> Result<Filled, DeviceFault> {
        for _ in 0..MAX_TURNS {
            if let Some(header) = self.resets.front() {
                let Some(buffer) = receiver.next()? else {
                    return Ok(Filled::Starved);
                };
                receiver.deliver(&buffer, header)?;
                self.resets.pop_front();
                continue;
            }
            let Some(id) = self.line.pop_front() else {
                return Ok(Filled::All);
            };
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.in_line = false;
            match connection.take_turn(receiver)? {
                Turn::Taken => self.settle(id, Fate::Lives, poller),
                Turn::Reset => self.settle(id, Fate::Reset, poller),
                Turn::Starved => {
                    connection.in_line = true;
                    self.line.push_front(id);
                    return Ok(Filled::Starved);
                }
            }
        }
        Ok(Filled::Partly)
    }

    /// Takes note of an event on the host's side.
    pub(super) fn on_host_event(&mut self, token: u64, event: EventSet, poller: &Poller) {
        if token == LISTENER {
            self.accept(poller);
        } else if let Some(connection) = self.connections.get_mut(&token) {
            let fate = connection.on_host_event(event);
            self.settle(token, fate, poller);
        } else if self.handshakes.contains_key(&token) {
            self.advance_handshake(token, poller);
        } else if let Some(id) = self.controls.remove(&token)
            && let Some(connection) = self.connections.get(&id)
        {
            // Nothing but its end is waited for.
            let fate = connection.abandon();
            self.settle(id, fate, poller);
        }
    }

    /// Takes all host programs that wait, up to the limit.
    fn accept(&mut self, poller: &Poller) {
        self.accept_again = None;
        loop {
            if self.is_full() {
                // The next edge may never come: looked at again as streams end.
                self.accept_again = Instant::now().checked_add(ACCEPT_PAUSE);
                return;
            }
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(stream) => self.greet(stream, poller),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => {
                    tracing::warn!(device = "vsock", %error, "can't take a connection");
                    self.accept_again = Instant::now().checked_add(ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn greet(&mut self, stream: OwnedFd, poller: &Poller) {
        let id = self.new_stream();
        let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if poller.add(&stream, id, events).is_err() {
            return;
        }
        let now = Instant::now();
        let deadline = now.checked_add(SETUP_TIME).unwrap_or(now);
        self.deadlines.push_back((deadline, id));
        self.handshakes.insert(id, Handshake::new(stream));
        self.advance_handshake(id, poller);
    }

    fn advance_handshake(&mut self, id: u64, poller: &Poller) {
        let Some(handshake) = self.handshakes.get_mut(&id) else {
            return;
        };
        match handshake.advance() {
            Progress::Waiting => {}
            Progress::Refused => {
                self.handshakes.remove(&id);
            }
            Progress::Port(guest) => {
                let Some(handshake) = self.handshakes.remove(&id) else {
                    return;
                };
                let ports = Ports {
                    host: self.new_port(guest),
                    guest,
                };
                let stream = handshake.into_stream();
                let window = self.window();
                let connection = Connection::to_guest(ports, self.guest_cid, stream, window);
                self.add(id, connection, poller);
            }
            Progress::Passed(passed) => {
                if let Some(handshake) = self.handshakes.remove(&id)
                    && let Err(error) = self.add_passed(id, passed, handshake.into_stream(), poller)
                {
                    tracing::warn!(device = "vsock", %error, "can't use what was passed");
                }
            }
        }
    }

    /// Adds the stream of a handshake whose socket is not to carry it.
    fn add_passed(
        &mut self,
        id: u64,
        passed: Passed,
        socket: OwnedFd,
        poller: &Poller,
    ) -> io::Result<()> {
        let Passed { guest, keep, file } = passed;
        let token = self.new_stream();
        poller.modify(
            &socket,
            token,
            EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED,
        )?;
        let control = Control {
            socket: Some(socket),
            keep,
            token,
        };
        let ports = Ports {
            host: self.new_port(guest),
            guest,
        };
        let window = self.window();
        let connection = Connection::passed(ports, self.guest_cid, file, control, window)?;
        self.controls.insert(token, id);
        self.add(id, connection, poller);
        Ok(())
    }

    /// Ends what has not come about in time.
    pub(super) fn expire(&mut self, now: Instant, poller: &Poller) {
        while let Some((deadline, id)) = self.deadlines.front().copied()
            && deadline <= now
        {
            self.deadlines.pop_front();
            self.handshakes.remove(&id);
            if let Some(connection) = self.connections.get(&id).filter(|it| it.is_pending()) {
                let fate = connection.abandon();
                self.settle(id, fate, poller);
            }
        }
        if self.accept_again.is_some_and(|again| again <= now) {
            self.accept(poller);
        }
    }

    /// When `expire` has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let setup = self.deadlines.front().map(|(deadline, _)| *deadline);
        setup.into_iter().chain(self.accept_again).min()
    }

    /// Drops every stream without a word: the guest has forgotten them (section 5.10.6.7).
    pub(super) fn drop_streams(&mut self) {
        self.handshakes.clear();
        self.connections.clear();
        self.controls.clear();
        self.by_ports.clear();
        self.line.clear();
        self.resets.clear();
        self.deadlines.clear();
    }

    fn add(&mut self, id: u64, mut connection: Connection, poller: &Poller) {
        let events = connection.interest();
        connection.watched = events;
        // One that was a handshake is watched already. Either way the host's bytes that are there
        // now make an event.
        let watched = poller
            .modify(&connection, id, events)
            .or_else(|_| poller.add(&connection, id, events));
        let fate = match watched {
            Ok(()) => Fate::Lives,
            Err(_) => connection.abandon(),
        };
        self.by_ports.insert(connection.ports(), id);
        self.connections.insert(id, connection);
        self.settle(id, fate, poller);
    }

    /// Does what follows from a stream's new state.
    fn settle(&mut self, id: u64, fate: Fate, poller: &Poller) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if matches!(fate, Fate::Reset | Fate::ResetAndDrain) {
            self.resets.push_back(connection.header(Operation::Reset));
        }
        if matches!(fate, Fate::Lives | Fate::ResetAndDrain) {
            let events = connection.interest();
            if events != connection.watched {
                // Can't fail: the stream is watched already.
                let _ = poller.modify(connection, id, events);
                connection.watched = events;
            }
            if !connection.in_line && connection.has_work() {
                connection.in_line = true;
                self.line.push_back(id);
            }
        }
        if fate != Fate::Lives {
            let ports = connection.ports();
            if self.by_ports.get(&ports) == Some(&id) {
                self.by_ports.remove(&ports);
            }
        }
        if matches!(fate, Fate::Reset | Fate::Gone)
            && let Some(connection) = self.connections.remove(&id)
            && let Some(token) = connection.control_token()
        {
            self.controls.remove(&token);
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len().saturating_add(self.handshakes.len()) >= MAX_STREAMS
    }

    /// The window of one more stream.
    fn window(&self) -> u32 {
        let streams = self.connections.len().saturating_add(1).next_power_of_two();
        let share = WINDOW_BUDGET.checked_div(streams).unwrap_or_default();
        u32::try_from(share.clamp(SMALLEST_WINDOW, LARGEST_WINDOW)).unwrap_or_default()
    }

    /// A name for a stream; names are never used again, so that a late event finds nothing.
    fn new_stream(&mut self) -> u64 {
        let id = self.next_stream;
        self.next_stream = self.next_stream.wrapping_add(1).max(FIRST_STREAM);
        id
    }

    /// A host port that no stream to this guest port has.
    fn new_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            // The last number means "any port".
            self.next_port = match host.wrapping_add(1) {
                0..FIRST_PORT | u32::MAX => FIRST_PORT,
                next => next,
            };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }
}
