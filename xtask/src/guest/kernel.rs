// SPDX-License-Identifier: Apache-2.0
//! The guest kernel: Debian's Linux source, our config fragments, one `vmlinux`.

use crate::packages::{self, any, newer};
use crate::{cache, progress, workspace};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";
const FRAGMENTS: &str = "guest-kernel/fragments";
const DEBUG_FRAGMENT: &str = "guest-kernel/debug.config";
/// Owner and type of the ELF note that names the PVH entry (Xen's public/elfnote.h).
const PVH_NOTE: (&str, u32) = ("Xen", 18);

/// Which kernel to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// The one that is installed.
    Release,
    /// With what helps to find out where boot time goes.
    Debug,
}

/// Returns the `vmlinux`, built unless its inputs are those of an earlier build.
pub(crate) fn build(flavour: Flavour) -> Result<PathBuf> {
    packages::ensure(
        "building the guest kernel",
        &[
            newer(SOURCE_PACKAGE, 6),
            any("bc"),
            any("binutils"),
            any("bison"),
            any("flex"),
            any("gcc"),
            any("libc6-dev"),
            any("libelf-dev"),
            any("make"),
            any("perl"),
            any("xz-utils"),
        ],
    )?;
    let source_version = packages::version(SOURCE_PACKAGE)?;
    let request = merged_fragments(flavour)?;
    let key = cache::Key::default()
        .text("source", &source_version)
        .text("config", &request)
        .text("gcc", &tool_version("gcc")?)
        .text("ld", &tool_version("ld")?)
        .finish();
    let built = cache::folder("guest-kernel", &key, |folder| {
        let source = cache::folder("linux-source", &source_version, unpack_source)?;
        compile(&source, &request, flavour, folder)
    })?;
    Ok(built.join("vmlinux"))
}

/// All fragments in the order of their names.
fn merged_fragments(flavour: Flavour) -> Result<String> {
    let folder = workspace::root().join(FRAGMENTS);
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "config")
        })
        .collect();
    paths.sort();
    if flavour == Flavour::Debug {
        paths.push(workspace::root().join(DEBUG_FRAGMENT));
    }
    let mut merged = String::new();
    for path in paths {
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        writeln!(merged, "{text}")?;
    }
    Ok(merged)
}

fn unpack_source(folder: &Path) -> Result<()> {
    let log = tempfile::NamedTempFile::new()?;
    progress::step(
        "unpacking the Linux source",
        log.path(),
        Command::new("tar")
            .args([
                "--extract",
                "--strip-components=1",
                "--file",
                SOURCE,
                "--directory",
            ])
            .arg(folder),
    )
}

fn compile(source: &Path, request: &str, flavour: Flavour, folder: &Path) -> Result<()> {
    // Objects stay, so that a change to a fragment costs only what it touches.
    let name = match flavour {
        Flavour::Release => "guest-kernel-objects",
        Flavour::Debug => "guest-kernel-objects-debug",
    };
    let objects = workspace::cache_dir()?.join(name);
    fs::create_dir_all(&objects).with_context(|| format!("creating {}", objects.display()))?;
    let wanted = objects.join("requested.config");
    fs::write(&wanted, request)?;
    let make = |target: &str| {
        let mut make = Command::new("make");
        make.arg("-C")
            .arg(source)
            .arg(format!("O={}", objects.display()))
            .arg(format!(
                "-j{}",
                available_parallelism().map_or(1, usize::from)
            ))
            // Most of the compiler's time goes into headers; where each word of a macro came from is
            // for its messages alone, and a tenth of all.
            .arg("KCFLAGS=-ftrack-macro-expansion=0")
            .arg(target)
            .env("KCONFIG_ALLCONFIG", &wanted)
            // Its memory in huge pages, where the machine gives some.
            .env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
            // The same bytes wherever and whenever it is built.
            .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
            .env("KBUILD_BUILD_USER", "nutshell")
            .env("KBUILD_BUILD_HOST", "nutshell")
            .env("KBUILD_BUILD_VERSION", "1")
            .env("LC_ALL", "C");
        make
    };
    progress::step(
        "configuring the guest kernel",
        &objects.join("config.log"),
        &mut make("allnoconfig"),
    )?;
    let config =
        fs::read_to_string(objects.join(".config")).context("reading the kernel's .config")?;
    check_config(request, &config)?;
    progress::step(
        "building the guest kernel",
        &objects.join("build.log"),
        &mut make("vmlinux"),
    )?;

    let vmlinux = folder.join("vmlinux");
    progress::output(
        Command::new("strip")
            .arg("--strip-all")
            .arg("-o")
            .arg(&vmlinux)
            .arg(objects.join("vmlinux")),
    )?;
    let notes = progress::output(
        Command::new("readelf")
            .args(["--notes", "--wide"])
            .arg(&vmlinux),
    )?;
    if !has_pvh_note(&notes) {
        bail!("the built vmlinux has no PVH entry note");
    }
    fs::write(folder.join("config"), config)?;
    Ok(())
}

/// Every requested symbol must have the value asked: Kconfig drops silently what it can't honour.
fn check_config(request: &str, config: &str) -> Result<()> {
    let got = symbols(config);
    let mut lost = String::new();
    for (name, wanted) in symbols(request) {
        // A symbol that is off is a comment in .config, or not there at all.
        let value = got.get(name).copied().unwrap_or("n");
        if value != wanted {
            writeln!(lost, "  {name}: asked {wanted}, got {value}")?;
        }
    }
    if !lost.is_empty() {
        bail!("the kernel's configuration did not take what the fragments ask:\n{lost}");
    }
    Ok(())
}

fn symbols(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("CONFIG_")?.split_once('='))
        .collect()
}

/// Looks for the note in readelf's listing: `  Xen  0x00000008  Unknown note type: (0x00000012) …`.
fn has_pvh_note(listing: &str) -> bool {
    let (owner, kind) = PVH_NOTE;
    let kind = format!("(0x{kind:08x})");
    listing
        .lines()
        .any(|line| line.trim_start().starts_with(owner) && line.contains(&kind))
}

fn tool_version(tool: &str) -> Result<String> {
    let text = progress::output(Command::new(tool).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_symbol_is_named() {
        let request = "# comment\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=\"x\"\n";
        check_config(
            request,
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"x\"\n",
        )
        .unwrap();
        let error = check_config(request, "CONFIG_B=y\nCONFIG_C=\"x\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("A: asked y, got n") && error.contains("B: asked n, got y"),
            "{error}"
        );
    }

    #[test]
    fn finds_the_pvh_note() {
        assert!(has_pvh_note(
            "  Xen   0x00000008\tUnknown note type: (0x00000012)\t   description data: 00"
        ));
        assert!(!has_pvh_note(
            "  GNU   0x00000014\tNT_GNU_BUILD_ID (unique build ID bitstring)"
        ));
    }

    #[test]
    fn fragments_request_each_symbol_once() {
        let merged = merged_fragments(Flavour::Release).unwrap();
        let mut names: Vec<&str> = merged
            .lines()
            .filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('='))
            .map(|(name, _)| name)
            .collect();
        names.sort_unstable();
        let twice: Vec<_> = names
            .windows(2)
            .filter(|pair| pair.first() == pair.last())
            .collect();
        assert!(twice.is_empty(), "requested twice: {twice:?}");
    }
}
