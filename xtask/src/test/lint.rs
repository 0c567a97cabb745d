// SPDX-License-Identifier: Apache-2.0
//! Checks of the source: format, clippy, dependencies, architecture.

use super::invariants;
use crate::build::{self, Profile};
use crate::packages::{self, any};
use crate::{crates, progress, workspace};
use anyhow::{Result, bail};
use std::process::Command;

/// Built once from the registry and kept; another version is another entry of the cache.
const DENY_VERSION: &str = "0.20.2";

pub(crate) fn run() -> Result<()> {
    packages::ensure(
        "checking the source",
        &[any("gcc"), any("libc6-dev"), any("libseccomp-dev")],
    )?;
    progress::run(
        Command::new("cargo")
            .args(["fmt", "--all", "--check"])
            .current_dir(workspace::root()),
    )?;
    progress::run(build::cargo("clippy", Profile::Dev)?.args([
        "--workspace",
        "--all-targets",
        "--features",
        "kata-agent/component-tests",
        "--",
        "--deny",
        "warnings",
    ]))?;
    let violations = invariants::violations(&workspace::root())?;
    if !violations.is_empty() {
        bail!(
            "the architecture's rules are broken:\n  {}",
            violations.join("\n  ")
        );
    }
    // Advisories would need a database from the network at every run.
    progress::run(
        Command::new(crates::program("cargo-deny", DENY_VERSION)?)
            .args([
                "--log-level",
                "error",
                "--all-features",
                "check",
                "--hide-inclusion-graph",
                "licenses",
                "bans",
                "sources",
            ])
            .current_dir(workspace::root()),
    )
}
