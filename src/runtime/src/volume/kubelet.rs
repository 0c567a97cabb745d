// SPDX-License-Identifier: Apache-2.0
//! A kubelet's volumes, by where it keeps them: `pods/UID/volumes/kubernetes.io~KIND/NAME`, and
//! `pods/UID/volume-subpaths/NAME/CONTAINER/N` for a folder of one.

use std::ffi::OsStr;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// What a kubelet keeps in a folder.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Volume {
    /// An `emptyDir`.
    Empty(Empty),
    /// What it writes for the pod to read, and writes anew: ConfigMap, Secret, projected, downward.
    Configuration,
}

/// An `emptyDir`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Empty {
    /// The volume's name in its pod.
    pub(super) name: String,
    /// The volume's own folder.
    pub(super) folder: PathBuf,
    /// The folder in it that is asked for, unless it is the whole.
    pub(super) below: Option<PathBuf>,
}

/// What the folder `path` is, if it is a kubelet's.
pub(super) fn volume(path: &Path) -> Option<Volume> {
    if let Some(folder) = subpath_of(path) {
        let below = mounted_root(path, &fs::read_to_string("/proc/self/mountinfo").ok()?)?;
        return Some(Volume::Empty(Empty {
            name: name(&folder)?,
            folder,
            below: Some(below),
        }));
    }
    let kind = path.parent()?;
    if kind.parent()?.file_name()? != "volumes" {
        return None;
    }
    match kind.file_name()?.to_str()?.strip_prefix("kubernetes.io~")? {
        "empty-dir" => Some(Volume::Empty(Empty {
            name: name(path)?,
            folder: path.to_owned(),
            below: None,
        })),
        "configmap" | "secret" | "projected" | "downward-api" => Some(Volume::Configuration),
        _ => None,
    }
}

/// The `emptyDir` that a folder is a part of.
fn subpath_of(path: &Path) -> Option<PathBuf> {
    let volume = path.parent()?.parent()?;
    let all = volume.parent()?;
    if all.file_name()? != "volume-subpaths" || !path.is_dir() {
        return None;
    }
    let folder = all
        .parent()?
        .join("volumes/kubernetes.io~empty-dir")
        .join(volume.file_name()?);
    folder.is_dir().then_some(folder)
}

fn name(folder: &Path) -> Option<String> {
    folder.file_name()?.to_str().map(ToOwned::to_owned)
}

/// Which folder of its file system is mounted at `path`, relative to the file system's root; the last
/// mount there counts (`proc_pid_mountinfo(5)`).
fn mounted_root(path: &Path, mountinfo: &str) -> Option<PathBuf> {
    let root = mountinfo
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(3);
            let (root, point) = (unescaped(fields.next()?), unescaped(fields.next()?));
            (Path::new(&point) == path).then_some(root)
        })
        .next_back()?;
    let below = Path::new(&root).strip_prefix("/").ok()?;
    let plain = below
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    (plain && below != OsStr::new("")).then(|| below.to_owned())
}

/// Blanks and backslashes are written as three octal digits.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) if code.is_ascii() => {
                text.push(char::from(code));
                text.push_str(part.get(3..).unwrap_or_default());
            }
            _ => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

/// The size of pages that a limit names (`2MB`, `1GB`, `64KB`), in bytes.
pub(super) fn page_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(char::is_alphabetic);
    let shift = match text.get(digits.len()..)? {
        "KB" => 10,
        "MB" => 20,
        "GB" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_known_by_their_places() {
        let at = |path: &str| volume(Path::new(path));
        let pod = "/var/lib/kubelet/pods/u/volumes";
        assert_eq!(
            at(&format!("{pod}/kubernetes.io~empty-dir/cache")),
            Some(Volume::Empty(Empty {
                name: "cache".to_owned(),
                folder: format!("{pod}/kubernetes.io~empty-dir/cache").into(),
                below: None,
            }))
        );
        for kind in ["configmap", "secret", "projected", "downward-api"] {
            let path = format!("{pod}/kubernetes.io~{kind}/x");
            assert_eq!(at(&path), Some(Volume::Configuration));
        }
        for path in [
            "/etc/hosts",
            "/",
            "/kubernetes.io~secret/x",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~nfs/x",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~secret/x/..data",
        ] {
            assert_eq!(at(path), None, "{path}");
        }
    }

    #[test]
    fn a_part_of_a_volume_is_found_in_the_mounts() {
        let mounts = "36 35 0:30 / /a rw - tmpfs tmpfs rw\n\
                      37 35 0:31 /old /a/b\\040c rw - tmpfs tmpfs rw\n\
                      38 35 0:31 /x/y\\040z /a/b\\040c rw shared:1 - tmpfs tmpfs rw\n";
        let root = |path| mounted_root(Path::new(path), mounts);
        assert_eq!(root("/a/b c"), Some("x/y z".into()));
        assert_eq!(root("/a"), None);
        assert_eq!(root("/b"), None);
    }

    #[test]
    fn page_sizes_are_read() {
        assert_eq!(page_size("2MB"), Some(2 << 20));
        assert_eq!(page_size("1GB"), Some(1 << 30));
        assert_eq!(page_size("2M"), None);
    }
}
