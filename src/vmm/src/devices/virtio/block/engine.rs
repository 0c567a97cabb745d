// SPDX-License-Identifier: Apache-2.0
//! How the requests of a queue reach the file: one after the other, or, where the host's kernel has io_uring, those
//! that are one operation of its beside each other.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::direct::Share;
use super::request::{Disk, Request, answer};
use crate::devices::virtio::{DeviceFault, Poller};
use crate::sys::uring::{Operation, Ring};

/// A chain that was served: its head, and the bytes written to it.
pub(super) type Served = (u16, u32);

/// How requests reach the file.
#[derive(Debug)]
pub(super) enum Engine {
    /// One after the other.
    InTurn,
    /// Beside each other, from the first one on: a ring takes its time to make, and a guest boots meanwhile.
    RingToBe,
    /// Beside each other.
    Ring(Box<Ring<Pending>>),
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Pending {
    head: u16,
    status: GuestAddress,
    operation: Operation,
    bytes: usize,
    /// Held until it is done.
    _share: Option<Share>,
}

impl Engine {
    /// Is ready for as many requests at a time, and has `poller` tell of their ends with `token`.
    pub(super) fn prepare(&mut self, disk: &Disk, requests: u16, poller: &Poller, token: u64) {
        if !matches!(self, Self::RingToBe) {
            return;
        }
        let ring = Ring::new(&disk.file, requests).and_then(|ring| {
            poller.add(ring.event(), token, EventSet::IN)?;
            Ok(ring)
        });
        *self = match ring {
            Ok(ring) => Self::Ring(Box::new(ring)),
            Err(error) => {
                tracing::info!(disk = disk.name, %error, "no io_uring: requests are served in turn");
                Self::InTurn
            }
        };
    }

    /// Begins a request, if it can go on beside others.
    pub(super) fn start(
        &mut self,
        disk: &Disk,
        memory: &Arc<GuestMemoryMmap>,
        head: u16,
        request: &Request<'_>,
    ) -> bool {
        let Self::Ring(ring) = self else {
            return false;
        };
        let Some(transfer) = disk.transfer_of(request) else {
            return false;
        };
        let operation = transfer.operation;
        let writes = operation == Operation::Write;
        let pending = Pending {
            head,
            status: request.status,
            operation,
            bytes: transfer.bytes,
            _share: disk.direct.as_ref().filter(|_| writes).map(|it| it.share()),
        };
        // Refused where a driver offers a chain that it has not got back: served in turn.
        ring.start(
            pending,
            operation,
            memory,
            transfer.buffers,
            transfer.offset,
        )
        .is_ok()
    }

    /// Lets the kernel begin what was started.
    pub(super) fn submit(&mut self) -> Result<(), DeviceFault> {
        match self {
            Self::Ring(ring) => ring.submit().map_err(fault),
            _ => Ok(()),
        }
    }

    /// Answers the requests that are done.
    pub(super) fn finish(
        &mut self,
        disk: &Disk,
        memory: &GuestMemoryMmap,
        features: u64,
        served: &mut Vec<Served>,
    ) -> Result<(), DeviceFault> {
        let Self::Ring(ring) = self else {
            return Ok(());
        };
        // Nothing to read is fine: what it told of was seen.
        let _ = ring.event().read();
        while let Some((pending, moved)) = ring.completed() {
            let (operation, bytes) = (pending.operation, pending.bytes);
            let outcome = disk.transferred(operation, bytes, moved, features);
            let written = answer(memory, pending.status, outcome)?;
            served.push((pending.head, written));
        }
        // The rest of what was done in part.
        ring.submit().map_err(fault)
    }

    /// Waits until nothing is under way, and answers it.
    pub(super) fn settle(
        &mut self,
        disk: &Disk,
        memory: &GuestMemoryMmap,
        features: u64,
        served: &mut Vec<Served>,
    ) -> Result<(), DeviceFault> {
        while let Self::Ring(ring) = self
            && !ring.is_idle()
        {
            ring.wait().map_err(fault)?;
            self.finish(disk, memory, features, served)?;
        }
        Ok(())
    }
}

fn fault(source: io::Error) -> DeviceFault {
    let what = "can't hand requests to the kernel";
    DeviceFault::Host { what, source }
}
