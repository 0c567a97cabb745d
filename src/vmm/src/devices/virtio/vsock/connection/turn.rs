// SPDX-License-Identifier: Apache-2.0
//! What a stream has for the guest, and how it says it: a bounded amount a turn.

use std::io::ErrorKind;

use super::{Connection, Phase};
use crate::devices::virtio::DeviceFault;
use crate::devices::virtio::vsock::packet::Operation;
use crate::devices::virtio::vsock::queues::{ReceiveBuffer, Receiver};

/// The most bytes that a stream moves to the guest in one turn.
const MAX_TURN: u32 = 64 * 1024;

/// The most buffers of the guest that one turn fills.
const MAX_BUFFERS: usize = 64;

/// What a stream has for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Nothing,
    Control(Operation),
    Data,
}

/// How a turn went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::devices::virtio::vsock) enum Turn {
    /// Something was done, and there may be more.
    Taken,
    /// The guest has no buffer for it.
    Starved,
    /// As `Fate::Reset`.
    Reset,
}

impl Connection {
    /// Whether there is something for the guest.
    pub(in crate::devices::virtio::vsock) fn has_work(&self) -> bool {
        self.due() != Due::Nothing
    }

    fn due(&self) -> Due {
        match self.phase {
            Phase::Requesting => return Due::Control(Operation::Request),
            Phase::Responding => return Due::Control(Operation::Response),
            Phase::Requested | Phase::Draining => return Due::Nothing,
            Phase::Open => {}
        }
        if self.announced != self.host_closed {
            return Due::Control(Operation::Shutdown);
        }
        if self.readable && !self.host_closed.send && !self.guest_closed.receive {
            if self.grant.available() > 0 {
                return Due::Data;
            }
            if !self.credit_asked {
                return Due::Control(Operation::CreditRequest);
            }
        }
        if self.credit_wanted || self.window.update_due() {
            return Due::Control(Operation::CreditUpdate);
        }
        Due::Nothing
    }

    /// Sends the guest one packet of control, or a bounded amount of data.
    pub(in crate::devices::virtio::vsock) fn take_turn(
        &mut self,
        receiver: &mut Receiver<'_, '_>,
    ) -> Result<Turn, DeviceFault> {
        match self.due() {
            Due::Nothing => Ok(Turn::Taken),
            Due::Control(operation) => self.send_control(operation, receiver),
            Due::Data => self.send_data(receiver),
        }
    }

    fn send_control(
        &mut self,
        operation: Operation,
        receiver: &mut Receiver<'_, '_>,
    ) -> Result<Turn, DeviceFault> {
        let Some(buffer) = receiver.next()? else {
            return Ok(Turn::Starved);
        };
        let mut header = self.header(operation);
        self.credit_wanted = false;
        match operation {
            Operation::Request => self.phase = Phase::Requested,
            Operation::Response => self.phase = Phase::Open,
            Operation::CreditRequest => self.credit_asked = true,
            Operation::Shutdown => {
                header.flags = self.host_closed.flags();
                self.announced = self.host_closed;
            }
            Operation::Reset | Operation::ReadWrite | Operation::CreditUpdate => {}
        }
        receiver.deliver(&buffer, &header)?;
        Ok(Turn::Taken)
    }

    /// Reads from the host's socket right into the guest's buffers: as many as the guest's credit
    /// and the turn allow, by one system call.
    fn send_data(&mut self, receiver: &mut Receiver<'_, '_>) -> Result<Turn, DeviceFault> {
        let allowed = self.grant.available().min(MAX_TURN);
        let allowed = usize::try_from(allowed).unwrap_or_default();
        let mut buffers = Vec::with_capacity(MAX_BUFFERS);
        let mut slices = Vec::with_capacity(MAX_BUFFERS);
        let mut room: usize = 0;
        while room < allowed && buffers.len() < MAX_BUFFERS {
            let Some(buffer) = receiver.next()? else {
                break;
            };
            for slice in buffer.data() {
                let here = allowed.saturating_sub(room).min(slice.len());
                if let Ok(part) = slice.subslice(0, here) {
                    slices.push(part);
                    room = room.saturating_add(here);
                }
            }
            buffers.push(buffer);
        }
        if buffers.is_empty() {
            return Ok(Turn::Starved);
        }
        let count = match self.endpoint.receive(&slices) {
            Ok(count) => count,
            Err(error) => {
                receiver.give_back(buffers.len());
                if error.kind() != ErrorKind::WouldBlock {
                    return Ok(Turn::Reset);
                }
                self.readable = false;
                return Ok(Turn::Taken);
            }
        };
        if count == 0 {
            receiver.give_back(buffers.len());
            self.host_closed.send = true;
            self.host_closed.receive |= self.endpoint.has_hung_up();
            return Ok(Turn::Taken);
        }
        self.deliver_data(count, &buffers, receiver)?;
        Ok(Turn::Taken)
    }

    fn deliver_data(
        &mut self,
        count: usize,
        buffers: &[ReceiveBuffer<'_>],
        receiver: &mut Receiver<'_, '_>,
    ) -> Result<(), DeviceFault> {
        let mut left = count;
        let mut filled: usize = 0;
        for buffer in buffers {
            let here = left.min(buffer.room());
            if here == 0 {
                break;
            }
            left = left.saturating_sub(here);
            filled = filled.saturating_add(1);
            let mut header = self.header(Operation::ReadWrite);
            header.len = u32::try_from(here).unwrap_or(u32::MAX);
            self.grant.sent(header.len);
            receiver.deliver(buffer, &header)?;
        }
        self.credit_wanted = false;
        receiver.give_back(buffers.len().saturating_sub(filled));
        Ok(())
    }
}
