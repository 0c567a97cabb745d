// SPDX-License-Identifier: Apache-2.0
//! The VMM process: what runs in the child that `client::VmmProcess` spawns.
//!
//! It is given one thing, the control socket, as its standard input, and everything else through
//! it. It serves one machine and ends with it; when the socket closes, because its owner is gone,
//! it ends at once.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{DumpableBehavior, Signal};
use rustix::time::{ClockId, Timespec, clock_gettime};
use thiserror::Error;

use crate::control::{
    Channel, ChannelError, Event, ExitReason, Milestone, PROTOCOL_VERSION, Request, Size, VmConfig,
};
use crate::machine::{Files, Machine, MachineError, MachineEvents};
use crate::sys::process as raw;

/// The code that the guest's PID 1 writes to the progress port first of all.
pub const INIT_CODE: u8 = 0x41;

/// Why the process could not do its work. What goes wrong with a machine is told to the owner by
/// events instead.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// The process was not started as a VMM.
    #[error("standard input is not a control socket")]
    Control(#[source] io::Error),
    /// It can't give up what it must not have.
    #[error("can't {what}")]
    Confine {
        /// What it tried.
        what: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// The control socket failed.
    #[error("can't speak with the owner")]
    Channel(#[from] ChannelError),
    /// Waiting for messages failed.
    #[error("can't wait for messages")]
    Wait(#[source] io::Error),
}

/// Runs the role: confines the process, then serves the control socket until the machine has
/// ended or the owner is gone.
///
/// Call it first of all in a fresh process: it closes every descriptor but 0, 1 and 2.
///
/// # Errors
/// See `ProcessError`.
pub fn run() -> Result<(), ProcessError> {
    let start = now();
    let control = raw::inherit(0).map_err(ProcessError::Control)?;
    confine()?;
    let channel = Channel::new(control);
    let reporter = Arc::new(Reporter {
        channel,
        over: OnceLock::new(),
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| ProcessError::Wait(errno.into()))?,
        init: AtomicBool::new(false),
        detaching: Mutex::new(None),
    });
    reporter.send_milestone(Milestone::ProcessStart, start);
    match serve(&reporter) {
        // The owner is gone: nobody is left to tell.
        Err(ProcessError::Channel(ChannelError::Closed)) => Ok(()),
        other => other,
    }
}

fn confine() -> Result<(), ProcessError> {
    let step = |what| move |source| ProcessError::Confine { what, source };
    raw::close_from(3).map_err(step("close inherited descriptors"))?;
    let dies = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    dies.map_err(io::Error::from)
        .map_err(step("ask to end with the parent"))?;
    rustix::process::chdir("/")
        .map_err(io::Error::from)
        .map_err(step("leave the working directory"))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(io::Error::from)
        .map_err(step("give up new privileges"))?;
    // Guest memory does not belong in a core file, nor in a debugger of the same user.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .map_err(step("forbid core dumps"))
}

fn serve(reporter: &Arc<Reporter>) -> Result<(), ProcessError> {
    let Some(machine) = boot(reporter)? else {
        return Ok(());
    };
    match wait(reporter, &machine) {
        Ok(reason) => {
            let console = machine.halt();
            // Told before the devices end, which may wait for the host for ever.
            let told = reporter
                .channel
                .send(&Event::Exited { reason, console }, &[]);
            machine.close();
            Ok(told?)
        }
        Err(error) => {
            machine.abandon();
            Err(error)
        }
    }
}

/// Waits for the boot request and carries it out. On failure the owner has the reason.
fn boot(reporter: &Arc<Reporter>) -> Result<Option<Machine>, ProcessError> {
    let (request, files) = reporter.channel.receive::<Request>()?;
    let result = match request {
        Request::Boot(config) => build(&config, files, reporter),
        Request::Stop => return Ok(None),
        _ => Err("the first request must be to boot".to_owned()),
    };
    match result {
        Ok(machine) => {
            // Answered first: the owner knows the machine before it hears of its end.
            reporter.channel.send(&Event::Done, &[])?;
            machine.resume();
            Ok(Some(machine))
        }
        Err(text) => {
            reporter.channel.send(&Event::Failed(text), &[])?;
            Ok(None)
        }
    }
}

fn build(
    config: &VmConfig,
    files: Vec<OwnedFd>,
    reporter: &Arc<Reporter>,
) -> Result<Machine, String> {
    if config.version != PROTOCOL_VERSION {
        return Err(format!(
            "the owner speaks version {} of the control protocol, the VMM {PROTOCOL_VERSION}",
            config.version
        ));
    }
    let events = Arc::clone(reporter) as Arc<dyn MachineEvents>;
    let machine = Machine::build(config, &mut Files::new(files), &events);
    machine.map_err(|error| chain(&error))
}

/// Serves requests until the machine has ended.
fn wait(reporter: &Reporter, machine: &Machine) -> Result<ExitReason, ProcessError> {
    let mut told = Told {
        size: machine.size(),
        at: Instant::now(),
    };
    loop {
        if let Some(late) = reporter.late_detach() {
            let text = format!("the guest does not let go of {late}");
            reporter.channel.send(&Event::Failed(text), &[])?;
        }
        let soon = reporter.report_size(machine, &mut told)?;
        let patience = [reporter.patience(), soon].into_iter().flatten().min();
        // Up to the next millisecond, so that it is over then.
        let patience = patience.and_then(|left| {
            Timespec::try_from(left.saturating_add(Duration::from_millis(1))).ok()
        });
        let mut ready = [
            PollFd::new(&reporter.channel, PollFlags::IN),
            PollFd::new(&reporter.wake, PollFlags::IN),
        ];
        rustix::io::retry_on_intr(|| poll(&mut ready, patience.as_ref()))
            .map_err(|errno| ProcessError::Wait(errno.into()))?;
        // Before the looks at what it is about, so that none is missed; nothing to read is fine.
        let _ = rustix::io::read(&reporter.wake, &mut [0; 8]);
        if let Some(reason) = reporter.over.get() {
            return Ok(reason.clone());
        }
        if ready.first().is_none_or(|fd| fd.revents().is_empty()) {
            continue;
        }
        let (request, files) = reporter.channel.receive::<Request>()?;
        let answer = match request {
            Request::Pause => {
                machine.pause();
                Event::Done
            }
            Request::Resume => {
                machine.resume();
                Event::Done
            }
            Request::Stop => {
                reporter.channel.send(&Event::Done, &[])?;
                return Ok(ExitReason::Stopped);
            }
            Request::AttachNet(net) => outcome(machine.attach_net(&net, &mut Files::new(files))),
            Request::AttachBlock(block) => {
                match machine.attach_block(&block, &mut Files::new(files)) {
                    Ok(slot) => Event::Plugged { slot },
                    Err(error) => Event::Failed(chain(&error)),
                }
            }
            // Answered when the guest has let go.
            Request::DetachNet { id } => {
                match reporter.detach(|| machine.request_detach_net(&id)) {
                    Ok(()) => continue,
                    Err(text) => Event::Failed(text),
                }
            }
            Request::DetachBlock { id } => {
                match reporter.detach(|| machine.request_detach_block(&id)) {
                    Ok(()) => continue,
                    Err(text) => Event::Failed(text),
                }
            }
            Request::GrowBlock { id } => outcome(machine.grow_block(&id)),
            Request::ResizeMemory { mib } => outcome(machine.resize_memory(mib)),
            Request::ResizeVcpus { count } => outcome(machine.resize_vcpus(count)),
            Request::RenewGeneration => outcome(machine.renew_generation()),
            Request::Boot(_) => Event::Failed("the machine is there already".to_owned()),
        };
        reporter.channel.send(&answer, &[])?;
    }
}

/// The answer to a request that is carried out at once.
fn outcome(result: Result<(), MachineError>) -> Event {
    match result {
        Ok(()) => Event::Done,
        Err(error) => Event::Failed(chain(&error)),
    }
}

/// Tells the owner what happens, and the main thread when the guest has ended or changed.
#[derive(Debug)]
struct Reporter {
    channel: Channel,
    over: OnceLock<ExitReason>,
    wake: OwnedFd,
    init: AtomicBool,
    /// The device that the guest was asked to let go of, and until when.
    detaching: Mutex<Option<(String, Instant)>>,
}

/// The size that the owner knows.
#[derive(Debug, Clone, Copy)]
struct Told {
    size: Size,
    at: Instant,
}

/// Least time between two sizes that are told.
const SIZE_PAUSE: Duration = Duration::from_millis(100);

/// How long a guest may take to let go of a device. A guest that can't, answers nothing at all.
const DETACH_PATIENCE: Duration = Duration::from_secs(20);

impl Reporter {
    /// Begins a detachment, which `unplugged` or `late_detach` ends.
    fn detach(&self, request: impl FnOnce() -> Result<String, MachineError>) -> Result<(), String> {
        let mut detaching = self.detaching();
        if let Some((name, _)) = &*detaching {
            return Err(format!("{name} is still on its way out"));
        }
        // Under the lock: the guest may be quick.
        let name = request().map_err(|error| chain(&error))?;
        let until = Instant::now().checked_add(DETACH_PATIENCE);
        *detaching = until.map(|until| (name, until));
        Ok(())
    }

    /// The device that the guest should have let go of by now.
    fn late_detach(&self) -> Option<String> {
        let late = |(_, until): &mut (String, Instant)| *until <= Instant::now();
        let (name, _) = self.detaching().take_if(late)?;
        Some(name)
    }

    /// How long to wait for messages at most.
    fn patience(&self) -> Option<Duration> {
        let (_, until) = self.detaching().clone()?;
        Some(until.saturating_duration_since(Instant::now()))
    }

    fn detaching(&self) -> MutexGuard<'_, Option<(String, Instant)>> {
        self.detaching
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the machine's size, if it is another than the last one; or for how long it must not be
    /// told yet. Many changes are told as one: what the guest does must not keep the owner busy.
    fn report_size(
        &self,
        machine: &Machine,
        told: &mut Told,
    ) -> Result<Option<Duration>, ChannelError> {
        let size = machine.size();
        if size == told.size {
            return Ok(None);
        }
        let since = told.at.elapsed();
        if since < SIZE_PAUSE {
            return Ok(Some(SIZE_PAUSE.saturating_sub(since)));
        }
        *told = Told {
            size,
            at: Instant::now(),
        };
        self.channel.send(&Event::Size(size), &[])?;
        Ok(None)
    }

    fn wake(&self) {
        if let Err(error) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "can't wake the main thread");
        }
    }

    fn send_milestone(&self, milestone: Milestone, at_us: u64) {
        let event = Event::Milestone { milestone, at_us };
        if let Err(error) = self.channel.send(&event, &[]) {
            tracing::debug!(%error, "can't tell the owner of a milestone");
        }
    }
}

impl MachineEvents for Reporter {
    fn milestone(&self, milestone: Milestone) {
        self.send_milestone(milestone, now());
    }

    fn progress(&self, code: u8) {
        if code == INIT_CODE && !self.init.swap(true, Ordering::Relaxed) {
            self.milestone(Milestone::Init);
        }
    }

    fn ended(&self, reason: ExitReason) {
        if self.over.set(reason).is_ok() {
            self.wake();
        }
    }

    fn connection(&self, port: u32, stream: OwnedFd) -> io::Result<()> {
        let event = Event::Connection { port };
        let sent = self.channel.try_send(&event, &[stream.as_fd()]);
        sent.map_err(io::Error::other)
    }

    fn resized(&self) {
        self.wake();
    }

    fn unplugged(&self, name: &str) {
        let waited_for = |(other, _): &mut (String, Instant)| other == name;
        if self.detaching().take_if(waited_for).is_some()
            && let Err(error) = self.channel.send(&Event::Done, &[])
        {
            tracing::debug!(%error, "can't tell the owner that a device is gone");
        }
    }
}

/// `CLOCK_MONOTONIC` in microseconds.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds
        .saturating_mul(1_000_000)
        .saturating_add(nanoseconds / 1000)
}

/// An error and its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
