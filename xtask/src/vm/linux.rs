// SPDX-License-Identifier: Apache-2.0
//! The dev VM's own Linux: Debian's kernel with the modules it needs, unpacked, not installed.

use super::cpio;
use crate::{cache, packages, progress, workspace};
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is loaded at start, with all they depend on. A name that the kernel has built in is skipped.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32c_generic",
    "kvm_amd",
    "loop",
    "ext4",
    "erofs",
    "fuse",
    // Networks of pods, and how our runtime joins them to a tap.
    "tun",
    "veth",
    "bridge",
    "macvlan",
    "macvtap",
    "ipvlan",
    "vhost_net",
    "sch_ingress",
    "cls_u32",
    "cls_matchall",
    "act_mirred",
];

const INIT: &str = include_str!("init.sh");
const BUSYBOX: &str = "/bin/busybox";

/// Kernel and initramfs of the dev VM.
#[derive(Debug)]
pub(crate) struct Linux {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

/// Downloads the kernel once and builds the initramfs when its inputs change.
pub(crate) fn prepare() -> Result<Linux> {
    // A machine without package lists keeps the kernel that it has.
    let package = match current()? {
        Some(name) => name,
        None => packages::dependency("linux-image-amd64", "linux-image-")?,
    };
    let unpacked = cache::folder("devvm-linux", &package, |folder| {
        packages::unpack(&package, folder)
    })?;
    let kernel = find(&unpacked.join("boot"), "vmlinuz-")?;
    let key = cache::Key::default()
        .text("kernel", &package)
        .text("modules", &MODULES.join(" "))
        .text("init", INIT)
        .file(Path::new(BUSYBOX))?
        .finish();
    let built = cache::folder("devvm-initramfs", &key, |folder| {
        progress::note("building the dev VM's initramfs");
        build_initramfs(&unpacked, &folder.join("initramfs"))
    })?;
    Ok(Linux {
        kernel,
        initramfs: built.join("initramfs"),
    })
}

/// The kernel package in the cache, if there is one.
fn current() -> Result<Option<String>> {
    let folder = workspace::cache_dir()?.join("devvm-linux");
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    Ok(names.pop())
}

fn build_initramfs(unpacked: &Path, target: &Path) -> Result<()> {
    // Debian 13 keeps /lib as a link to /usr/lib, and its packages' files there.
    let base = ["lib/modules", "usr/lib/modules"]
        .map(|folder| unpacked.join(folder))
        .into_iter()
        .find(|folder| folder.is_dir())
        .context("the kernel package has no modules")?;
    let folder = find(&base, "")?;
    let order = load_order(&dependencies(unpacked, &base, &folder)?);

    let mut archive = cpio::Archive::new(Vec::new());
    for name in ["bin", "modules"] {
        archive.directory(name)?;
    }
    archive.file(
        "bin/busybox",
        &fs::read(BUSYBOX).context("reading busybox")?,
    )?;
    archive.file("init", INIT.as_bytes())?;
    let mut names = String::new();
    for module in &order {
        let name = module
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let (name, content) = match name.strip_suffix(".xz") {
            Some(plain) => (plain.to_owned(), unxz(&folder.join(module))?),
            None => (
                name,
                fs::read(folder.join(module))
                    .with_context(|| format!("reading {}", module.display()))?,
            ),
        };
        archive.file(&format!("modules/{name}"), &content)?;
        names.push_str(&name);
        names.push('\n');
    }
    archive.file("modules/order", names.as_bytes())?;
    fs::write(target, archive.finish()?).with_context(|| format!("writing {}", target.display()))
}

/// Every module's path and the paths that it needs, from depmod.
fn dependencies(
    unpacked: &Path,
    base: &Path,
    folder: &Path,
) -> Result<BTreeMap<PathBuf, Vec<PathBuf>>> {
    let version = folder.file_name().context("no kernel version")?;
    let root = base.parent().and_then(Path::parent).unwrap_or(unpacked);
    progress::output(
        Command::new("/sbin/depmod")
            .arg("--basedir")
            .arg(root)
            .arg(version),
    )?;
    let text = fs::read_to_string(folder.join("modules.dep")).context("reading modules.dep")?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| {
            (
                PathBuf::from(module),
                needs.split_whitespace().map(PathBuf::from).collect(),
            )
        })
        .collect())
}

/// The wanted modules after all that they need.
fn load_order(dependencies: &BTreeMap<PathBuf, Vec<PathBuf>>) -> Vec<PathBuf> {
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for wanted in MODULES {
        let Some((module, needs)) = dependencies
            .iter()
            .find(|(path, _)| module_name(path) == *wanted)
        else {
            continue;
        };
        // modules.dep lists them in reverse order of loading.
        for path in needs.iter().rev().chain([module]) {
            if seen.insert(path.clone()) {
                order.push(path.clone());
            }
        }
    }
    order
}

fn module_name(path: &Path) -> String {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

fn unxz(path: &Path) -> Result<Vec<u8>> {
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .context("starting xz")?;
    if !output.status.success() {
        bail!("xz cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

fn find(folder: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .with_context(|| format!("nothing named {prefix}* in {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_need() {
        let dependencies = BTreeMap::from([
            (
                PathBuf::from("fs/9p.ko"),
                vec![PathBuf::from("net/9pnet.ko"), PathBuf::from("fs/netfs.ko")],
            ),
            (PathBuf::from("net/9pnet.ko"), vec![]),
            (PathBuf::from("fs/netfs.ko"), vec![]),
            (PathBuf::from("fs/other.ko"), vec![]),
        ]);
        let names: Vec<String> = load_order(&dependencies)
            .iter()
            .map(|path| module_name(path))
            .collect();
        assert_eq!(names, ["netfs", "9pnet", "9p"]);
    }
}
