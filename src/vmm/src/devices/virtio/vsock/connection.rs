// SPDX-License-Identifier: Apache-2.0
//! One stream between a guest's socket and a host's.
//!
//! The two directions are not alike. What the guest sends arrives when the guest likes and is
//! written to the host's socket at once, or kept until that socket has room again; the window
//! bounds it. What the host sends stays in its socket until it is this stream's turn, the guest
//! has granted room for it and has buffers; so nothing of it is ever kept here.

mod turn;

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::Shutdown;
use vmm_sys_util::epoll::EventSet;

pub(super) use self::turn::Turn;
use super::HOST_CID;
use super::backlog::Backlog;
use super::credit::{Grant, Window};
use super::endpoint::{Control, Endpoint};
use super::packet::{Buffers, Closed, Header, Operation, TYPE_STREAM};

/// What a stream is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host has asked for it; the guest does not know yet.
    Requesting,
    /// The guest has been asked.
    Requested,
    /// The guest has asked for it, and the host has it; the guest does not know yet.
    Responding,
    Open,
    /// For the guest it is over; the host has yet to take the last bytes.
    Draining,
}

/// What becomes of a stream after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Lives,
    /// The guest must be told by RST; nothing is left to do.
    Reset,
    /// The guest must be told by RST, but the host has yet to take the last bytes.
    ResetAndDrain,
    /// Nothing is left to do, and the guest knows.
    Gone,
}

/// A stream.
#[derive(Debug)]
pub(super) struct Connection {
    ports: Ports,
    guest_cid: u64,
    endpoint: Endpoint,
    /// Of a stream whose end was passed.
    control: Option<Control>,
    phase: Phase,
    grant: Grant,
    window: Window,
    backlog: Backlog,
    /// What the guest has closed.
    guest_closed: Closed,
    /// What the host has closed, as its end of the stream shows.
    host_closed: Closed,
    /// What of `host_closed` the guest has been told.
    announced: Closed,
    /// The host's socket may have bytes or its end for us.
    readable: bool,
    /// The guest wants to know its credit.
    credit_wanted: bool,
    /// We have asked the guest for credit and not got any since.
    credit_asked: bool,
    /// It stands in line for a turn.
    pub(super) in_line: bool,
    /// The events of the host's socket that are being waited for.
    pub(super) watched: EventSet,
}

impl Connection {
    /// A stream that a host program asks the guest for.
    pub(super) fn to_guest(ports: Ports, guest_cid: u64, stream: OwnedFd, window: u32) -> Self {
        let endpoint = Endpoint::socket(stream);
        Self::new(ports, guest_cid, endpoint, window, Phase::Requesting)
    }

    /// A stream that a host program asks the guest for, with what it has passed at its end.
    pub(super) fn passed(
        ports: Ports,
        guest_cid: u64,
        file: OwnedFd,
        control: Control,
        window: u32,
    ) -> io::Result<Self> {
        let endpoint = Endpoint::passed(file)?;
        let host_closed = endpoint.closed()?;
        Ok(Self {
            host_closed,
            control: Some(control),
            ..Self::new(ports, guest_cid, endpoint, window, Phase::Requesting)
        })
    }

