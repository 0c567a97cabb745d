// SPDX-License-Identifier: Apache-2.0
//! The machine of the suite: its VMM process, and what the guest connects to.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result, bail, ensure};
use tests::installed::installed;
use vmm::client::VmmProcess;
use vmm::control::{
    Block, Boot, Console, Event, ExitReason, FileIndex, PROTOCOL_VERSION, VmConfig, Vsock,
};

use crate::stream::{POWER_OFF, READY, read_line};

/// Far longer than anything here takes, even under emulation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const CMDLINE: &str = "panic=-1 root=/dev/vda ro rootfstype=erofs init=/sbin/init";

/// A booted guest.
#[derive(Debug)]
pub(crate) struct Machine {
    process: Arc<VmmProcess>,
    socket: PathBuf,
    /// What the guest connects to, and how it ended.
    arrivals: Mutex<Receiver<(u32, UnixStream)>>,
    end: Receiver<ExitReason>,
    _folder: tempfile::TempDir,
}

impl Machine {
    /// Boots this binary as a guest, and waits until it listens.
    pub(crate) fn start(console: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("vsock");
        let listener = UnixListener::bind(&socket)?;
        let (config, files) = configure(folder.path(), listener, console)?;
        let mut command = Command::new(env::current_exe()?);
        command.arg("vmm");
        let process = Arc::new(VmmProcess::spawn(command)?);
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        process.boot(config, &files, |_, _| {})?;
        let (arrival, arrivals) = channel();
        let (ended, end) = channel();
        let watched = Arc::clone(&process);
        thread::spawn(move || watch(&watched, &arrival, &ended));
        let machine = Self {
            process,
            socket,
            arrivals: Mutex::new(arrivals),
            end,
            _folder: folder,
        };
        if let Err(error) = machine.accept(READY) {
            let reason = machine.end.try_recv();
            return Err(error).with_context(|| format!("the guest did not come up: {reason:?}"));
        }
        Ok(machine)
    }

    /// A stream to a port of the guest.
    pub(crate) fn connect(&self, port: u32) -> Result<UnixStream> {
        let mut stream = self.dial()?;
        writeln!(stream, "CONNECT {port}")?;
        let answer = read_line(&mut stream)?;
        ensure!(answer.starts_with("OK "), "port {port}: {answer:?}");
        Ok(stream)
    }

    /// A stream on which nothing has been said.
    pub(crate) fn dial(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket)?;
        set_patience(&stream)?;
        Ok(stream)
    }

    /// The next stream that the guest opened, which must be to `port`.
    pub(crate) fn accept(&self, port: u32) -> Result<UnixStream> {
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

    /// Ends the guest in its own way.
    pub(crate) fn power_off(&mut self) -> Result<()> {
        // Gone before it answers, maybe.
        let _ = self.connect(POWER_OFF);
        let reason = self.end.recv_timeout(PATIENCE)?;
        ensure!(reason == ExitReason::Shutdown, "{reason:?}");
        let status = self.process.wait();
        ensure!(status.success(), "the VMM ended with {status}");
        Ok(())
    }
}

fn set_patience(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// Hands on what the VMM reports, until it is gone.
fn watch(process: &VmmProcess, arrival: &Sender<(u32, UnixStream)>, ended: &Sender<ExitReason>) {
    while let Ok((event, mut files)) = process.next_event() {
        match event {
            Event::Connection { port } => {
                if let Some(stream) = files.pop() {
                    let _ = arrival.send((port, stream.into()));
                }
            }
            Event::Exited { reason, console } => {
                if reason != ExitReason::Shutdown {
                    eprintln!("--- console ---\n{console}");
                }
                let _ = ended.send(reason);
            }
            _ => {}
        }
    }
}

fn configure(
    folder: &Path,
    listener: UnixListener,
    console: bool,
) -> Result<(VmConfig, Vec<OwnedFd>)> {
    let kernel = match env::var_os("NUTSHELL_TEST_KERNEL") {
        Some(named) => PathBuf::from(named),
        None => installed("vmlinux.container")?,
    };
    let image = folder.join("image");
    fs::write(&image, guest_image()?)?;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let mut files: Vec<OwnedFd> = vec![
        kvm.context("can't open /dev/kvm")?.into(),
        File::open(&kernel)
            .with_context(|| format!("can't open {}", kernel.display()))?
            .into(),
        File::open(&image)?.into(),
        listener.into(),
    ];
    let mut cmdline = CMDLINE.to_owned();
    if console {
        files.push(io::stderr().as_fd().try_clone_to_owned()?);
        cmdline.push_str(" console=ttyS0 8250.nr_uarts=1");
    } else {
        cmdline.push_str(" quiet earlycon=uart8250,io,0x3f8 keep_bootcon 8250.nr_uarts=0 noapic");
    }
    let config = VmConfig {
        version: PROTOCOL_VERSION,
        kvm: FileIndex(0),
        vcpus: 1,
        memory_mib: 256,
        boot: Boot {
            kernel: FileIndex(1),
            cmdline,
        },
        blocks: vec![Block {
            id: "root".to_owned(),
            file: FileIndex(2),
            read_only: true,
        }],
        nets: Vec::new(),
        filesystems: Vec::new(),
        vsock: Some(Vsock {
            cid: 3,
            listener: FileIndex(3),
        }),
        rng: true,
        console: if console {
            Console::File(FileIndex(4))
        } else {
            Console::Quiet
        },
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
