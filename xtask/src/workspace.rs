// SPDX-License-Identifier: Apache-2.0
//! Where things are: the checkout, cargo's output, the cache.

use anyhow::{Context, Result};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The folder of the checkout that this xtask was built from.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Cargo's output folder: where this executable was found (`<target>/debug/xtask`), so that
/// `CARGO_TARGET_DIR` and cargo configuration are honoured without asking cargo.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let exe = env::current_exe().context("finding xtask's own executable")?;
    exe.ancestors()
        .nth(2)
        .map(Path::to_owned)
        .context("xtask is not run from cargo's output folder")
}

/// Folder of downloads and build results that outlive a checkout.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let dir = match env::var_os("NUTSHELL_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => {
            PathBuf::from(env::var_os("HOME").context("neither NUTSHELL_CACHE nor HOME is set")?)
                .join(".cache/nutshell")
        }
    };
    fs::create_dir_all(&dir)
        .with_context(|| format!("creating the cache folder {}", dir.display()))?;
    Ok(dir)
}
