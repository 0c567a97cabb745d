// SPDX-License-Identifier: Apache-2.0
//! Programs from the crates registry: built once a version and kept.

use crate::build::{Linkage, link_statically};
use crate::{cache, progress};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// The program of the crate `name`, which has the crate's name.
pub(crate) fn program(name: &str, version: &str, linkage: Linkage) -> Result<PathBuf> {
    let folder = cache::folder(name, version, |folder| {
        let log = tempfile::NamedTempFile::new()?;
        let mut install = Command::new("cargo");
        install.args(["install", "--locked", "--version", version, name, "--root"]);
        install.arg(folder);
        if linkage == Linkage::Static {
            link_statically(&mut install);
        }
        progress::step(&format!("building {name} (once)"), log.path(), &mut install)
    })?;
    Ok(folder.join("bin").join(name))
}
