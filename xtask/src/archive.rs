// SPDX-License-Identifier: Apache-2.0
//! Packages of a Debian suite that this machine doesn't use: fetched by apt with a configuration and
//! lists of their own, checked against Debian's keyring, and unpacked, not installed.

use crate::packages::{self, any};
use crate::{cache, progress, workspace};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Folder of the package's files, of the suite as it was when they were first asked for.
pub(crate) fn unpacked(suite: &str, package: &str) -> Result<PathBuf> {
    let kind = format!("debian-{suite}");
    // What a suite has changes by the day; a machine keeps what it has seen.
    let kept = workspace::cache_dir()?.join(&kind).join(package);
    if kept.exists() {
        return Ok(kept);
    }
    packages::ensure(
        &format!("fetching {package} of Debian's {suite}"),
        &[any("ca-certificates"), any("debian-archive-keyring")],
    )?;
    cache::folder(&kind, package, |folder| {
        let scratch = tempfile::tempdir()?;
        let configuration = configure(scratch.path(), suite)?;
        let apt = |title: &str, arguments: &[&str]| {
            progress::step(
                title,
                &scratch.path().join("log"),
                Command::new("apt-get")
                    .args(arguments)
                    .env("APT_CONFIG", &configuration)
                    .current_dir(scratch.path()),
            )
        };
        apt(
            &format!("fetching the package list of {suite}"),
            &["update"],
        )?;
        apt(
            &format!("downloading {package} of {suite}"),
            &["download", package],
        )?;
        let archive = fs::read_dir(scratch.path())?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get downloaded no file for {package}"))?;
        progress::output(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(archive)
                .arg(folder),
        )
        .map(drop)
    })
}

/// An apt that knows this suite and nothing of the machine. Its lists may be older than they say they
/// keep, as those of a mirror's snapshot are; their signature holds.
fn configure(folder: &Path, suite: &str) -> Result<PathBuf> {
    for name in ["lists/partial", "cache/archives/partial", "parts"] {
        fs::create_dir_all(folder.join(name))?;
    }
    fs::write(folder.join("status"), "")?;
    fs::write(
        folder.join("sources"),
        format!("deb [signed-by={KEYRING}] {MIRROR} {suite} main\n"),
    )?;
    let at = |name: &str| format!("{:?}", folder.join(name));
    let path = folder.join("apt.conf");
    fs::write(
        &path,
        format!(
            "Dir::State {folder:?};\nDir::State::lists {lists};\nDir::State::status {status};\n\
             Dir::Cache {cache};\nDir::Etc::SourceList {sources};\nDir::Etc::SourceParts {parts};\n\
             Dir::Etc::Preferences {preferences};\nDir::Etc::PreferencesParts {parts};\n\
             Acquire::Languages \"none\";\nAPT::Sandbox::User \"\";\n\
             Acquire::Check-Valid-Until \"false\";\n",
            lists = at("lists"),
            status = at("status"),
            cache = at("cache"),
            sources = at("sources"),
            parts = at("parts"),
            preferences = at("preferences"),
        ),
    )?;
    Ok(path)
}
