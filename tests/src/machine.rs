// SPDX-License-Identifier: Apache-2.0
//! A machine of a suite's own: its VMM process, its guest, whose init is the suite's own program or the
//! agent, and what the guest connects to.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail, ensure};
use vmm::client::VmmProcess;
use vmm::control::{
    Block, Boot, Console, Event, ExitReason, FileIndex, Filesystem, FsCache, Net, PROTOCOL_VERSION,
    RateLimits, Request, Size, VmConfig, Vsock,
};

use crate::installed::installed;
use crate::pattern::read_line;

/// The guest's vsock port that powers it off.
pub const POWER_OFF: u32 = 1;
/// The host's vsock port on which the guest says that it listens.
pub const READY: u32 = 1024;

/// Far longer than anything here takes, even under emulation.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// For a new size: where a page was in use, Linux tries again after 50 s and after 100 s more.
const RESIZED: Duration = Duration::from_secs(200);

/// Memory at the start, in MiB.
pub const MEMORY: u32 = 256;

/// The agent is told the port that this module waits on; other programs know it.
const CMDLINE: &str =
    "panic=-1 root=/dev/vda ro rootfstype=erofs init=/sbin/init agent.ready_vport=1024";

/// What a guest runs.
#[derive(Debug, Default)]
pub enum Program {
    /// The suite's own program, as its init.
    #[default]
    Own,
    /// The agent, in the image that the runtime has.
    Agent {
        /// A folder of the host's that it may mount by the tag `kataShared`.
        shared: PathBuf,
    },
}

/// What a machine is to be.
#[derive(Debug)]
pub struct Setup {
    /// What its guest runs.
    pub program: Program,
    /// Show the guest's console.
    pub console: bool,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// As many as there may be later.
    pub most_vcpus: u8,
    /// As much memory, in MiB, as there may be later.
    pub most_memory: u32,
    /// Kernel parameters beside the usual.
    pub parameters: &'static str,
    /// Network devices.
    pub nets: Vec<Cable>,
    /// Disks beside the root's, writable: `/dev/vdb` and so on.
    pub disks: Vec<Disk>,
}

/// A disk and its file.
#[derive(Debug)]
pub struct Disk {
    /// Its content, raw.
    pub file: OwnedFd,
    /// As many threads serve it.
    pub queues: u16,
    /// Its requests go on beside each other.
    pub io_uring: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            program: Program::Own,
            console: false,
            vcpus: 1,
            most_vcpus: 1,
            most_memory: MEMORY,
            parameters: "",
            nets: Vec::new(),
            disks: Vec::new(),
        }
    }
}

/// A network device and the files that belong to it.
#[derive(Debug)]
pub struct Cable {
    /// Its name in the VMM.
    pub id: String,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// What the guest is told of the largest packet.
    pub mtu: Option<u16>,
    /// A tap a queue pair.
    pub taps: Vec<OwnedFd>,
    /// None, or a `/dev/vhost-net` a queue pair.
    pub vhost: Vec<OwnedFd>,
    /// The most that comes to the guest.
    pub receive: RateLimits,
    /// The most that the guest sends.
    pub transmit: RateLimits,
}

impl Cable {
    /// The VMM's view; the files go to the end of `files`.
    fn describe(self, files: &mut Vec<OwnedFd>) -> Net {
        let mut add = |list: Vec<OwnedFd>| {
            list.into_iter()
                .map(|file| {
                    files.push(file);
                    index(files.len().saturating_sub(1))
                })
                .collect()
        };
        Net {
            queues: add(self.taps),
            vhost: add(self.vhost),
            id: self.id,
            mac: self.mac,
            mtu: self.mtu,
            receive: self.receive,
            transmit: self.transmit,
        }
    }
}

fn index(at: usize) -> FileIndex {
    FileIndex(u32::try_from(at).unwrap_or(u32::MAX))
}

/// How a machine ended.
#[derive(Debug)]
pub struct Ended {
    /// What the VMM says.
    pub reason: ExitReason,
    /// The guest's last output.
    pub console: String,
}

impl fmt::Display for Ended {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reason, console } = self;
        write!(
            formatter,
            "it ended: {reason:?}\n--- console ---\n{console}"
        )
    }
}

/// What the VMM says to a request; a device that was plugged has a slot.
type Answer = Result<Option<u8>, String>;

/// A booted guest.
#[derive(Debug)]
pub struct Machine {
    process: Arc<VmmProcess>,
    socket: PathBuf,
    /// What the guest connects to, and how it ended.
    arrivals: Mutex<Receiver<(u32, UnixStream)>>,
    end: Receiver<Ended>,
    answers: Mutex<Receiver<Answer>>,
    sizes: Mutex<Receiver<Size>>,
    _folder: tempfile::TempDir,
}

