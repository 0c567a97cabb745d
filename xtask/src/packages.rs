// SPDX-License-Identifier: Apache-2.0
//! Debian packages: installed when missing, or unpacked without being installed.

use crate::progress;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

const OS_RELEASE: &str = "/etc/os-release";
const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/nutshell-backports.list";
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";

/// A package that a step needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Package {
    name: &'static str,
    /// Lowest major version that will do, and that Debian 12 has in its backports only.
    backport: Option<u32>,
}

/// A package of any version.
pub(crate) const fn any(name: &'static str) -> Package {
    Package {
        name,
        backport: None,
    }
}

/// A package of at least this major version, from backports on Debian 12.
pub(crate) const fn newer(name: &'static str, major: u32) -> Package {
    Package {
        name,
        backport: Some(major),
    }
}

/// Makes sure that the packages are installed; `purpose` is told to the user when they are not.
pub(crate) fn ensure(purpose: &str, packages: &[Package]) -> Result<()> {
    let installed = installed(packages)?;
    let missing: Vec<&Package> = packages
        .iter()
        .filter(
            |package| match (installed.get(package.name), package.backport) {
                (None, _) => true,
                (Some(version), Some(major)) => major_version(version) < major,
                (Some(_), None) => false,
            },
        )
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let codename =
        debian_codename().with_context(|| format!("{purpose} needs {}", names.join(", ")))?;
    progress::note(&format!("{purpose} needs {}; installing", names.join(", ")));
    let from_backports =
        codename == "bookworm" && missing.iter().any(|package| package.backport.is_some());
    if from_backports {
        enable_backports(&codename)?;
    }
    apt("update", &[])?;
    for package in missing {
        let plain = ["--yes", "--no-install-recommends", package.name];
        let newer = [&["--target-release", "bookworm-backports"], &plain[..]].concat();
        let result = if codename != "bookworm" {
            apt("install", &plain)
        } else if package.backport.is_some() {
            apt("install", &newer)
        } else {
            // A library that came along from backports keeps out the headers of Debian's own.
            apt("install", &plain).or_else(|error| apt("install", &newer).map_err(|_| error))
        };
        result.with_context(|| format!("{purpose} needs the Debian package {}", package.name))?;
    }
    Ok(())
}

/// Version of an installed package.
pub(crate) fn version(name: &str) -> Result<String> {
    Ok(progress::output(Command::new("dpkg-query").args([
        "--show",
        "--showformat=${Version}",
        name,
    ]))?
    .trim()
    .to_owned())
}

/// The newest package that a metapackage depends on and whose name begins with `prefix`.
pub(crate) fn dependency(metapackage: &str, prefix: &str) -> Result<String> {
    let find = || -> Result<Option<String>> {
        let text = progress::output(Command::new("apt-cache").args([
            "depends",
            "--important",
            metapackage,
        ]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned))
    };
    if let Ok(Some(name)) = find() {
        return Ok(name);
    }
    debian_codename()?;
    apt("update", &[])?;
    find()?.with_context(|| format!("Debian's {metapackage} names no package {prefix}*"))
}

/// Downloads a package and unpacks it into `folder` without installing it.
pub(crate) fn unpack(name: &str, folder: &Path) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let download = || {
        progress::step(
            &format!("downloading {name}"),
            &scratch.path().join("log"),
            Command::new("apt-get")
                .args(["download", name])
                .current_dir(scratch.path()),
        )
    };
    if download().is_err() {
        // Package lists may be older than the archive.
        apt("update", &[])?;
        download().with_context(|| format!("downloading the Debian package {name}"))?;
    }
    let archive = fs::read_dir(scratch.path())?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get downloaded no file for {name}"))?;
    progress::output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(archive)
            .arg(folder),
    )?;
    Ok(())
}

fn installed(packages: &[Package]) -> Result<BTreeMap<String, String>> {
    let output = Command::new("dpkg-query")
        .args([
            "--show",
            "--showformat=${Package} ${Version} ${db:Status-Status}\n",
        ])
        .args(packages.iter().map(|package| package.name))
        .output()
        .context("asking dpkg for installed packages (is this Debian?)")?;
    // Exit status 1 only says that some are unknown.
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            match (words.next(), words.next(), words.next()) {
                (Some(name), Some(version), Some("installed")) => {
                    Some((name.to_owned(), version.to_owned()))
                }
                _ => None,
            }
        })
        .collect())
}

/// The number that a Debian version begins with, its epoch aside.
fn major_version(version: &str) -> u32 {
    let upstream = version
        .split_once(':')
        .map_or(version, |(_, upstream)| upstream);
    let digits: String = upstream.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

fn debian_codename() -> Result<String> {
    let text = fs::read_to_string(OS_RELEASE).with_context(|| format!("reading {OS_RELEASE}"))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    if field("ID") != "debian" {
        bail!(
            "packages are installed on Debian only; this is {}: install them by hand",
            field("PRETTY_NAME")
        );
    }
    Ok(field("VERSION_CODENAME"))
}

fn enable_backports(codename: &str) -> Result<()> {
    let release = format!("{codename}-backports");
    let targets = progress::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(SUITE) $(CODENAME) $(SITE)",
    ]))?;
    if targets.contains(&release) {
        return Ok(());
    }
    // The mirror that this machine already uses.
    let mirror = targets
        .lines()
        .filter_map(|line| line.rsplit_once(' '))
        .find(|(names, _)| names.split(' ').any(|name| name == codename))
        .map_or(DEFAULT_MIRROR, |(_, site)| site);
    progress::note(&format!("adding {release} in {BACKPORTS_LIST}"));
    let line = format!("deb {mirror} {release} main\n");
    let scratch = tempfile::NamedTempFile::new()?;
    fs::write(scratch.path(), line)?;
    progress::run(
        as_root("install")
            .args(["-m", "644"])
            .arg(scratch.path())
            .arg(BACKPORTS_LIST),
    )
}

fn apt(action: &str, arguments: &[&str]) -> Result<()> {
    let log = tempfile::NamedTempFile::new()?;
    let title = match action {
        "update" => "updating package lists".to_owned(),
        _ => format!("installing {}", arguments.last().unwrap_or(&"packages")),
    };
    progress::step(
        &title,
        log.path(),
        as_root("env")
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", action])
            .args(arguments),
    )
}

/// A command run as root: directly, or through sudo.
pub(crate) fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn major_versions() {
        assert_eq!(major_version("1:10.0.2+ds-2"), 10);
        assert_eq!(major_version("6.12.95-1~bpo12+1"), 6);
        assert_eq!(major_version("x"), 0);
    }
}
