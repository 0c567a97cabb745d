// SPDX-License-Identifier: Apache-2.0
//! The sandbox's virtual machine: a child process in the role `vmm`, and what it reports.

mod requests;

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{Level, debug, error, info};
use vmm::client::{ClientError, VmmProcess};
use vmm::control::{
    Block, Boot, ChannelError, Console, Event, FileIndex, Filesystem, FsCache, Net,
    PROTOCOL_VERSION, RateLimits, Request, Size, VmConfig, Vsock,
};

pub(crate) use self::requests::DiskSettings;
use super::cgroup::Cgroups;
use super::ended::{Ended, describe, died, last_lines};
use super::share;
use crate::cli::{PROGRAM, VMM_ROLE};
use crate::error::{Context, Kind, Result, ShimError};
use crate::network::{Device, Namespace};

/// The vsock port of the host that the agent connects to when it listens.
pub(crate) const READY_PORT: u32 = 1024;

/// The guest's CID. Each machine has a socket device of its own, so all may have the same.
const GUEST_CID: u32 = 3;

/// How long a machine may take to stop before its process is killed; the unit tests' never stops.
const STOP_TIMEOUT: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 5_000 });

/// How long a killed process may take to be gone. One that the kernel of the host holds, with a
/// vCPU or at a file system that hangs, may never go.
const KILL_TIMEOUT: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 10_000 });

/// How long a process that was killed after its guest's end may keep that end from being told.
const LAST_WAIT: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 1_000 });

const DOES_NOT_END: &str = "the virtual machine monitor does not end";

/// How long a guest may take for a new size. One that can give no more yet takes for ever.
const RESIZE_PATIENCE: Duration = Duration::from_secs(10);

/// What a machine is made of: sizes, and everything it uses as an open file.
#[derive(Debug)]
pub(crate) struct Machine {
    /// What it boots with.
    pub(crate) size: Size,
    /// What it may grow to.
    pub(crate) most: Size,
    pub(crate) cmdline: String,
    /// What the monitor logs.
    pub(crate) log_level: Level,
    /// How long the guest may trust what it has read of a shared file.
    pub(crate) cache: FsCache,
    /// Whether the memory that the guest frees goes back to the host.
    pub(crate) balloon: bool,
    pub(crate) kvm: File,
    pub(crate) kernel: File,
    pub(crate) image: File,
    /// The tree that the guest mounts by the tag `kataShared`.
    pub(crate) share: OwnedFd,
    /// The listening socket of the guest's vsock.
    pub(crate) vsock: OwnedFd,
    /// Its network cards.
    pub(crate) nets: Vec<Device>,
    /// Where the guest's console goes; nowhere but error messages without.
    pub(crate) console: Option<OwnedFd>,
}

/// What the monitor says to a request; a device that was plugged has a slot.
type Answer = Result<Option<u8>, String>;

/// Who waits for an answer.
type Pending = Mutex<VecDeque<oneshot::Sender<Answer>>>;

/// A machine that was asked to boot.
#[derive(Debug)]
pub(crate) struct Vm {
    process: Arc<VmmProcess>,
    /// Who waits for an answer, in the order of the requests.
    pending: Arc<Pending>,
    /// Held from a request that the guest takes part in to its answer: the guest is asked one thing
    /// at a time.
    turn: tokio::sync::Mutex<()>,
    ready: watch::Receiver<bool>,
    ended: Arc<watch::Sender<Option<Ended>>>,
    /// Whether the process is gone, too.
    gone: watch::Receiver<bool>,
    /// What the guest has now, once it has anything but what it booted with.
    size: watch::Receiver<Option<Size>>,
}