impl Machine {
    /// Boots a guest, and waits until it listens.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(setup: Setup) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("vsock");
        let listener = UnixListener::bind(&socket)?;
        let (config, files) = configure(folder.path(), listener, setup)?;
        let mut command = Command::new(env::current_exe()?);
        command.arg("vmm");
        let process = Arc::new(VmmProcess::spawn(command)?);
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        process.boot(config, &files, |_, _| {})?;
        let (arrival, arrivals) = channel();
        let (ended, end) = channel();
        let (answered, answers) = channel();
        let (resized, sizes) = channel();
        let told = Told {
            arrival,
            ended,
            answered,
            resized,
        };
        let watched = Arc::clone(&process);
        thread::spawn(move || watch(&watched, &told));
        let machine = Self {
            process,
            socket,
            arrivals: Mutex::new(arrivals),
            end,
            answers: Mutex::new(answers),
            sizes: Mutex::new(sizes),
            _folder: folder,
        };
        if let Err(error) = machine.accept(READY) {
            let ended = machine.end.try_recv();
            let ended = ended.map_or_else(|_| String::new(), |ended| format!(": {ended}"));
            return Err(error).with_context(|| format!("the guest did not come up{ended}"));
        }
        Ok(machine)
    }

    /// A stream to a port of the guest.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(&self, port: u32) -> Result<UnixStream> {
        let mut stream = self.dial()?;
        writeln!(stream, "CONNECT {port}")?;
        let answer = read_line(&mut stream)?;
        ensure!(answer.starts_with("OK "), "port {port}: {answer:?}");
        Ok(stream)
    }

    /// A stream on which nothing has been said.
    ///
    /// # Errors
    /// The VMM takes no connection.
    pub fn dial(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket)?;
        set_patience(&stream)?;
        Ok(stream)
    }

    /// The next stream that the guest opened, which must be to `port`.
    ///
    /// # Errors
    /// None came, or to another port.
    pub fn accept(&self, port: u32) -> Result<UnixStream> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let (arrived, stream) = arrivals
            .recv_timeout(PATIENCE)
            .with_context(|| format!("waiting for the guest on port {port}"))?;
        ensure!(
            arrived == port,
            "the guest came to port {arrived}, not {port}"
        );
        set_patience(&stream)?;
        Ok(stream)
    }

    /// Plugs a network device in.
    ///
    /// # Errors
    /// The VMM says why not.
    pub fn attach(&self, cable: Cable) -> Result<()> {
        let mut files = Vec::new();
        let net = cable.describe(&mut files);
        self.ask(&Request::AttachNet(net), &files).map(drop)
    }

    /// Plugs a writable disk in; answers the slot that it is in.
    ///
    /// # Errors
    /// The VMM says why not.
    pub fn attach_disk(&self, id: &str, disk: Disk) -> Result<u8> {
        let request = Request::AttachBlock(Block {
            id: id.to_owned(),
            file: FileIndex(0),
            read_only: false,
            queues: disk.queues,
            io_uring: disk.io_uring,
            limits: RateLimits::default(),
        });
        let slot = self.ask(&request, &[disk.file])?;
        slot.context("the answer names no slot")
    }

    /// Pulls a disk out.
    ///
    /// # Errors
    /// The VMM says why not.
    pub fn detach_disk(&self, id: &str) -> Result<()> {
        let request = Request::DetachBlock { id: id.to_owned() };
        self.ask(&request, &[]).map(drop)
    }

    /// Has the VMM do something, and waits until it has.
    ///
    /// # Errors
    /// The VMM says why not, or doesn't answer.
    pub fn ask(&self, request: &Request, files: &[OwnedFd]) -> Result<Option<u8>> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.process.send(request, &files)?;
        let answer = answers.recv_timeout(PATIENCE);
        let answer = answer.with_context(|| format!("waiting for the answer to {request:?}"))?;
        answer.map_err(anyhow::Error::msg)
    }

    /// Waits for the machine to have this size.
    ///
    /// # Errors
    /// It has another.
    pub fn await_size(&self, wanted: Size) -> Result<()> {
        self.await_change(|size| size == wanted)
            .with_context(|| format!("waiting for {wanted:?}"))
            .map(drop)
    }

    /// Waits for the machine to have a size that `wanted` accepts.
    ///
    /// # Errors
    /// It has another.
    pub fn await_change(&self, wanted: impl Fn(Size) -> bool) -> Result<Size> {
        let sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now().checked_add(RESIZED);
        let mut last = None;
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let size = sizes.recv_timeout(left.unwrap_or_default());
            let size = size.with_context(|| format!("the last size was {last:?}"))?;
            if wanted(size) {
                return Ok(size);
            }
            last = Some(size);
        }
    }

    /// The VMM's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Ends the guest in its own way.
    ///
    /// # Errors
    /// It ended in another way.
    pub fn power_off(&mut self) -> Result<()> {
        // Gone before it answers, maybe.
        let _ = self.connect(POWER_OFF);
        let ended = self.ended()?;
        ensure!(ended.reason == ExitReason::Shutdown, "{ended}");
        Ok(())
    }

    /// Waits for the guest's end, and for that of its VMM, which must be in order.
    ///
    /// # Errors
    /// It does not end, or its VMM failed.
    pub fn ended(&mut self) -> Result<Ended> {
        let ended = self.end.recv_timeout(PATIENCE);
        let ended = ended.context("waiting for the guest's end")?;
        let status = self.process.wait();
        ensure!(status.success(), "the VMM ended with {status}; {ended}");
        Ok(ended)
    }
}