    /// A stream that the guest asked for and the host took.
    pub(super) fn from_guest(
        request: &Header,
        ports: Ports,
        guest_cid: u64,
        stream: OwnedFd,
        window: u32,
    ) -> Self {
        let endpoint = Endpoint::socket(stream);
        let mut connection = Self::new(ports, guest_cid, endpoint, window, Phase::Responding);
        connection.grant.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(ports: Ports, guest_cid: u64, endpoint: Endpoint, window: u32, phase: Phase) -> Self {
        Self {
            ports,
            guest_cid,
            endpoint,
            control: None,
            phase,
            grant: Grant::default(),
            window: Window::new(window),
            backlog: Backlog::default(),
            guest_closed: Closed::default(),
            host_closed: Closed::default(),
            announced: Closed::default(),
            readable: false,
            credit_wanted: false,
            credit_asked: false,
            in_line: false,
            watched: EventSet::empty(),
        }
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    /// What the events of the socket are known by that its end was passed over.
    pub(super) fn control_token(&self) -> Option<u64> {
        self.control.as_ref().map(|control| control.token)
    }

    /// Whether the guest has not yet answered the request for this stream.
    pub(super) fn is_pending(&self) -> bool {
        matches!(self.phase, Phase::Requesting | Phase::Requested)
    }

    /// The events of the host's socket that matter now. Each comes once (edge-triggered), as `readable`
    /// remembers; room to write matters only while something waits for it.
    pub(super) fn interest(&self) -> EventSet {
        let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.backlog.is_empty() {
            always
        } else {
            always | EventSet::OUT
        }
    }

    /// Ends a stream for a reason of our own; whether the guest must be told.
    pub(super) fn abandon(&self) -> Fate {
        match self.phase {
            Phase::Requesting | Phase::Draining => Fate::Gone,
            Phase::Requested | Phase::Responding | Phase::Open => Fate::Reset,
        }
    }

    /// A header to the guest, with all but its length.
    pub(super) fn header(&mut self, operation: Operation) -> Header {
        let (buf_alloc, fwd_cnt) = self.window.announce();
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            socket_type: TYPE_STREAM,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
        .with_operation(operation)
    }

    /// Takes a packet from the guest.
    pub(super) fn receive(
        &mut self,
        operation: Operation,
        header: &Header,
        data: &Buffers<'_>,
    ) -> Fate {
        self.grant.update(header.buf_alloc, header.fwd_cnt);
        if self.grant.available() > 0 {
            self.credit_asked = false;
        }
        match (operation, self.phase) {
            (Operation::Reset, _) => Fate::Gone,
            (Operation::Response, Phase::Requested) => self.established(),
            (Operation::ReadWrite, Phase::Open) => self.take_data(data),
            (Operation::Shutdown, Phase::Open) => {
                self.guest_closes(Closed::from_flags(header.flags))
            }
            (Operation::CreditUpdate, Phase::Open) => Fate::Lives,
            (Operation::CreditRequest, Phase::Open) => {
                self.credit_wanted = true;
                Fate::Lives
            }
            _ => Fate::Reset,
        }
    }

    fn established(&mut self) -> Fate {
        self.phase = Phase::Open;
        let answer = format!("OK {}\n", self.ports.host);
        let answer = answer.as_bytes();
        let sent = match &mut self.control {
            Some(control) => control.answer(answer),
            None => self.endpoint.send_bytes(answer),
        };
        // The first bytes on this socket: they fit, or the host is gone.
        match sent {
            Ok(sent) if sent == answer.len() => Fate::Lives,
            _ => Fate::Reset,
        }
    }

    fn take_data(&mut self, data: &Buffers<'_>) -> Fate {
        let Ok(len) = u32::try_from(data.len()) else {
            return Fate::Reset;
        };
        if self.guest_closed.send || !self.window.receive(len) {
            return Fate::Reset;
        }
        if self.host_closed.receive {
            // The guest could not know yet; the bytes have nowhere to go.
            self.window.forward(len);
            return Fate::Lives;
        }
        let mut sent = 0;
        if self.backlog.is_empty() && len > 0 {
            match self.endpoint.send(data.slices()) {
                Ok(count) => sent = count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.window.forward(len);
                    self.host_stopped_reading();
                    return Fate::Lives;
                }
            }
        }
        self.forwarded(sent);
        if sent < data.len() {
            self.backlog.push_guest(data.slices(), sent);
        }
        Fate::Lives
    }

    fn forwarded(&mut self, count: usize) {
        self.window
            .forward(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn host_stopped_reading(&mut self) {
        let lost = self.backlog.clear();
        self.forwarded(lost);
        self.host_closed.receive = true;
    }

    fn guest_closes(&mut self, closed: Closed) -> Fate {
        self.guest_closed = self.guest_closed.and(closed);
        if self.guest_closed == Closed::BOTH {
            if self.backlog.is_empty() {
                return Fate::Reset;
            }
            self.phase = Phase::Draining;
            return Fate::ResetAndDrain;
        }
        if closed.receive {
            // From now on the host's writes fail, as they would on any closed socket.
            self.endpoint.shutdown(Shutdown::Read);
        }
        if closed.send && self.backlog.is_empty() {
            self.endpoint.shutdown(Shutdown::Write);
        }
        Fate::Lives
    }

    /// Takes note of what happened to the host's socket.
    pub(super) fn on_host_event(&mut self, event: EventSet) -> Fate {
        let ended = EventSet::HANG_UP | EventSet::ERROR;
        if event.intersects(EventSet::IN | EventSet::READ_HANG_UP | ended) {
            self.readable = true;
        }
        if event.intersects(ended) {
            // A pipe without a writer may get one.
            if self.is_pending() && self.control.is_none() {
                return self.abandon();
            }
            if self.host_closed.send {
                self.host_closed.receive = true;
            }
            if self.guest_closed.receive {
                // Nobody will read up to the end, so this is the end.
                self.host_closed = Closed::BOTH;
            }
        }
        if event.intersects(EventSet::OUT | ended) {
            return self.flush();
        }
        Fate::Lives
    }

    /// Writes the backlog to the host.
    fn flush(&mut self) -> Fate {
        while !self.backlog.is_empty() {
            match self.endpoint.send_bytes(self.backlog.bytes()) {
                Ok(count) => {
                    self.backlog.pop(count);
                    self.forwarded(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Fate::Lives,
                Err(_) => {
                    self.host_stopped_reading();
                }
            }
            if self.backlog.is_empty() && self.guest_closed.send {
                self.endpoint.shutdown(Shutdown::Write);
            }
        }
        if self.phase == Phase::Draining {
            Fate::Gone
        } else {
            Fate::Lives
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.endpoint.as_raw_fd()
    }
}
