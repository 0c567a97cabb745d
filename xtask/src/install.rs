// SPDX-License-Identifier: Apache-2.0
//! Which files make an installation, and putting them in place. The names are Kata's.

use crate::build::{self, Profile};
use crate::guest::{self, Guest, kernel::Flavour};
use crate::{progress, workspace};
use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{self, Path, PathBuf};

/// A file to install.
#[derive(Debug)]
pub(crate) struct Installed {
    pub(crate) from: PathBuf,
    to: PathBuf,
    mode: u32,
}

impl Installed {
    /// Where the file belongs under `prefix`.
    pub(crate) fn place(&self, prefix: &Path) -> PathBuf {
        prefix.join(&self.to)
    }
}

/// The configuration's place below a prefix: every key, with its default.
const CONFIGURATION: &str = "share/defaults/kata-containers/configuration.toml";

/// The files of an installation; `kata-ctl` was built beside the shim.
pub(crate) fn files(shim: &Path, guest: &Guest) -> Vec<Installed> {
    // The runtime looks for the guest's files beside its own `bin`.
    vec![
        Installed {
            from: shim.to_owned(),
            to: build::SHIM.into(),
            mode: 0o755,
        },
        Installed {
            from: shim.with_file_name("kata-ctl"),
            to: "bin/kata-ctl".into(),
            mode: 0o755,
        },
        Installed {
            from: workspace::root().join("src/runtime/config/configuration.toml"),
            to: CONFIGURATION.into(),
            mode: 0o644,
        },
        Installed {
            from: guest.kernel.clone(),
            to: guest::KERNEL.into(),
            mode: 0o644,
        },
        Installed {
            from: guest.image.clone(),
            to: guest::IMAGE.into(),
            mode: 0o644,
        },
    ]
}

/// Builds and installs; each file appears whole or not at all, and running pods keep their old ones.
pub(crate) fn install(prefix: &Path) -> Result<()> {
    let prefix = path::absolute(prefix).context("--prefix")?;
    check_writable(&prefix)?;
    let shim = build::runtime(Profile::Release)?;
    let guest = guest::build(Profile::Release, Flavour::Release, None)?;
    for file in files(&shim, &guest) {
        let to = file.place(&prefix);
        put(&file.from, &to, file.mode).with_context(|| format!("installing {}", to.display()))?;
        progress::note(&format!("installed {}", to.display()));
    }
    Ok(())
}

/// Asked before the minutes that a build takes.
fn check_writable(prefix: &Path) -> Result<()> {
    fs::create_dir_all(prefix)
        .and_then(|()| tempfile::tempfile_in(prefix))
        .map(drop)
        .with_context(|| {
            format!(
                "can't write in {}; root may, or --prefix names another folder",
                prefix.display()
            )
        })
}

fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().context("no parent folder")?;
    fs::create_dir_all(folder)?;
    let scratch = tempfile::NamedTempFile::new_in(folder)?;
    fs::copy(from, scratch.path())?;
    fs::set_permissions(scratch.path(), Permissions::from_mode(mode))?;
    scratch.as_file().sync_all()?;
    scratch.persist(to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_that_is_not_writable_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for prefix in [file.as_path(), &file.join("below"), Path::new("/proc/none")] {
            let error = format!("{:#}", install(prefix).unwrap_err());
            let name = prefix.display().to_string();
            assert!(
                error.contains(&name) && error.contains("--prefix"),
                "{error}"
            );
        }
        let prefix = folder.path().join("deep/down");
        check_writable(&prefix).unwrap();
        assert_eq!(fs::read_dir(&prefix).unwrap().count(), 0);
    }

    #[test]
    fn puts_a_file_whole_over_an_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("new"), folder.path().join("deep/there"));
        fs::write(&from, "new").unwrap();
        put(&from, &to, 0o644).unwrap();
        put(&from, &to, 0o755).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "new");
        assert_eq!(
            fs::metadata(&to).unwrap().permissions().mode() & 0o777,
            0o755
        );
        assert_eq!(fs::read_dir(to.parent().unwrap()).unwrap().count(), 1);
    }
}
