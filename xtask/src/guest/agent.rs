// SPDX-License-Identifier: Apache-2.0
//! The agent as one static binary.

use crate::build::{self, Profile};
use crate::packages::{self, any};
use crate::progress;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the agent and checks that it needs no shared library.
pub(crate) fn build(profile: Profile) -> Result<PathBuf> {
    packages::ensure("checking the agent", &[any("binutils")])?;
    let agent = build::agent(profile)?;
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
