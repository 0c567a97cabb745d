// SPDX-License-Identifier: Apache-2.0
//! A containerd of a test's own: private root, state and address, and an environment that reaches
//! its shims.

use std::env;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::ctr::Ctr;
use crate::wait::until;

const START: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(10);

/// Runs its arguments with a `/dev` that lacks `/dev/kvm`, for this process tree alone.
const WITHOUT_KVM: &str = r#"
set -e
mkdir "$0"
mount -t tmpfs -o mode=755 dev "$0"
for name in null zero full random urandom tty fuse; do
    : > "$0/$name"
    mount --bind "/dev/$name" "$0/$name"
done
mkdir "$0/pts" "$0/shm" "$0/net"
mount --bind /dev/pts "$0/pts"
ln -s pts/ptmx "$0/ptmx"
ln -s /proc/self/fd "$0/fd"
mount --move "$0" /dev
exec "$@"
"#;

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    command: Command,
    child: Child,
    folder: TempDir,
    ctr: Ctr,
}

/// How a private containerd differs from the machine's.
#[derive(Debug, Default)]
pub struct Options<'a> {
    /// Variables that its shims inherit.
    pub environment: &'a [(&'a str, &'a Path)],
    /// Whether it and its shims find no `/dev/kvm`.
    pub without_kvm: bool,
    /// Tables of its configuration. Without any, its CRI plugin is off: it costs start time.
    pub tables: Option<&'a Tables>,
    /// Folder of the programs that are used instead of the machine's.
    pub programs: Option<&'a Path>,
}

/// A part of containerd's configuration.
#[derive(Debug)]
pub struct Tables {
    /// Of the format: 2, or 3 from containerd 2 on.
    pub version: u32,
    /// TOML.
    pub text: String,
}

impl Containerd {
    /// Starts a containerd and gives it the image that `ctr`'s has.
    pub fn start(ctr: &Ctr, options: &Options<'_>) -> Result<Self> {
        let this = Self::start_empty(ctr, options)?;
        this.import(ctr, &[ctr.image()], &this.ctr)?;
        Ok(this)
    }

    /// Starts a containerd without images.
    pub fn start_empty(ctr: &Ctr, options: &Options<'_>) -> Result<Self> {
        // On a file system of the kernel's: overlayfs can't have its upper layer on an overlay.
        let folder = tempfile::Builder::new()
            .prefix("nutshell-tests-")
            .tempdir_in("/run")?;
        let path = folder.path();
        let config = path.join("config.toml");
        let address = path.join("state/containerd.sock");
        fs::write(
            &config,
            format!(
                "version = {version}\nroot = {root:?}\nstate = {state:?}\n\
                 disabled_plugins = {disabled}\n\
                 [grpc]\naddress = {address:?}\n{tables}",
                root = path.join("root"),
                state = path.join("state"),
                disabled = match options.tables {
                    None => "[\"io.containerd.grpc.v1.cri\"]",
                    Some(_) => "[]",
                },
                version = options.tables.map_or(2, |tables| tables.version),
                tables = options.tables.map_or("", |tables| &tables.text),
            ),
        )?;
        let mut command = if options.without_kvm {
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "slave", "sh", "-c", WITHOUT_KVM]);
            command.arg(path.join("dev")).arg("containerd");
            command
        } else {
            Command::new(match options.programs {
                Some(programs) => programs.join("containerd"),
                None => "containerd".into(),
            })
        };
        let log = File::create(path.join("log"))?;
        command
            .arg("--config")
            .arg(&config)
            .args(["--log-level", "debug"]);
        command.envs(options.environment.iter().copied());
        if let Some(programs) = options.programs {
            // Its shims are looked up there as well.
            let rest = env::var_os("PATH").unwrap_or_default();
            let all = [programs.to_owned()]
                .into_iter()
                .chain(env::split_paths(&rest));
            command.env("PATH", env::join_paths(all)?);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().context("starting a private containerd")?;
        let mut this = Self {
            command,
            child,
            folder,
            ctr: ctr.at(&address).of(options.programs),
        };
        this.wait_until_up()?;
        Ok(this)
    }

    /// Ends it by SIGKILL; its shims live on.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again after [`Self::kill`].
    pub fn restart(&mut self) -> Result<()> {
        self.child = self
            .command
            .spawn()
            .context("starting a private containerd again")?;
        self.wait_until_up()
    }

    /// `ctr` for it.
    #[must_use]
    pub fn ctr(&self) -> &Ctr {
        &self.ctr
    }

    /// Its folder, gone with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its log, with those of its shims.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let address = self.ctr.address();
        until("a private containerd's socket", START, || {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended: {status}");
            }
            Ok(UnixStream::connect(address).is_ok().then_some(()))
        })
        .with_context(|| self.log())
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// Gives it images of another containerd, in the namespace of `to`.
    pub fn import(&self, from: &Ctr, images: &[&str], to: &Ctr) -> Result<()> {
        let archive = self.folder.path().join("image.tar");
        let name = archive.to_str().context("not UTF-8")?;
        from.call(&[&["images", "export", name], images].concat())?
            .exits(0)?;
        to.call(&["images", "import", name])?.exits(0)?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = Pid::from_child(&self.child);
        let _ = kill_process(pid, Signal::TERM);
        if until("the end of a private containerd", STOP, || {
            Ok(self.child.try_wait()?)
        })
        .is_err()
        {
            let _ = kill_process(pid, Signal::KILL);
            let _ = self.child.wait();
        }
    }
}
