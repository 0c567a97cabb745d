// SPDX-License-Identifier: Apache-2.0
//! Results kept by the hash of what they were made from.

use crate::{progress, workspace};
use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Digits of a key in a file name: 64 bits, enough for names and short enough to read.
const KEY_DIGITS: usize = 16;

/// Hash over the inputs of a build step; order and names of the inputs count.
#[derive(Debug, Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// Adds a named piece of text.
    pub(crate) fn text(mut self, name: &str, value: &str) -> Self {
        self.add(name.as_bytes());
        self.add(value.as_bytes());
        self
    }

    /// Adds a file's name and content.
    pub(crate) fn file(mut self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        self.add(path.file_name().unwrap_or_default().as_encoded_bytes());
        self.add(&content);
        Ok(self)
    }

    /// The key as hexadecimal digits.
    pub(crate) fn finish(self) -> String {
        let mut digits = hex(&self.0.finalize());
        digits.truncate(KEY_DIGITS);
        digits
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0
            .update(u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_le_bytes());
        self.0.update(bytes);
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// Returns the folder `<cache>/<kind>/<key>`, made by `build` in a scratch folder first and moved into
/// place whole, so that an interrupted build leaves nothing that looks finished. One process builds;
/// others wait for it.
pub(crate) fn folder(
    kind: &str,
    key: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let parent = workspace::cache_dir()?.join(kind);
    let ready = parent.join(key);
    if ready.exists() {
        return Ok(ready);
    }
    fs::create_dir_all(&parent).with_context(|| format!("creating {}", parent.display()))?;
    let _lock = lock(&parent, kind)?;
    if ready.exists() {
        return Ok(ready);
    }
    let scratch = TempDir::with_prefix_in(format!(".{key}."), &parent)
        .with_context(|| format!("creating a scratch folder in {}", parent.display()))?;
    build(scratch.path())?;
    fs::set_permissions(scratch.path(), Permissions::from_mode(0o755))?;
    fs::rename(scratch.path(), &ready)
        .with_context(|| format!("publishing {}", ready.display()))?;
    // The folder is no longer there under its scratch name.
    let _ = scratch.keep();
    Ok(ready)
}

/// Takes the lock of one kind of cache entry, telling the user when another process holds it.
fn lock(parent: &Path, kind: &str) -> Result<File> {
    let path = parent.join(".lock");
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            progress::note(&format!("{kind}: another xtask is building it; waiting"));
            flock(&file, FlockOperation::LockExclusive)
                .with_context(|| format!("locking {}", path.display()))?;
            Ok(file)
        }
        Err(error) => bail!("locking {}: {}", path.display(), io::Error::from(error)),
    }
}