impl Vm {
    /// Starts the process and asks it to boot. Returns at once; `ready` waits. It uses no network;
    /// in the namespace `home` it can be found by whoever wires that.
    pub(crate) fn start(
        machine: &Machine,
        cgroups: &Cgroups,
        home: Option<&Namespace>,
    ) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        // It holds no path, and the environment is full of them.
        command
            .arg0(PROGRAM)
            .arg(VMM_ROLE)
            .arg(machine.log_level.as_str())
            .env_clear()
            .current_dir("/");
        let vm = Self::spawn(command, home)?;
        // Before it has memory and threads to count.
        cgroups.take_machine(vm.pid())?;
        vm.boot(machine)?;
        Ok(vm)
    }

    /// Starts the process, and the thread that hears it.
    fn spawn(command: Command, home: Option<&Namespace>) -> Result<Self> {
        let context = || "start the virtual machine monitor".to_owned();
        let spawned = match home {
            Some(home) => home.run(|| VmmProcess::spawn(command)).internal(context)?,
            None => VmmProcess::spawn(command),
        };
        let process = Arc::new(spawned.internal(context)?);
        let (ready_sender, ready) = watch::channel(false);
        let ended = Arc::new(watch::Sender::new(None));
        let (gone_sender, gone) = watch::channel(false);
        let (size_sender, size) = watch::channel(None);
        let vm = Self {
            process,
            pending: Arc::default(),
            turn: tokio::sync::Mutex::default(),
            ready,
            ended,
            gone,
            size,
        };
        let listener = Listener {
            process: Arc::clone(&vm.process),
            pending: Arc::clone(&vm.pending),
            ready: ready_sender,
            ended: Arc::clone(&vm.ended),
            gone: gone_sender,
            size: size_sender,
        };
        thread::Builder::new()
            .name("vmm-events".to_owned())
            .stack_size(128 * 1024)
            .spawn(move || listener.run())
            .internal(context)?;
        Ok(vm)
    }

    /// A process that answers nothing, and ends at the first request.
    #[cfg(test)]
    pub(super) fn for_test() -> Self {
        let mut command = Command::new("head");
        command.args(["-c", "1"]);
        Self::spawn(command, None).unwrap()
    }

    /// One whose end is never seen: what it started keeps its control socket open. As another
    /// descriptor, for a shell gives what it starts beside itself an empty input.
    #[cfg(test)]
    fn without_end() -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", "exec 3<&0; cat <&3 & exec sleep 1000"]);
        Self::spawn(command, None).unwrap()
    }

    /// One that says what is in the file `packet`, and stays.
    #[cfg(test)]
    fn that_stays(packet: &std::path::Path) -> Self {
        let mut command = Command::new("sh");
        let script = "cat \"$0\" >&0; exec sleep 1000";
        command.args(["-c", script]).arg(packet);
        Self::spawn(command, None).unwrap()
    }

    fn boot(&self, machine: &Machine) -> Result<()> {
        let mut files = Files::default();
        let config = VmConfig {
            version: PROTOCOL_VERSION,
            kvm: files.add(machine.kvm.as_fd()),
            vcpus: machine.size.vcpus,
            most_vcpus: machine.most.vcpus,
            memory_mib: machine.size.memory_mib,
            most_memory_mib: machine.most.memory_mib,
            boot: Boot {
                kernel: files.add(machine.kernel.as_fd()),
                cmdline: machine.cmdline.clone(),
            },
            blocks: vec![Block {
                id: "rootfs".to_owned(),
                file: files.add(machine.image.as_fd()),
                read_only: true,
                queues: 1,
                // What it holds is in the host's cache: to wait for nothing is quickest.
                io_uring: false,
                limits: RateLimits::default(),
            }],
            nets: machine.nets.iter().map(|it| net(it, &mut files)).collect(),
            filesystems: vec![Filesystem {
                tag: share::TAG.to_owned(),
                directory: files.add(machine.share.as_fd()),
                read_only: false,
                cache: machine.cache,
                cache_below: share::cache_below(machine.cache),
            }],
            vsock: Some(Vsock {
                cid: GUEST_CID,
                listener: files.add(machine.vsock.as_fd()),
            }),
            rng: true,
            balloon: machine.balloon,
            console: match &machine.console {
                Some(file) => Console::File(files.add(file.as_fd())),
                None => Console::Quiet,
            },
        };
        // The answer is the agent's readiness, or the machine's end with the reason.
        self.request(&Request::Boot(Box::new(config)), &files.list)
            .map(drop)
    }

    /// Waits, not for long, for the guest to have a size that `enough` accepts. What it has then,
    /// unless that is what it booted with.
    pub(crate) async fn resized(&self, enough: impl Fn(Size) -> bool) -> Option<Size> {
        let mut size = self.size.clone();
        let waited = size.wait_for(|size| size.is_some_and(&enough));
        let _ = timeout(RESIZE_PATIENCE, waited).await;
        self.size()
    }

    /// What the guest has, unless that is what it booted with.
    pub(crate) fn size(&self) -> Option<Size> {
        *self.size.borrow()
    }

    fn request(
        &self,
        request: &Request,
        files: &[BorrowedFd<'_>],
    ) -> Result<oneshot::Receiver<Answer>> {
        let (answer, waiting) = oneshot::channel();
        // Sent under the lock: the answers come in the order of the requests.
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        // A process that can't be killed would take it, and nobody hears it any more.
        if self.has_ended() {
            let ended = "the virtual machine has ended";
            return Err(ShimError::new(Kind::Unavailable, ended));
        }
        self.process
            .send(request, files)
            .context(Kind::Unavailable, || {
                "the virtual machine monitor is gone".to_owned()
            })?;
        pending.push_back(answer);
        Ok(waiting)
    }

    /// The process's number on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid().cast_unsigned()
    }

    /// Waits until the agent listens. `files` says what the machine boots from, for the error.
    pub(crate) async fn ready(&self, limit: Duration, files: &str) -> Result<()> {
        let mut ready = self.ready.clone();
        let waited = timeout(limit, async {
            tokio::select! {
                biased;
                _ = ready.wait_for(|ready| *ready) => None,
                ended = self.ended() => Some(ended),
            }
        })
        .await;
        let failure = match waited {
            Ok(None) if *self.ready.borrow() => return Ok(()),
            Ok(None) => self.ended().await.describe(),
            Ok(Some(ended)) => ended.describe(),
            Err(_) => {
                let last = match self.stop().await {
                    Ok(ended) => last_lines(&ended.console),
                    Err(error) => format!("; and then {error}"),
                };
                return Err(ShimError::new(
                    Kind::DeadlineExceeded,
                    format!(
                        "the guest's agent was not ready within {} s ({files}){last}",
                        limit.as_secs()
                    ),
                ));
            }
        };
        Err(ShimError::new(
            Kind::Internal,
            format!("the virtual machine did not boot ({files}): {failure}"),
        ))
    }

    /// Where the machine's end is told.
    pub(crate) fn end(&self) -> watch::Receiver<Option<Ended>> {
        self.ended.subscribe()
    }

    /// Waits for the machine's end.
    pub(crate) async fn ended(&self) -> Ended {
        let mut ended = self.end();
        let result = ended
            .wait_for(Option::is_some)
            .await
            .map(|ended| ended.clone());
        match result {
            Ok(Some(ended)) => ended,
            // The listener reports before it goes.
            _ => Ended {
                reason: "the virtual machine monitor is gone".to_owned(),
                console: String::new(),
            },
        }
    }

    /// Waits for the end of the machine and of its process.
    async fn gone(&self) -> Ended {
        // The listener reports before it goes.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
        self.ended().await
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Stops the machine and waits until its process is gone.
    pub(crate) async fn stop(&self) -> Result<Ended> {
        let was_over = self.has_ended();
        if !was_over && let Err(error) = self.request(&Request::Stop, &[]) {
            debug!(error = error.chain(), "stop");
        }
        let pid = self.pid();
        // What was over has been killed before, if it did not go by itself.
        if !was_over {
            if let Ok(ended) = timeout(STOP_TIMEOUT, self.gone()).await {
                return Ok(ended);
            }
            error!(pid, "the virtual machine monitor does not stop: killed");
            self.process.kill();
        }
        if let Ok(ended) = timeout(KILL_TIMEOUT, self.gone()).await {
            return Ok(ended);
        }
        let reason =
            format!("the virtual machine monitor, process {pid}, does not end when it is killed");
        // It runs no guest any more.
        tell_end(&self.ended, || Ended {
            reason: reason.clone(),
            console: String::new(),
        });
        forget(&self.pending);
        Err(ShimError::new(Kind::DeadlineExceeded, reason))
    }
}

