// SPDX-License-Identifier: Apache-2.0
//! Building the workspace's own crates.

use crate::packages::{self, any};
use crate::progress::{self, Reminder};
use crate::workspace;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
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

/// The target of static programs. Flags for a named target leave build scripts and procedural
/// macros alone.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where Debian's libseccomp-dev has its static library.
const LIBSECCOMP_FOLDER: &str = "/usr/lib/x86_64-linux-gnu";

/// Has a cargo command build static programs, below `STATIC_TARGET` of the output folder.
pub(crate) fn link_statically(command: &mut Command) {
    command
        .args(["--target", STATIC_TARGET])
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-C target-feature=+crt-static",
        )
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", LIBSECCOMP_FOLDER);
}

/// A cargo command for this workspace with our own output folder. What leaves this machine, for a guest, the
/// dev VM or another's system, is static: it needs no library there, and all of it shares one build of
/// what it depends on.
pub(crate) fn cargo(action: &str, profile: Profile) -> Result<Command> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args([action, "--quiet", "--profile", profile.name()])
        .current_dir(workspace::root())
        .env("CARGO_TARGET_DIR", workspace::target_dir()?);
    if profile != Profile::Dev {
        link_statically(&mut command);
    }
    Ok(command)
}

/// The static program `name` of this workspace, where a build with `profile` has put it.
fn program(profile: Profile, name: &str) -> Result<PathBuf> {
    let folder = workspace::target_dir()?.join(STATIC_TARGET);
    Ok(folder.join(profile.folder()).join(name))
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
    built(cargo("build", profile)?.args(target))?
        .remove(name)
        .with_context(|| format!("cargo built no program {name}"))
}

/// Builds test binaries of what runs in the dev VM; where each is, by its name.
pub(crate) fn test_binaries(names: &BTreeSet<&str>) -> Result<BTreeMap<String, PathBuf>> {
    packages::ensure(
        "building the suites",
        &[any("gcc"), any("libc6-dev"), any("libseccomp-dev")],
    )?;
    let mut command = cargo("build", Profile::Quick)?;
    command.args(PACKAGES).args(RUNTIME).args(AGENT);
    for name in names {
        command.args(["--test", name]);
    }
    built(&mut command)
}

/// The programs that cargo built, by their names.
fn built(command: &mut Command) -> Result<BTreeMap<String, PathBuf>> {
    command
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    let reminder = Reminder::of("compiling");
    let text = progress::output(command)?;
    drop(reminder);
    let messages = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok());
    Ok(messages
        .filter_map(|message| Some((message.target?.name, message.executable?)))
        .collect())
}

/// What runs in the dev VM. Named together even where one is asked for, as cargo settles on the features of
/// dependencies for all that it is told of: each is compiled once.
const PACKAGES: [&str; 8] = [
    "--package",
    "runtime",
    "--package",
    "kata-agent",
    "--package",
    "tests",
    "--features",
    "kata-agent/component-tests",
];
const RUNTIME: [&str; 4] = ["--bin", "containerd-shim-kata-v2", "--bin", "kata-ctl"];
const AGENT: [&str; 2] = ["--bin", "kata-agent"];

/// Builds programs of one package, as they are installed or for the dev VM.
fn programs(profile: Profile, package: &str, names: &[&str]) -> Result<()> {
    let mut command = cargo("build", profile)?;
    if profile == Profile::Quick {
        command.args(PACKAGES);
    } else {
        command.args(["--package", package]);
    }
    progress::run(command.args(names))
}

/// Builds the shim, and `kata-ctl` beside it.
pub(crate) fn runtime(profile: Profile) -> Result<PathBuf> {
    packages::ensure("building the runtime", &[any("gcc"), any("libc6-dev")])?;
    let _reminder = Reminder::of("compiling the runtime");
    programs(profile, "runtime", &RUNTIME)?;
    program(profile, "containerd-shim-kata-v2")
}

/// Builds the agent.
pub(crate) fn agent(profile: Profile) -> Result<PathBuf> {
    packages::ensure(
        "building the agent",
        &[any("gcc"), any("libc6-dev"), any("libseccomp-dev")],
    )?;
    let _reminder = Reminder::of("compiling the agent");
    programs(profile, "kata-agent", &AGENT)?;
    program(profile, "kata-agent")
}
