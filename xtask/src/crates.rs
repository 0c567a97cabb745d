// SPDX-License-Identifier: Apache-2.0
//! Programs from the crates registry: built once a version and kept, static, so that containers can run
//! them.

use crate::build::link_statically;
use crate::{cache, progress};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// The program of the crate `name`, which has the crate's name.
pub(crate) fn program(name: &str, version: &str) -> Result<PathBuf> {
    let folder = cache::folder(name, version, |folder| {
        let log = tempfile::NamedTempFile::new()?;
        let mut install = Command::new("cargo");
        install.args(["install", "--locked", "--version", version, name, "--root"]);
        install.arg(folder);
        link_statically(&mut install);
        // They run for seconds and take minutes to optimize.
        install
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        progress::step(&format!("building {name} (once)"), log.path(), &mut install)
    })?;
    Ok(folder.join("bin").join(name))
}
