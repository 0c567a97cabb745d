// SPDX-License-Identifier: Apache-2.0
//! The dev VM's QEMU process.
//!
//! QEMU's software CPU emulates AMD's SVM with nested paging, so the Linux inside loads the real `kvm-amd`
//! and has a `/dev/kvm` that runs ordinary guests, on any machine.

use super::linux::Linux;
use super::{qemu, wire};
use crate::{progress, workspace};
use anyhow::{Context, Result, bail};
use std::env;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The VM is up in about 4 s on an idle machine; a loaded one may need many times that.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// How long QEMU may take to end after the guest powered off.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// QEMU's monitor, in the VM's folder.
const MONITOR: &str = "monitor.sock";
/// The monitor is done when it has said nothing for so long; a kernel that panics is, too.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// The VM's console, in its folder.
const CONSOLE: &str = "console.log";
/// Where the console of a VM that died is kept.
const KEPT_CONSOLE: &str = "target/dev-vm-console.log";

/// Size of the machine, and what it shares.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) cpus: u32,
    /// In MiB.
    pub(crate) memory: u32,
    /// Host folder that is writable in the VM as /out.
    pub(crate) out: Option<PathBuf>,
}

/// A running dev VM; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Machine {
    qemu: Child,
    folder: TempDir,
    stream: UnixStream,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory: 6144,
            out: None,
        }
    }
}

impl Machine {
    /// Starts the VM and waits until its session port is connected and the guest is ready.
    pub(crate) fn start(linux: &Linux, options: &Options) -> Result<Self> {
        let folder = TempDir::with_prefix("nutshell-vm.").context("creating the VM's folder")?;
        // A copy, since the next build replaces the file that we run from.
        let init = folder.path().join("xtask");
        fs::copy(env::current_exe()?, &init).context("copying xtask for the VM")?;
        let socket = folder.path().join("session.sock");
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("listening on {}", socket.display()))?;
        listener.set_nonblocking(true)?;

        let log = File::create(folder.path().join("qemu.log"))?;
        let mut command = qemu(linux, options, folder.path(), &init)?;
        let qemu = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting qemu-system-x86_64")?;
        let mut machine = Starting {
            qemu: Some(qemu),
            folder: Some(folder),
        };
        let stream = machine.wait_ready(&listener)?;
        let (Some(qemu), Some(folder)) = (machine.qemu.take(), machine.folder.take()) else {
            bail!("the dev VM ended while it started");
        };
        Ok(Self {
            qemu,
            folder,
            stream,
        })
    }

    /// The session's connection.
    pub(crate) fn stream(&self) -> Result<UnixStream> {
        self.stream
            .try_clone()
            .context("duplicating the session's socket")
    }

    /// The last lines of the VM's console, for messages, and where all of it was put.
    pub(crate) fn last_words(&self) -> String {
        let kept = workspace::root().join(KEPT_CONSOLE);
        let words = last_words(self.folder.path());
        match fs::copy(self.folder.path().join(CONSOLE), &kept) {
            Ok(_) => format!("{words}\n(the whole console: {})", kept.display()),
            Err(_) => words,
        }
    }

    /// What a VM says that was silent for `silence`. Its processors' registers, then an NMI: its kernel
    /// takes that for a panic and shows what each processor did.
    pub(crate) fn frozen(&self, silence: Duration) -> String {
        let registers = self
            .monitor("info registers -a\nnmi\n")
            .unwrap_or_else(|error| format!("no word from QEMU: {error:#}"));
        let registers: Vec<&str> = registers
            .lines()
            .filter(|line| line.contains("RIP=") || line.starts_with("CPU#"))
            .collect();
        format!(
            "the dev VM froze: silent for {} s\n{}\n{}",
            silence.as_secs(),
            registers.join("\n"),
            self.last_words()
        )
    }

    /// Has QEMU's monitor run commands; answers all it says until it is silent.
    fn monitor(&self, commands: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.folder.path().join(MONITOR))?;
        stream.set_read_timeout(Some(MONITOR_TIMEOUT))?;
        stream.write_all(commands.as_bytes())?;
        let (mut words, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            words.extend_from_slice(buffer.get(..count).unwrap_or_default());
        }
        Ok(String::from_utf8_lossy(&words).into_owned())
    }

    /// Ends the session, upon which the guest powers off.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.stream.shutdown(std::net::Shutdown::Both).ok();
        let begin = Instant::now();
        while self.qemu.try_wait()?.is_none() {
            if begin.elapsed() > STOP_TIMEOUT {
                progress::note("the dev VM does not power off; ending QEMU");
                break;
            }
            sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A VM that is not up yet; dropping it ends it.
struct Starting {
    qemu: Option<Child>,
    folder: Option<TempDir>,
}

impl Starting {
    fn wait_ready(&mut self, listener: &UnixListener) -> Result<UnixStream> {
        let begin = Instant::now();
        let mut stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) => self.check(begin)?,
            }
        };
        stream.set_nonblocking(false)?;
        let mut byte = [0; 1];
        stream.set_read_timeout(Some(POLL))?;
        loop {
            match rustix::net::recv(&stream, &mut byte[..], rustix::net::RecvFlags::PEEK) {
                Ok((_, 1..)) => break,
                _ => self.check(begin)?,
            }
        }
        stream.set_read_timeout(None)?;
        match wire::read(&mut stream)? {
            Some(frame) if frame.kind == wire::Kind::Ready => Ok(stream),
            other => bail!("the dev VM began its session with {other:?}"),
        }
    }

    fn check(&mut self, begin: Instant) -> Result<()> {
        let words = || {
            self.folder
                .as_ref()
                .map(|folder| last_words(folder.path()))
                .unwrap_or_default()
        };
        if let Some(qemu) = &mut self.qemu
            && let Some(status) = qemu.try_wait()?
        {
            bail!("QEMU ended while the dev VM started: {status}\n{}", words());
        }
        if begin.elapsed() > BOOT_TIMEOUT {
            bail!(
                "the dev VM is not up after {} s\n{}",
                BOOT_TIMEOUT.as_secs(),
                words()
            );
        }
        sleep(POLL);
        Ok(())
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(qemu) = &mut self.qemu {
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }
}

