// SPDX-License-Identifier: Apache-2.0
//! The device on its worker: serves the guest's kicks and the host's sockets.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::muxer::{Filled, LISTENER, Muxer};
use super::packet::{Buffers, Packet};
use super::queues::Receiver;
use crate::devices::virtio::{
    ActiveQueue, DeviceFault, EventHandler, GuestMemory, Interrupt, Poller,
};

/// The most packets of the guest taken between two looks at what else there is to do.
const MAX_PACKETS: usize = 128;

/// Length of an event on the event queue, in bytes.
const EVENT_LEN: usize = 4;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` as an event: all streams are gone, and the guest's
/// context ID may have changed.
const TRANSPORT_RESET: [u8; EVENT_LEN] = [0; EVENT_LEN];

const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const EVENT_KICK: u64 = 2;
const RESET_TRANSPORT: u64 = 3;
const AGAIN: u64 = 4;
const DEADLINE: u64 = 5;

/// The device's queues, in the order of section 5.10.2.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) receive: ActiveQueue,
    pub(super) transmit: ActiveQueue,
    pub(super) event: ActiveQueue,
}

/// All that the worker owns.
#[derive(Debug)]
pub(super) struct Handler {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    queues: Queues,
    muxer: Muxer,
    /// Written by the device to have the transport reset.
    reset_transport: EventFd,
    /// Written by ourselves when work is left that no event will announce.
    again: EventFd,
    timer: OwnedFd,
    /// What the timer is set to.
    deadline: Option<Instant>,
    /// The transmit queue may hold packets.
    packets_wait: bool,
    /// The guest must hear that its streams are gone.
    reset_due: bool,
}

impl Handler {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        queues: Queues,
        muxer: Muxer,
        reset_transport: EventFd,
    ) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            memory,
            interrupt,
            queues,
            muxer,
            reset_transport,
            again: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            deadline: None,
            packets_wait: false,
            reset_due: false,
        })
    }

    fn serve(&mut self, poller: &Poller) -> Result<(), DeviceFault> {
        let memory = self.memory.memory();
        let memory: &GuestMemoryMmap = &memory;
        if self.reset_due {
            self.send_reset(memory)?;
        }
        self.take_packets(memory, poller)?;
        let receive = &mut self.queues.receive;
        let filled = self
            .muxer
            .fill(&mut Receiver::new(receive, memory), poller)?;
        let more = match filled {
            Filled::All => false,
            Filled::Starved => receive.arm(memory)?,
            Filled::Partly => true,
        };
        // An answer that left makes room for another packet.
        if more || (self.packets_wait && self.muxer.takes_packets()) {
            // Fails only if the counter is at its maximum, and then we are told already.
            let _ = self.again.write(1);
        }
        let interrupt = self.interrupt.as_ref();
        self.queues.transmit.signal(memory, interrupt)?;
        self.queues.receive.signal(memory, interrupt)?;
        self.queues.event.signal(memory, interrupt)?;
        self.set_timer().map_err(|source| DeviceFault::Host {
            what: "can't set a timer",
            source,
        })
    }

    fn take_packets(
        &mut self,
        memory: &GuestMemoryMmap,
        poller: &Poller,
    ) -> Result<(), DeviceFault> {
        let queue = &mut self.queues.transmit;
        for _ in 0..MAX_PACKETS {
            if !self.packets_wait || !self.muxer.takes_packets() {
                return Ok(());
            }
            let Some(chain) = queue.pop(memory)? else {
                self.packets_wait = queue.arm(memory)?;
                continue;
            };
            let head = chain.head_index();
            // A chain without even a header has nobody to complain to.
            if let Ok(packet) = Buffers::readable(memory, chain).and_then(Packet::new) {
                self.muxer.receive(&packet, poller);
            }
            queue.complete(memory, head, 0)?;
        }
        Ok(())
    }

    /// Sends the transport reset as soon as the guest has a buffer for it.
    fn send_reset(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceFault> {
        let queue = &mut self.queues.event;
        loop {
            let Some(chain) = queue.pop(memory)? else {
                if queue.arm(memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let buffer = chain
                .writable()
                .next()
                .filter(|part| usize::try_from(part.len()).is_ok_and(|len| len >= EVENT_LEN));
            let written = buffer
                .is_some_and(|part| memory.write_slice(&TRANSPORT_RESET, part.addr()).is_ok());
            let len = u32::try_from(EVENT_LEN).unwrap_or_default();
            queue.complete(memory, head, if written { len } else { 0 })?;
            if written {
                self.reset_due = false;
                return Ok(());
            }
        }
    }

    /// Has the timer fire when the muxer's next deadline comes.
    fn set_timer(&mut self) -> io::Result<()> {
        let deadline = self.muxer.next_deadline();
        if deadline == self.deadline {
            return Ok(());
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = match left {
            // Zero would disarm it.
            Some(left) if left.is_zero() => Timespec { tv_nsec: 1, ..zero },
            Some(left) => Timespec::try_from(left).map_err(io::Error::other)?,
            None => zero,
        };
        let once = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.deadline = deadline;
        Ok(())
    }
}

impl EventHandler for Handler {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        let events = [
            (RECEIVE_KICK, self.queues.receive.kick()),
            (TRANSMIT_KICK, self.queues.transmit.kick()),
            (EVENT_KICK, self.queues.event.kick()),
            (RESET_TRANSPORT, &self.reset_transport),
            (AGAIN, &self.again),
        ];
        for (token, event) in events {
            poller.add(event, token, EventSet::IN)?;
        }
        poller.add(&self.timer.as_raw_fd(), DEADLINE, EventSet::IN)?;
        self.muxer.register(poller)?;
        // Whatever the driver did before there was a worker to kick.
        self.packets_wait = true;
        self.again.write(1)
    }

    fn handle(&mut self, poller: &Poller, token: u64, events: EventSet) -> Result<(), DeviceFault> {
        match token {
            RECEIVE_KICK => self.queues.receive.forget_kicks(),
            TRANSMIT_KICK => {
                self.queues.transmit.forget_kicks();
                self.packets_wait = true;
            }
            EVENT_KICK => self.queues.event.forget_kicks(),
            RESET_TRANSPORT => {
                drain(&self.reset_transport);
                self.muxer.drop_streams();
                self.reset_due = true;
            }
            AGAIN => drain(&self.again),
            DEADLINE => {
                // Nothing to read if it was set anew meanwhile.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.deadline = None;
                self.muxer.expire(Instant::now(), poller);
            }
            LISTENER.. => self.muxer.on_host_event(token, events, poller),
            _ => {}
        }
        self.serve(poller)
    }
}

fn drain(event: &EventFd) {
    // Nothing to read is fine: what it announced is looked at in any case.
    let _ = event.read();
}
