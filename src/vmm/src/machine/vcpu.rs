// SPDX-License-Identifier: Apache-2.0
//! The vCPU threads. Each parks until it is told to run; to get it out of the guest, its
//! `immediate_exit` flag is set and a signal sent: the flag covers the moment before KVM_RUN, the
//! signal the time within.
//!
//! A vCPU that the guest lets go of leaves its thread. KVM keeps it, and so do we, for the next time
//! that it is plugged.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::signal::Killable;

use super::MachineEvents;
use crate::bus::Bus;
use crate::control::{ExitReason, Milestone};
use crate::sys::kvm::{ImmediateExit, internal_error};
use crate::sys::process;

/// The address spaces that a vCPU reaches.
#[derive(Debug)]
pub(super) struct Buses {
    pub(super) memory: Bus,
    pub(super) ports: Bus,
}

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Pause,
    Run,
    Stop,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    /// Threads that have not left their vCPU.
    alive: usize,
    /// Of these, threads that are outside of the guest and wait for another wish.
    parked: usize,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct Thread {
    id: u8,
    exit: Arc<ImmediateExit>,
    retired: Arc<AtomicBool>,
    handle: JoinHandle<Option<VcpuFd>>,
}

impl Thread {
    /// Has it look at what is wished of it.
    fn kick(&self) {
        self.exit.set(true);
        if let Err(error) = self.handle.kill(process::kick_signal()) {
            tracing::warn!(%error, "can't signal a vCPU's thread");
        }
    }
}

/// All vCPUs of a machine.
#[derive(Debug)]
pub(super) struct Vcpus {
    control: Arc<Control>,
    events: Arc<dyn MachineEvents>,
    buses: OnceLock<Arc<Buses>>,
    threads: Mutex<Vec<Thread>>,
}

impl Vcpus {
    /// None yet.
    pub(super) fn new(events: &Arc<dyn MachineEvents>) -> io::Result<Self> {
        process::install_kick_handler()?;
        Ok(Self {
            control: Arc::new(Control {
                state: Mutex::new(State {
                    wish: Wish::Pause,
                    alive: 0,
                    parked: 0,
                }),
                changed: Condvar::new(),
            }),
            events: Arc::clone(events),
            buses: OnceLock::new(),
            threads: Mutex::default(),
        })
    }

    /// Starts a thread for each vCPU of the start; they are paused.
    pub(super) fn spawn(&self, vcpus: Vec<VcpuFd>, buses: Buses) -> io::Result<()> {
        let _ = self.buses.set(Arc::new(buses));
        for (id, fd) in (0..).zip(vcpus) {
            self.add(id, fd).map_err(|(_, error)| error)?;
        }
        Ok(())
    }

    /// Starts the thread of a vCPU, which does as the others do. Where there is none to be had the vCPU
    /// comes back: KVM makes no second one.
    pub(super) fn add(&self, id: u8, fd: VcpuFd) -> Result<(), (VcpuFd, io::Error)> {
        let Some(buses) = self.buses.get().map(Arc::clone) else {
            return Err((fd, io::ErrorKind::NotConnected.into()));
        };
        let exit = match ImmediateExit::new(&fd) {
            Ok(exit) => Arc::new(exit),
            Err(error) => return Err((fd, error)),
        };
        let retired = Arc::new(AtomicBool::new(false));
        let (vcpu, given) = sync_channel::<Vcpu>(1);
        let mut threads = self.lock();
        let thread = thread::Builder::new().name(format!("vcpu{id}"));
        let handle = match thread.spawn(move || given.recv().ok().map(Vcpu::live)) {
            Ok(handle) => handle,
            Err(error) => return Err((fd, error)),
        };
        self.control.lock().count_one();
        // There is room for it, and the thread waits.
        let _ = vcpu.send(Vcpu {
            id,
            fd,
            exit: Arc::clone(&exit),
            retired: Arc::clone(&retired),
            control: Arc::clone(&self.control),
            buses,
            events: Arc::clone(&self.events),
        });
        threads.push(Thread {
            id,
            exit,
            retired,
            handle,
        });
        Ok(())
    }

    /// Has the thread of vCPU `id` leave it. Does not wait: it may be the calling one.
    pub(super) fn retire(&self, id: u8) {
        let threads = self.lock();
        let Some(thread) = threads.iter().find(|thread| thread.id == id) else {
            return;
        };
        {
            // Under the lock, so that one that parks sees it.
            let _state = self.control.lock();
            thread.retired.store(true, Ordering::SeqCst);
        }
        self.control.changed.notify_all();
        thread.kick();
    }

    /// The vCPU `id` that was retired; waits for its thread.
    pub(super) fn take_retired(&self, id: u8) -> Option<VcpuFd> {
        let mut threads = self.lock();
        let retired = |thread: &Thread| thread.id == id && thread.retired.load(Ordering::SeqCst);
        let at = threads.iter().position(retired)?;
        let thread = threads.swap_remove(at);
        drop(threads);
        thread.handle.join().ok().flatten()
    }

    /// vCPUs that the guest may run on.
    pub(super) fn count(&self) -> u8 {
        u8::try_from(self.control.lock().alive).unwrap_or(u8::MAX)
    }