fn qemu(linux: &Linux, options: &Options, folder: &Path, init: &Path) -> Result<Command> {
    // A killed xtask takes its VM with it.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(qemu::program()?)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        // Warnings about CPU features that the emulation lacks are harmless and go to the log.
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "EPYC,+svm,+npt",
        ])
        .args([
            "-smp",
            &options.cpus.to_string(),
            "-m",
            &options.memory.to_string(),
        ])
        .arg("-kernel")
        .arg(&linux.kernel)
        .arg("-initrd")
        .arg(&linux.initramfs)
        .arg("-serial")
        .arg(format!("file:{}", folder.join(CONSOLE).display()))
        .arg("-monitor")
        .arg(format!(
            "unix:{},server=on,wait=off",
            folder.join(MONITOR).display()
        ));
    // 64: the stacks of all processors.
    let mut parameters = format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable unknown_nmi_panic panic_print=64 nutshell.init={}",
        init.display()
    );
    share(&mut command, Path::new("/"), "hostroot", true);
    if let Some(out) = &options.out {
        let out = fs::canonicalize(out).with_context(|| format!("--out {}", out.display()))?;
        share(&mut command, &out, "out", false);
        parameters.push_str(" nutshell.out=1");
    }
    command
        .args([
            "-append",
            &parameters,
            "-device",
            "virtio-serial-pci",
            "-chardev",
        ])
        .arg(format!(
            "socket,id=session,path={}",
            folder.join("session.sock").display()
        ))
        .args([
            "-device",
            &format!("virtserialport,chardev=session,name={}", wire::PORT),
        ]);
    Ok(command)
}

fn share(command: &mut Command, path: &Path, tag: &str, read_only: bool) {
    let access = if read_only { "on" } else { "off" };
    command.arg("-virtfs").arg(format!(
        "local,path={},mount_tag={tag},security_model=none,readonly={access},multidevs=remap",
        path.display()
    ));
}

fn last_words(folder: &Path) -> String {
    format!(
        "{}\n{}",
        progress::tail(&folder.join("qemu.log"), 5),
        progress::tail(&folder.join(CONSOLE), 60)
    )
    .trim()
    .to_owned()
}
