// SPDX-License-Identifier: Apache-2.0
//! The agent as one static binary.

use crate::build::{self, Profile};
use crate::packages::{self, any};
use crate::progress::{self, Reminder};
use crate::workspace;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian's libseccomp-dev has its static library.
const LIBSECCOMP_FOLDER: &str = "/usr/lib/x86_64-linux-gnu";

/// Builds the agent and checks that it needs no shared library.
pub(crate) fn build(profile: Profile) -> Result<PathBuf> {
    packages::ensure(
        "building the agent",
        &[
            any("binutils"),
            any("gcc"),
            any("libc6-dev"),
            any("libseccomp-dev"),
        ],
    )?;
    let mut command = build::cargo("build", profile)?;
    command
        .args(["--package", "kata-agent"])
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", LIBSECCOMP_FOLDER);
    build::link_statically(&mut command);
    let reminder = Reminder::of("compiling the agent");
    progress::run(&mut command)?;
    drop(reminder);
    let agent = workspace::target_dir()?
        .join(build::STATIC_TARGET)
        .join(profile.folder())
        .join("kata-agent");
    check_static(&agent)?;
    Ok(agent)
}

/// A binary with a NEEDED entry has no loader in the guest, and dies before its first line.
fn check_static(agent: &Path) -> Result<()> {
    let dynamic = progress::output(
        Command::new("readelf")
            .args(["--dynamic", "--wide"])
            .arg(agent),
    )?;
    if let Some(line) = dynamic.lines().find(|line| line.contains("(NEEDED)")) {
        bail!("the agent is not static: {}", line.trim());
    }
    Ok(())
}
