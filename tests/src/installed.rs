// SPDX-License-Identifier: Apache-2.0
//! Where the guest's files are installed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The guest's file of this name that the runtime in use has.
///
/// # Errors
/// It is in none of the places where it is installed.
pub fn installed(name: &str) -> Result<PathBuf> {
    ["/usr/local/share", "/usr/share"]
        .iter()
        .map(|share| Path::new(share).join("kata-containers").join(name))
        .find(|path| path.exists())
        .with_context(|| format!("{name} is not installed"))
}