/// A network device as the monitor is told of it.
fn net<'a>(device: &'a Device, files: &mut Files<'a>) -> Net {
    let mut add = |list: &'a [OwnedFd]| list.iter().map(|it| files.add(it.as_fd())).collect();
    Net {
        id: device.id.clone(),
        mac: device.mac,
        mtu: device.mtu,
        queues: add(&device.queues),
        vhost: add(&device.vhost),
        receive: device.receive,
        transmit: device.transmit,
    }
}

/// Files of a message, each with its index.
#[derive(Default)]
struct Files<'a> {
    list: Vec<BorrowedFd<'a>>,
}

impl<'a> Files<'a> {
    fn add(&mut self, file: BorrowedFd<'a>) -> FileIndex {
        let index = FileIndex(u32::try_from(self.list.len()).unwrap_or(u32::MAX));
        self.list.push(file);
        index
    }
}

/// Tells a machine's end, unless it was told.
fn tell_end(to: &watch::Sender<Option<Ended>>, ended: impl FnOnce() -> Ended) {
    to.send_if_modified(|told| {
        let first = told.is_none();
        if first {
            *told = Some(ended());
        }
        first
    });
}

/// Answers nobody any more.
fn forget(pending: &Pending) {
    pending
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clear();
}

/// The thread that hears the monitor, to its end.
struct Listener {
    process: Arc<VmmProcess>,
    pending: Arc<Pending>,
    ready: watch::Sender<bool>,
    ended: Arc<watch::Sender<Option<Ended>>>,
    gone: watch::Sender<bool>,
    size: watch::Sender<Option<Size>>,
}

