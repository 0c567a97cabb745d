// SPDX-License-Identifier: Apache-2.0
//! What PID 1 owes the guest. The order serves boot time: the host hears of init first, then the
//! server's socket listens, and only then comes what the first request needs.

pub(crate) mod kmsg;
pub(crate) mod mounts;
pub(crate) mod power;

use std::fs;
use std::os::fd::IntoRawFd;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, setrlimit};
use tracing::warn;

use crate::cmdline::Parameters;
use crate::error::{Context as _, Result};
use crate::sys;

/// The least that the command line and the socket need: `/proc`, and streams that are open.
///
/// # Errors
///
/// When `/proc` can't be mounted or read: then nothing works.
pub(crate) fn begin() -> Result<Parameters> {
    mounts::proc()?;
    let cmdline = fs::read_to_string("/proc/cmdline").context(|| "read /proc/cmdline")?;
    let parameters = Parameters::from_cmdline(&cmdline);
    if parameters.boot_progress {
        // Only a measurement: its loss must not stop a boot.
        let _ = sys::port::announce_init();
    }
    open_standard_streams();
    Ok(parameters)
}

/// The rest of the world: file systems, loopback.
///
/// # Errors
///
/// When a file system that containers need can't be mounted.
pub(crate) fn complete() -> Result<()> {
    mounts::all()?;
    raise_limits();
    if let Err(error) = sys::net::loopback_up() {
        warn!(%error, "loopback interface");
    }
    Ok(())
}

/// Containers whose specification has no limits, as those of containerd's CRI plugin, inherit these.
/// The kernel's own are 4096 open files, and processes for the memory at boot.
fn raise_limits() {
    for (resource, limit) in [
        // What Linux itself allows unless it is told otherwise (fs.nr_open).
        (Resource::Nofile, Some(1 << 20)),
        (Resource::Nproc, None),
    ] {
        let both = Rlimit {
            current: limit,
            maximum: limit,
        };
        if let Err(error) = setrlimit(resource, both) {
            warn!(?resource, %error, "limit not raised");
        }
    }
}

/// The kernel opens `/dev/console` for init, but not when there is no console. Descriptors 0 to 2
/// must then be something else than the agent's next sockets.
fn open_standard_streams() {
    while let Ok(fd) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
        // Kept open for the life of the process when it is one of the three.
        let number = fd.into_raw_fd();
        if number >= 2 {
            break;
        }
    }
}
