// SPDX-License-Identifier: Apache-2.0
//! Boots a kernel and an image without the shim and prints a timeline, for development and
//! benchmarks. The VMM runs as a child process, this program's own binary in the role `vmm`, as it
//! does under the shim.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use rustix::time::{ClockId, clock_gettime};
use vmm::client::{ClientError, VmmProcess};
use vmm::control::{
    Block, Boot, Console, Event, ExitReason, FileIndex, Filesystem, FsCache, MAX_BLOCK_QUEUES,
    Milestone, PROTOCOL_VERSION, RateLimits, Request, VmConfig, Vsock,
};

/// Boots a microVM and prints when it came to which point.
#[derive(Debug, Parser)]
struct Options {
    /// Uncompressed kernel (vmlinux).
    #[arg(long)]
    kernel: PathBuf,
    /// Root file system image, read-only, /dev/vda.
    #[arg(long)]
    image: Option<PathBuf>,
    /// A further disk, writable, with a queue for each virtual CPU.
    #[arg(long)]
    disk: Vec<PathBuf>,
    /// Kernel command line; what boots the image is put before it.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Use --cmdline alone.
    #[arg(long)]
    bare_cmdline: bool,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// As many virtual CPUs as there may be later.
    #[arg(long, default_value_t = 0)]
    most_vcpus: u8,
    /// Memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// As much memory as there may be later.
    #[arg(long, default_value_t = 0)]
    most_memory: u32,
    /// Print the guest's console to standard error as it comes.
    #[arg(long)]
    console: bool,
    /// Share a directory under the tag `kataShared`.
    #[arg(long)]
    share: Option<PathBuf>,
    /// How the guest caches the shared directory.
    #[arg(long, value_enum, default_value_t = CacheOption::Auto)]
    cache: CacheOption,
    /// Listen on this Unix socket for connections to the guest (`CONNECT port`).
    #[arg(long)]
    vsock: Option<PathBuf>,
    /// Leave out virtio-rng.
    #[arg(long)]
    no_rng: bool,
    /// Leave out virtio-balloon.
    #[arg(long)]
    no_balloon: bool,
    /// The point to stop the guest at.
    #[arg(long, value_enum, default_value_t = Wait::Exit)]
    wait: Wait,
    /// Pause the guest for a moment when it has come to init, then let it go on.
    #[arg(long)]
    pause: bool,
    /// Give up after so many seconds.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Wait {
    /// PID 1 wrote its code to the progress port.
    Init,
    /// The agent connected to announce itself.
    Ready,
    /// The guest has ended.
    Exit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CacheOption {
    Never,
    Auto,
    Always,
}

/// The port that an agent announces itself on.
const READY_PORT: u32 = 1024;

fn main() -> ExitCode {
    let result = if env::args_os().nth(1).is_some_and(|role| role == "vmm") {
        log();
        vmm::process::run().context("vmm")
    } else {
        boot(&Options::parse())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boot: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::DEBUG)
        .init();
}

fn boot(options: &Options) -> Result<()> {
    let start = now();
    let mut command = Command::new(env::current_exe()?);
    command.arg("vmm");
    let process = VmmProcess::spawn(command)?;
    watchdog(options.timeout);
    let (config, files) = configure(options)?;
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut timeline = Timeline { start };
    timeline.print("spawned", start);
    let mut early = Vec::new();
    process.boot(config, &files, |event, _| early.push(event))?;
    for event in early {
        timeline.event(&event);
    }
    let reason = follow(options, &process, &mut timeline);
    if let Some(path) = &options.vsock {
        let _ = fs::remove_file(path);
    }
    let status = process.wait();
    if !status.success() {
        bail!("the VMM process ended with {status}");
    }
    match reason? {
        ExitReason::Failure(text) => bail!("the machine failed: {text}"),
        _ => Ok(()),
    }
}

/// Reads events until the machine is gone.
fn follow(options: &Options, process: &VmmProcess, timeline: &mut Timeline) -> Result<ExitReason> {
    loop {
        let (event, _files) = match process.next_event() {
            Err(ClientError::Channel(error)) => return Err(error.into()),
            other => other?,
        };
        timeline.event(&event);
        let point = match event {
            Event::Exited { reason, console } => {
                timeline.print(&format!("exited: {reason:?}"), now());
                if reason != ExitReason::Stopped && !console.is_empty() && !options.console {
                    eprintln!("--- console ---\n{console}");
                }
                return Ok(reason);
            }
            Event::Failed(text) => bail!(text),
            Event::Milestone {
                milestone: Milestone::Init,
                ..
            } => Wait::Init,
            Event::Connection { port: READY_PORT } => {
                timeline.print("agent ready", now());
                Wait::Ready
            }
            _ => continue,
        };
        if point == Wait::Init && options.pause {
            pause(process)?;
        }
        if point == options.wait {
            process.send(&Request::Stop, &[])?;
        }
    }
}

fn pause(process: &VmmProcess) -> Result<()> {
    let before = Instant::now();
    process.send(&Request::Pause, &[])?;
    while process.next_event()?.0 != Event::Done {}
    println!("{:>10}  paused in {:?}", "", before.elapsed());
    thread::sleep(Duration::from_millis(300));
    process.send(&Request::Resume, &[])?;
    Ok(())
}

fn configure(options: &Options) -> Result<(VmConfig, Vec<OwnedFd>)> {
    let mut files = Vec::new();
    let mut add = |file: OwnedFd| {
        files.push(file);
        FileIndex(
            u32::try_from(files.len())
                .unwrap_or(u32::MAX)
                .saturating_sub(1),
        )
    };
    let open = |path: &PathBuf, write: bool| -> Result<OwnedFd> {
        let file = OpenOptions::new().read(true).write(write).open(path);
        Ok(file
            .with_context(|| format!("can't open {}", path.display()))?
            .into())
    };
    let kvm = add(open(&"/dev/kvm".into(), true)?);
    let kernel = add(open(&options.kernel, false)?);
    let mut blocks = Vec::new();
    if let Some(path) = &options.image {
        blocks.push(Block {
            id: "root".to_owned(),
            file: add(open(path, false)?),
            read_only: true,
            queues: 1,
            io_uring: false,
            limits: RateLimits::default(),
        });
    }
    for (number, path) in options.disk.iter().enumerate() {
        blocks.push(Block {
            id: format!("disk{number}"),
            file: add(open(path, true)?),
            read_only: false,
            queues: u16::from(options.vcpus).min(MAX_BLOCK_QUEUES),
            io_uring: true,
            limits: RateLimits::default(),
        });
    }
    let mut filesystems = Vec::new();
    if let Some(path) = &options.share {
        filesystems.push(Filesystem {
            tag: "kataShared".to_owned(),
            directory: add(open(path, false)?),
            read_only: false,
            cache: match options.cache {
                CacheOption::Never => FsCache::Never,
                CacheOption::Auto => FsCache::Auto,
                CacheOption::Always => FsCache::Always,
            },
            cache_below: Vec::new(),
        });
    }
    let vsock = match &options.vsock {
        Some(path) => Some(Vsock {
            cid: 3,
            listener: add(UnixListener::bind(path)?.into()),
        }),
        None => None,
    };
    let console = if options.console {
        Console::File(add(File::from(
            std::io::stderr().as_fd().try_clone_to_owned()?,
        )
        .into()))
    } else {
        Console::Quiet
    };
    let boot = Boot {
        kernel,
        cmdline: cmdline(options),
    };
    let config = VmConfig {
        version: PROTOCOL_VERSION,
        kvm,
        vcpus: options.vcpus,
        most_vcpus: options.most_vcpus.max(options.vcpus),
        memory_mib: options.memory,
        most_memory_mib: options.most_memory.max(options.memory),
        boot,
        blocks,
        nets: Vec::new(),
        filesystems,
        vsock,
        rng: !options.no_rng,
        balloon: !options.no_balloon,
        console,
    };
    Ok((config, files))
}

fn cmdline(options: &Options) -> String {
    if options.bare_cmdline {
        return options.cmdline.clone();
    }
    let mut words = vec!["panic=-1 agent.boot_progress"];
    if options.console {
        words.push("console=ttyS0 8250.nr_uarts=1");
    } else {
        // "quiet" first: what has been logged before is printed when the console is found.
        words.push("quiet earlycon=uart8250,io,0x3f8 keep_bootcon 8250.nr_uarts=0");
    }
    if options.image.is_some() {
        words.push("root=/dev/vda ro rootfstype=erofs init=/sbin/init");
    }
    if options.vsock.is_some() {
        words.push("agent.ready_vport=1024");
    }
    words.push(&options.cmdline);
    words.join(" ")
}

/// Ends this program, and so the VMM, when the guest takes too long.
fn watchdog(seconds: u64) {
    thread::spawn(move || {
        thread::sleep(Duration::from_secs(seconds));
        eprintln!("boot: no end after {seconds} s");
        std::process::abort();
    });
}

struct Timeline {
    /// Microseconds of `CLOCK_MONOTONIC`.
    start: u64,
}

impl Timeline {
    fn event(&mut self, event: &Event) {
        if let Event::Milestone { milestone, at_us } = event {
            let name = match milestone {
                Milestone::ProcessStart => "process start",
                Milestone::VmCreated => "VM created",
                Milestone::KernelLoaded => "kernel loaded",
                Milestone::FirstInstruction => "first guest instruction",
                Milestone::Init => "init",
            };
            self.print(name, *at_us);
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn print(&self, name: &str, at_us: u64) {
        let elapsed = at_us.saturating_sub(self.start);
        println!("{:>7.1} ms  {name}", elapsed as f64 / 1000.0);
    }
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds
        .saturating_mul(1_000_000)
        .saturating_add(nanoseconds / 1000)
}
