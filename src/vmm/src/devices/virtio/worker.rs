// SPDX-License-Identifier: Apache-2.0
//! The thread that runs a device's queues: an epoll loop with a stop event.
//!
//! The worker owns its handler, so queues, files and buffers belong to one thread and need no
//! lock. It ends when `Worker::stop` is called or the `Worker` is dropped; whatever the handler
//! holds is dropped on its own thread, before `stop` returns.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DeviceFault, Interrupt};

/// The stop event's token; a handler's own tokens lie below it.
const STOP: u64 = u64::MAX;

/// Events taken from the kernel at a time.
const BATCH: usize = 16;

/// The descriptors that a worker waits for. Level-triggered unless the events say otherwise.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
        })
    }

    /// Waits for `events` of `source` from now on and reports them with `token`
    /// (`u64::MAX` is taken).
    ///
    /// # Errors
    /// The descriptor is there already, can't be polled, or the kernel is out of memory.
    pub fn add(&self, source: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, source.as_raw_fd(), token, events)
    }

    /// Changes what a descriptor is waited for.
    ///
    /// # Errors
    /// The descriptor was never added.
    pub fn modify(&self, source: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, source.as_raw_fd(), token, events)
    }

    /// Forgets a descriptor; do so before closing it.
    ///
    /// # Errors
    /// The descriptor was never added.
    pub fn remove(&self, source: &impl AsRawFd) -> io::Result<()> {
        let none = EventSet::empty();
        self.control(ControlOperation::Delete, source.as_raw_fd(), 0, none)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, token))
    }
}

/// What a device does on its worker.
pub trait EventHandler {
    /// Adds the descriptors to wait for; runs before the worker's start is reported.
    ///
    /// # Errors
    /// A descriptor can't be polled.
    fn register(&mut self, poller: &Poller) -> io::Result<()>;

    /// Serves the descriptor that was added with `token`. Work per call is bounded (a queue's
    /// size), so that a busy guest can't keep the worker from its stop event.
    ///
    /// # Errors
    /// The device can't go on: the worker marks it DEVICE_NEEDS_RESET and ends.
    fn handle(&mut self, poller: &Poller, token: u64, events: EventSet) -> Result<(), DeviceFault>;
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread called `name` (15 bytes are shown). A fault of the handler goes to
    /// `interrupt` and to the log under `name`.
    ///
    /// # Errors
    /// No descriptor or thread is to be had.
    pub fn spawn(
        name: &str,
        interrupt: Arc<dyn Interrupt>,
        mut handler: impl EventHandler + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let poller = Poller::new()?;
        poller.add(&stop, STOP, EventSet::IN)?;
        handler.register(&poller)?;
        let device = name.to_owned();
        let thread = thread::Builder::new()
            .name(device.clone())
            .spawn(move || run(&device, &poller, &*interrupt, handler))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// The same for a handler that can't leave the thread it was made on: `make` runs on the new
    /// thread.
    ///
    /// # Errors
    /// No descriptor or thread is to be had, or `make` failed.
    pub fn spawn_with<H: EventHandler>(
        name: &str,
        interrupt: Arc<dyn Interrupt>,
        make: impl FnOnce() -> io::Result<H> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let poller = Poller::new()?;
        poller.add(&stop, STOP, EventSet::IN)?;
        let (report, outcome) = mpsc::sync_channel(1);
        let device = name.to_owned();
        let thread = thread::Builder::new().name(device.clone()).spawn(move || {
            let made = make().and_then(|mut handler| {
                handler.register(&poller)?;
                Ok(handler)
            });
            // Fails only if the starter is gone, and it waits.
            match made {
                Ok(handler) => {
                    let _ = report.send(Ok(()));
                    run(&device, &poller, &*interrupt, handler);
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                }
            }
        })?;
        let worker = Self {
            stop,
            thread: Some(thread),
        };
        match outcome.recv() {
            Ok(Ok(())) => Ok(worker),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the worker's thread ended at its start")),
        }
    }

    /// Ends the worker and waits until it has: nothing of it touches guest memory afterwards.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            // Cannot be: the counter is never near its end, and joining would wait for ever.
            tracing::error!(%error, "can't stop a device's worker");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a device's worker had panicked");
        }
    }
}

fn run(device: &str, poller: &Poller, interrupt: &dyn Interrupt, mut handler: impl EventHandler) {
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let count = match poller.epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(device, %error, "the worker can't wait for events");
                interrupt.device_needs_reset();
                return;
            }
        };
        let ready = events.get(..count).unwrap_or_default();
        if ready.iter().any(|event| event.data() == STOP) {
            return;
        }
        for event in ready {
            if let Err(fault) = handler.handle(poller, event.data(), event.event_set()) {
                tracing::warn!(
                    device,
                    error = &fault as &dyn std::error::Error,
                    "device failed"
                );
                interrupt.device_needs_reset();
                // The thread ends: the guest holds the other end of the kicks, and could keep it
                // busy for nothing.
                return;
            }
        }
    }
}
