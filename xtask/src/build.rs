// SPDX-License-Identifier: Apache-2.0
//! Building the workspace's own crates.

use crate::packages::{self, any};
use crate::progress::{self, Reminder};
use crate::workspace;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Cargo profile of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// For tools that run here.
    Dev,
    /// Release code without its link time, for tests and the edit-and-try loop.
    Quick,
    /// What is installed and measured.
    Release,
}

impl Profile {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Quick => "quick",
            Self::Release => "release",
        }
    }

    /// Cargo's name of the output folder.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Quick | Self::Release => self.name(),
        }
    }
}

/// How a program finds its libraries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linkage {
    /// At its start.
    Dynamic,
    /// It has them: it can be the only program of a guest's image.
    Static,
}

/// The target of static programs. Flags for a named target leave build scripts and procedural
/// macros alone.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Has a cargo command build static programs, below `STATIC_TARGET` of the output folder.
pub(crate) fn link_statically(command: &mut Command) {
    command.args(["--target", STATIC_TARGET]).env(
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        "-C target-feature=+crt-static -C relocation-model=static",
    );
}

/// A cargo command for this workspace with our own output folder.
pub(crate) fn cargo(action: &str, profile: Profile) -> Result<Command> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args([action, "--quiet", "--profile", profile.name()])
        .current_dir(workspace::root())
        .env("CARGO_TARGET_DIR", workspace::target_dir()?);
    Ok(command)
}

/// The shim's place below a prefix.
pub(crate) const SHIM: &str = "bin/containerd-shim-kata-v2";

/// A line of cargo's JSON output, as far as we read it.
#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Builds one program, named by cargo's own options, its name last, and returns its path.
pub(crate) fn executable(profile: Profile, target: &[&str]) -> Result<PathBuf> {
    let name = target.last().copied().unwrap_or_default();
    built(cargo("build", profile)?.args(target), name)
}

/// Builds one test binary, named by cargo's own options, its name last, without running it.
pub(crate) fn test_binary(profile: Profile, linkage: Linkage, target: &[&str]) -> Result<PathBuf> {
    let name = target.last().copied().unwrap_or_default();
    let mut command = cargo("test", profile)?;
    command.arg("--no-run").args(target);
    if linkage == Linkage::Static {
        link_statically(&mut command);
    }
    built(&mut command, name)
}

/// The program `name` among all that cargo built: with a test come the package's own programs.
fn built(command: &mut Command, name: &str) -> Result<PathBuf> {
    command
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    let line = progress::command_line(command);
    let reminder = Reminder::of("compiling");
    let text = progress::output(command)?;
    drop(reminder);
    text.lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter(|message| matches!(&message.target, Some(target) if target.name == name))
        .filter_map(|message| message.executable)
        .next_back()
        .with_context(|| format!("`{line}` built no program {name}"))
}

/// Builds the shim, and `kata-ctl` beside it.
pub(crate) fn runtime(profile: Profile) -> Result<PathBuf> {
    packages::ensure("building the runtime", &[any("gcc"), any("libc6-dev")])?;
    let _reminder = Reminder::of("compiling the runtime");
    progress::run(cargo("build", profile)?.args(["--package", "runtime"]))?;
    Ok(workspace::target_dir()?
        .join(profile.folder())
        .join("containerd-shim-kata-v2"))
}
