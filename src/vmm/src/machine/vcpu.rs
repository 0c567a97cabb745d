// SPDX-License-Identifier: Apache-2.0
//! The vCPU threads. Each parks until it is told to run; to get it out of the guest, its
//! `immediate_exit` flag is set and a signal sent: the flag covers the moment before KVM_RUN, the
//! signal the time within.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
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
    /// Threads that are outside of the guest and wait for another wish.
    parked: usize,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct Thread {
    exit: Arc<ImmediateExit>,
    handle: JoinHandle<()>,
}

/// All vCPUs of a machine.
#[derive(Debug)]
pub(super) struct Vcpus {
    control: Arc<Control>,
    threads: Vec<Thread>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they are paused.
    pub(super) fn spawn(
        vcpus: Vec<VcpuFd>,
        buses: &Arc<Buses>,
        events: &Arc<dyn MachineEvents>,
    ) -> io::Result<Self> {
        process::install_kick_handler()?;
        let control = Arc::new(Control {
            state: Mutex::new(State {
                wish: Wish::Pause,
                parked: 0,
            }),
            changed: Condvar::new(),
        });
        // Dropped on an error, it stops the threads that have started.
        let mut all = Self {
            control,
            threads: Vec::new(),
        };
        for (id, fd) in vcpus.into_iter().enumerate() {
            let exit = Arc::new(ImmediateExit::new(&fd)?);
            let vcpu = Vcpu {
                id,
                fd,
                exit: Arc::clone(&exit),
                control: Arc::clone(&all.control),
                buses: Arc::clone(buses),
                events: Arc::clone(events),
            };
            let thread = thread::Builder::new().name(format!("vcpu{id}"));
            let handle = thread.spawn(move || vcpu.live())?;
            all.threads.push(Thread { exit, handle });
        }
        Ok(all)
    }

    pub(super) fn pause(&self) {
        self.wish(Wish::Pause);
        let state = self.control.lock();
        let all_parked = self.control.changed.wait_while(state, |state| {
            state.wish == Wish::Pause && state.parked < self.threads.len()
        });
        drop(all_parked);
    }

    pub(super) fn resume(&self) {
        self.wish(Wish::Run);
    }

    /// Ends the threads; none is in the guest when this returns.
    pub(super) fn stop(&mut self) {
        self.wish(Wish::Stop);
        for thread in self.threads.drain(..) {
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
        for thread in &self.threads {
            thread.exit.set(true);
            if let Err(error) = thread.handle.kill(process::kick_signal()) {
                tracing::warn!(%error, "can't signal a vCPU's thread");
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the wish is to pause; whether to run then.
    fn may_run(&self) -> bool {
        let mut state = self.lock();
        if state.wish == Wish::Pause {
            state.parked = state.parked.saturating_add(1);
            self.changed.notify_all();
            while state.wish == Wish::Pause {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            }
            state.parked = state.parked.saturating_sub(1);
        }
        state.wish == Wish::Run
    }

    /// Waits for the wish to stop; counts as parked.
    fn wait_for_stop(&self) {
        let mut state = self.lock();
        state.parked = state.parked.saturating_add(1);
        self.changed.notify_all();
        while state.wish != Wish::Stop {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[derive(Debug)]
struct Vcpu {
    id: usize,
    fd: VcpuFd,
    exit: Arc<ImmediateExit>,
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
    fn live(mut self) {
        let mut first = self.id == 0;
        while self.control.may_run() {
            if first {
                self.events.milestone(Milestone::FirstInstruction);
                first = false;
            } else {
                // Tells the guest's watchdog of the pause; refused where there is no kvm-clock.
                let _ = self.fd.kvmclock_ctrl();
            }
            if let Some(reason) = self.run() {
                self.events.ended(reason);
                self.control.wait_for_stop();
                return;
            }
        }
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
                    if self.control.lock().wish != Wish::Run {
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