impl Listener {
    fn run(self) {
        let mut ended = None;
        let mut failure = None;
        loop {
            match self.process.next_event() {
                Ok((Event::Done, _)) => self.answer(Ok(None)),
                Ok((Event::Plugged { slot }, _)) => self.answer(Ok(Some(slot))),
                Ok((Event::Failed(reason), _)) => {
                    failure = Some(reason.clone());
                    self.answer(Err(reason));
                }
                Ok((Event::Milestone { milestone, at_us }, _)) => {
                    info!(?milestone, at_us, "milestone");
                }
                Ok((Event::Size(size), _)) => {
                    debug!(size.vcpus, size.memory_mib, "resized");
                    self.size.send_replace(Some(size));
                }
                // The connection itself says all; dropping it closes it.
                Ok((Event::Connection { port: READY_PORT }, _)) => {
                    self.ready.send_replace(true);
                }
                Ok((Event::Connection { port }, _)) => {
                    debug!(port, "the guest connects to a port that nobody listens on");
                }
                Ok((Event::Exited { reason, console }, _)) => {
                    ended = Some(Ended {
                        reason: describe(&reason),
                        console,
                    });
                    break;
                }
                Err(ClientError::Channel(ChannelError::Closed)) => break,
                Err(error) => {
                    error!(%error, "the virtual machine monitor talks nonsense");
                    self.process.kill();
                    break;
                }
            }
        }
        let ended = match ended {
            Some(ended) => {
                self.hurry();
                ended
            }
            None => {
                // It has closed the channel, or was killed.
                let status = self.process.wait_for(KILL_TIMEOUT);
                let reason = failure.or_else(|| status.map(died));
                Ended {
                    reason: reason.unwrap_or_else(|| DOES_NOT_END.to_owned()),
                    console: String::new(),
                }
            }
        };
        info!(reason = ended.reason, "the virtual machine ended");
        tell_end(&self.ended, || ended);
        forget(&self.pending);
        let _ = self.process.wait();
        self.gone.send_replace(true);
    }

    /// Waits, not for ever, for the process of a guest that has ended. Its devices may wait for a
    /// file system of the host that hangs, which the guest's containers must not: they have ended.
    fn hurry(&self) {
        if self.process.wait_for(STOP_TIMEOUT).is_some() {
            return;
        }
        let pid = self.process.pid();
        error!(pid, "the virtual machine monitor does not end: killed");
        self.process.kill();
        if self.process.wait_for(LAST_WAIT).is_none() {
            error!(pid, "{DOES_NOT_END}");
        }
    }

    fn answer(&self, result: Answer) {
        let next = self
            .pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        if let Some(next) = next {
            let _ = next.send(result);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use vmm::control::{Channel, ExitReason};

    use super::*;

    #[tokio::test]
    async fn a_guest_that_has_ended_does_not_wait_for_its_devices() {
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        );
        let (ours, theirs) = pair.unwrap();
        let exited = Event::Exited {
            reason: ExitReason::Panic,
            console: "last words".to_owned(),
        };
        Channel::new(ours).send(&exited, &[]).unwrap();
        let mut packet = [0; 1024];
        let length = rustix::io::read(&theirs, &mut packet).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, packet.get(..length).unwrap()).unwrap();

        let vm = Vm::that_stays(file.path());
        let ended = timeout(Duration::from_secs(10), vm.ended()).await.unwrap();
        assert_eq!(ended.console, "last words");
        assert!(!vm.stop().await.unwrap().describe().contains("signal"));
    }

    #[tokio::test]
    async fn a_machine_that_does_not_end_is_not_waited_for_for_ever() {
        let vm = Vm::without_end();
        // By then somebody else has the socket, too.
        let name = format!("/proc/{}/comm", vm.pid());
        while std::fs::read_to_string(&name).unwrap() != "sleep\n" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let error = vm.stop().await.unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        let pid = format!("process {}, does not end", vm.pid());
        assert!(error.chain().contains(&pid), "{}", error.chain());
        // Its guest does, and that is told.
        assert!(vm.has_ended());
        // The machine is told to stop at least: it is killed, and doesn't run any more.
        assert!(!vm.process.wait().success());
    }
}
