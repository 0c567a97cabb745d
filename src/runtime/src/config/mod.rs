// SPDX-License-Identifier: Apache-2.0
//! The runtime's configuration: built-in defaults, and a TOML file with Kata's keys over them.
//!
//! The file is looked for where Kata looks: the environment, the options of containerd's runtime
//! handler, then a list. Without any, the defaults hold. A file is read strictly: a key that is
//! unknown, or whose value this build can't honour, is an error that names it, and all of them
//! are named at once.

mod file;

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Kind, Result, ShimError};

/// Names a configuration file before all others.
const ENVIRONMENT: &str = "KATA_CONF_FILE";

/// Where a configuration file is looked for, the first that exists.
const FILES: [&str; 2] = [
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
];

/// Where kernel and image are, below the folder that the program is installed in.
const KERNEL: &str = "share/kata-containers/vmlinux.container";
const IMAGE: &str = "share/kata-containers/kata-containers.img";

/// The smallest memory that a guest boots with, in MiB.
pub(crate) const LEAST_MEMORY: u32 = 64;

/// The most virtual CPUs of a machine.
pub(crate) const MOST_VCPUS: u8 = 32;

/// What the runtime goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    /// An uncompressed guest kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's root file system, an EROFS image.
    pub(crate) image: PathBuf,
    /// Added to the kernel's command line, after the runtime's own parameters.
    pub(crate) kernel_params: String,
    /// Virtual CPUs of a machine whose containers ask for no more.
    pub(crate) vcpus: u8,
    /// Memory of such a machine, in MiB.
    pub(crate) memory_mib: u32,
    /// The guest's console goes to the log.
    pub(crate) guest_console: bool,
    /// The agent logs in detail.
    pub(crate) agent_debug: bool,
    /// The runtime logs in detail.
    pub(crate) debug: bool,
    /// Whether the seccomp profiles of containers are applied.
    pub(crate) seccomp: bool,
    /// How long the guest may take from power-on to a listening agent.
    pub(crate) boot_timeout: Duration,
    /// How long the agent may take for a call.
    pub(crate) call_timeout: Duration,
}

impl Config {
    fn built_in() -> Self {
        let prefix = prefix(env::current_exe().ok().as_deref());
        Self {
            kernel: prefix.join(KERNEL),
            image: prefix.join(IMAGE),
            kernel_params: String::new(),
            vcpus: 1,
            memory_mib: 2048,
            guest_console: false,
            agent_debug: false,
            debug: false,
            seccomp: true,
            boot_timeout: Duration::from_secs(60),
            call_timeout: Duration::from_secs(60),
        }
    }

    /// Reads the configuration; `options` is what containerd's runtime handler names, if any.
    pub(crate) fn load(options: Option<&Path>) -> Result<Self> {
        let config = Self::built_in();
        let Some(path) = find(env::var_os(ENVIRONMENT).as_deref(), options) else {
            return Ok(config);
        };
        let text = std::fs::read_to_string(&path)
            .context(Kind::InvalidArgument, || format!("read {}", path.display()))?;
        file::apply(config, &text).map_err(|reasons| {
            ShimError::new(
                Kind::InvalidArgument,
                format!("configuration {}: {reasons}", path.display()),
            )
        })
    }
}

/// The file to read. One that was named must exist; the list's need not.
fn find(environment: Option<&OsStr>, options: Option<&Path>) -> Option<PathBuf> {
    environment
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .or_else(|| options.map(Path::to_owned))
        .or_else(|| FILES.iter().map(PathBuf::from).find(|path| path.exists()))
}

/// The folder that holds `bin/` with this program in it; `/usr` where it lies elsewhere.
fn prefix(program: Option<&Path>) -> PathBuf {
    program
        .and_then(Path::parent)
        .filter(|folder| folder.file_name().is_some_and(|name| name == "bin"))
        .and_then(Path::parent)
        .filter(|prefix| prefix.join(KERNEL).exists())
        .map_or_else(|| PathBuf::from("/usr"), Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_file_wins() {
        let options = Path::new("/o.toml");
        assert_eq!(
            find(Some(OsStr::new("/e.toml")), Some(options)),
            Some("/e.toml".into())
        );
        assert_eq!(
            find(Some(OsStr::new("")), Some(options)),
            Some("/o.toml".into())
        );
    }

    #[test]
    fn files_of_the_guest_are_found_beside_the_program() {
        let root = tempfile::tempdir().unwrap();
        let kernel = root.path().join(KERNEL);
        std::fs::create_dir_all(kernel.parent().unwrap()).unwrap();
        std::fs::write(&kernel, "").unwrap();
        let program = root.path().join("bin/containerd-shim-kata-v2");
        assert_eq!(prefix(Some(&program)), root.path());
        assert_eq!(
            prefix(Some(Path::new("/nowhere/bin/shim"))),
            Path::new("/usr")
        );
        assert_eq!(prefix(Some(&root.path().join("shim"))), Path::new("/usr"));
    }
}