    pub(super) fn pause(&self) {
        self.wish(Wish::Pause);
        let state = self.control.lock();
        let all_parked = self.control.changed.wait_while(state, |state| {
            state.wish == Wish::Pause && state.parked < state.alive
        });
        drop(all_parked);
    }

    pub(super) fn resume(&self) {
        self.wish(Wish::Run);
    }

    /// Ends the threads; none is in the guest when this returns.
    pub(super) fn stop(&self) {
        self.wish(Wish::Stop);
        let threads = std::mem::take(&mut *self.lock());
        for thread in threads {
            if thread.handle.join().is_err() {
                tracing::error!("a vCPU's thread had panicked");
            }
        }
    }

    fn wish(&self, wish: Wish) {
        self.control.lock().wish = wish;
        self.control.changed.notify_all();
        if wish == Wish::Run {
            return;
        }
        for thread in &*self.lock() {
            thread.kick();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Thread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    fn count_one(&mut self) {
        self.alive = self.alive.saturating_add(1);
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the wish is to pause; whether to run then.
    fn may_run(&self, retired: &AtomicBool) -> bool {
        let goes = || retired.load(Ordering::SeqCst);
        let mut state = self.lock();
        if state.wish == Wish::Pause {
            state.parked = state.parked.saturating_add(1);
            self.changed.notify_all();
            while state.wish == Wish::Pause && !goes() {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            }
            state.parked = state.parked.saturating_sub(1);
        }
        state.wish == Wish::Run && !goes()
    }

    /// Waits for the wish to stop; counts as parked.
    fn wait_for_stop(&self, retired: &AtomicBool) {
        let mut state = self.lock();
        state.parked = state.parked.saturating_add(1);
        self.changed.notify_all();
        while state.wish != Wish::Stop && !retired.load(Ordering::SeqCst) {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = state.parked.saturating_sub(1);
    }

    /// A thread leaves its vCPU.
    fn leave(&self) {
        let mut state = self.lock();
        state.alive = state.alive.saturating_sub(1);
        self.changed.notify_all();
    }
}

#[derive(Debug)]
struct Vcpu {
    id: u8,
    fd: VcpuFd,
    exit: Arc<ImmediateExit>,
    /// The guest has let go of it.
    retired: Arc<AtomicBool>,
    control: Arc<Control>,
    buses: Arc<Buses>,
    events: Arc<dyn MachineEvents>,
}

/// What follows an exit.
enum Next {
    Run,
    Look,
    End(ExitReason),
}

impl Vcpu {
    /// Its thread. The vCPU is left as it was when it was stopped.
    fn live(mut self) -> VcpuFd {
        let mut first = self.id == 0;
        while self.control.may_run(&self.retired) {
            if first {
                self.events.milestone(Milestone::FirstInstruction);
                first = false;
            } else {
                // Tells the guest's watchdog of the pause; refused where there is no kvm-clock.
                let _ = self.fd.kvmclock_ctrl();
            }
            if let Some(reason) = self.run() {
                self.events.ended(reason);
                self.control.wait_for_stop(&self.retired);
                break;
            }
        }
        self.control.leave();
        if self.retired.load(Ordering::SeqCst) {
            self.events.resized();
        }
        self.fd
    }

    /// Runs the guest until it ends, or somebody wishes for something else.
    fn run(&mut self) -> Option<ExitReason> {
        loop {
            match self.step() {
                Next::Run => {}
                Next::End(reason) => return Some(reason),
                Next::Look => {
                    // The wish is set before the flag, so one of the two is seen.
                    self.exit.set(false);
                    let goes = self.retired.load(Ordering::SeqCst);
                    if goes || self.control.lock().wish != Wish::Run {
                        return None;
                    }
                }
            }
        }
    }

    fn step(&mut self) -> Next {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => return self.failed(error),
        };
        // A string instruction's accesses come as one, wider than any register: devices ignore
        // it.
        match exit {
            VcpuExit::MmioRead(address, data) => self.buses.memory.read(address, data),
            VcpuExit::MmioWrite(address, data) => self.buses.memory.write(address, data),
            VcpuExit::IoIn(port, data) => self.buses.ports.read(port.into(), data),
            VcpuExit::IoOut(port, data) => self.buses.ports.write(port.into(), data),
            VcpuExit::Intr => return Next::Look,
            VcpuExit::Shutdown => return Next::End(ExitReason::TripleFault),
            VcpuExit::InternalError => {
                let code = internal_error(&mut self.fd);
                return self.failure(&format!("internal error {code}"));
            }
            VcpuExit::FailEntry(reason, cpu) => {
                return self.failure(&format!(
                    "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
                ));
            }
            VcpuExit::MemoryFault { gpa, size, .. } => {
                return self.failure(&format!(
                    "no host memory behind {size:#x} bytes at guest address {gpa:#x}"
                ));
            }
            other => {
                let text = format!("unexpected exit {other:?}");
                return self.failure(&text);
            }
        }
        Next::Run
    }

    fn failed(&self, error: errno::Error) -> Next {
        match error.errno() {
            // EAGAIN: a vCPU that waits for its INIT was woken.
            libc::EINTR | libc::EAGAIN => Next::Look,
            _ => self.failure(&format!("KVM_RUN failed: {error}")),
        }
    }

    fn failure(&self, text: &str) -> Next {
        Next::End(ExitReason::Failure(format!("vCPU {}: {text}", self.id)))
    }
}