fn set_patience(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// Where each kind of event goes.
struct Told {
    arrival: Sender<(u32, UnixStream)>,
    ended: Sender<Ended>,
    answered: Sender<Answer>,
    resized: Sender<Size>,
}

/// Hands on what the VMM reports, until it is gone.
fn watch(process: &VmmProcess, told: &Told) {
    let mut ended = None;
    while let Ok((event, mut files)) = process.next_event() {
        match event {
            Event::Connection { port } => {
                if let Some(stream) = files.pop() {
                    let _ = told.arrival.send((port, stream.into()));
                }
            }
            Event::Exited { reason, console } => {
                ended = Some(Ended { reason, console });
            }
            Event::Done => {
                let _ = told.answered.send(Ok(None));
            }
            Event::Plugged { slot } => {
                let _ = told.answered.send(Ok(Some(slot)));
            }
            Event::Failed(text) => {
                let _ = told.answered.send(Err(text));
            }
            Event::Size(size) => {
                let _ = told.resized.send(size);
            }
            Event::Milestone { .. } => {}
        }
    }
    // With the process, which has written everything by then.
    if let Some(ended) = ended {
        let _ = told.ended.send(ended);
    }
}

fn configure(
    folder: &Path,
    listener: UnixListener,
    setup: Setup,
) -> Result<(VmConfig, Vec<OwnedFd>)> {
    let kernel = match env::var_os("NUTSHELL_TEST_KERNEL") {
        Some(named) => PathBuf::from(named),
        None => installed("vmlinux.container")?,
    };
    let (image, shared) = match setup.program {
        Program::Own => {
            let image = folder.join("image");
            fs::write(&image, guest_image()?)?;
            (image, None)
        }
        Program::Agent { shared } => (installed("kata-containers.img")?, Some(shared)),
    };
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let mut files: Vec<OwnedFd> = vec![
        kvm.context("can't open /dev/kvm")?.into(),
        File::open(&kernel)
            .with_context(|| format!("can't open {}", kernel.display()))?
            .into(),
        File::open(&image)
            .with_context(|| format!("can't open {}", image.display()))?
            .into(),
        listener.into(),
    ];
    let mut cmdline = format!("{CMDLINE} {}", setup.parameters);
    let nets: Vec<Net> = setup
        .nets
        .into_iter()
        .map(|cable| cable.describe(&mut files))
        .collect();
    let mut blocks = vec![Block {
        id: "root".to_owned(),
        file: FileIndex(2),
        read_only: true,
        queues: 1,
        io_uring: false,
        limits: RateLimits::default(),
    }];
    for (number, disk) in setup.disks.into_iter().enumerate() {
        files.push(disk.file);
        blocks.push(Block {
            id: format!("disk{number}"),
            file: index(files.len().saturating_sub(1)),
            read_only: false,
            queues: disk.queues,
            io_uring: disk.io_uring,
            limits: RateLimits::default(),
        });
    }
    let mut filesystems = Vec::new();
    if let Some(shared) = shared {
        files.push(File::open(&shared)?.into());
        filesystems.push(Filesystem {
            tag: "kataShared".to_owned(),
            directory: index(files.len().saturating_sub(1)),
            read_only: false,
            cache: FsCache::Never,
            cache_below: Vec::new(),
        });
    }
    let console = if setup.console {
        files.push(io::stderr().as_fd().try_clone_to_owned()?);
        cmdline.push_str(" console=ttyS0 8250.nr_uarts=1");
        Console::File(index(files.len().saturating_sub(1)))
    } else {
        cmdline.push_str(" quiet earlycon=uart8250,io,0x3f8 keep_bootcon 8250.nr_uarts=0");
        Console::Quiet
    };
    let config = VmConfig {
        version: PROTOCOL_VERSION,
        kvm: FileIndex(0),
        vcpus: setup.vcpus,
        most_vcpus: setup.most_vcpus.max(setup.vcpus),
        memory_mib: MEMORY,
        most_memory_mib: setup.most_memory,
        boot: Boot {
            kernel: FileIndex(1),
            cmdline,
        },
        blocks,
        nets,
        filesystems,
        vsock: Some(Vsock {
            cid: 3,
            listener: FileIndex(3),
        }),
        rng: true,
        balloon: true,
        console,
    };
    Ok((config, files))
}

/// An image whose init is this binary.
fn guest_image() -> Result<Vec<u8>> {
    let program = fs::read("/proc/self/exe")?;
    let interpreter = b"/lib64/ld-linux-x86-64.so.2\0";
    if program
        .windows(interpreter.len())
        .any(|window| window == interpreter && !cfg!(target_feature = "crt-static"))
    {
        bail!("this binary is not static: it can't be a guest's init");
    }
    Ok(rootfs_builder::erofs::image(
        &rootfs_builder::tree::guest_image(program)?,
    )?)
}
