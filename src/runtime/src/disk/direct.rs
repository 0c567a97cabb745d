// SPDX-License-Identifier: Apache-2.0
//! Direct-assigned volumes: a storage driver tells by `kata-ctl direct-volume add` that what is bound
//! from a path is a file system on a disk, which the guest mounts instead of the host. What it tells
//! is kept in a file of Kata's format, at Kata's place.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use data_encoding::BASE64URL;
use protocols::agent::agent::FSGroup;
use protocols::agent::types::FSGroupChangePolicy;
use serde::{Deserialize, Serialize};

use super::{Filesystem, Wanted, options_for};
use crate::error::{Context, Kind, Result, ShimError};

/// Where the volumes are told; each in a folder named by its path.
const ROOT: &str = "/run/kata-containers/shared/direct-volumes";
const FILE: &str = "mountInfo.json";

/// Where the guest mounts volumes.
const GUEST_ROOT: &str = "/run/kata-containers/sandbox/storage";

/// A volume, as it is told.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct MountInfo {
    /// `block` or `directvol`: both mean a disk.
    #[serde(rename = "volume-type", alias = "volume_type")]
    kind: String,
    /// A block device, or a file that holds a disk's content.
    device: PathBuf,
    #[serde(rename = "fstype", alias = "fs_type")]
    filesystem: String,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    #[serde(default)]
    options: Vec<String>,
}

/// Tells of a volume.
pub(crate) fn add(volume: &Path, text: &str) -> Result<()> {
    add_below(Path::new(ROOT), volume, text)
}

/// Takes that back.
pub(crate) fn remove(volume: &Path) -> Result<()> {
    remove_below(Path::new(ROOT), volume)
}

/// The disk of the volume at `path`, if it is one, and where the guest mounts it.
pub(crate) fn volume(path: &Path) -> Result<Option<(Wanted, String)>> {
    let wanted = volume_below(Path::new(ROOT), path)?;
    Ok(wanted.map(|wanted| (wanted, in_guest(path))))
}

fn in_guest(path: &Path) -> String {
    format!("{GUEST_ROOT}/{}", encode(path))
}

fn add_below(root: &Path, volume: &Path, text: &str) -> Result<()> {
    if !volume.is_absolute() {
        return Err(ShimError::new(
            Kind::InvalidArgument,
            format!("volume {}: wants an absolute path", volume.display()),
        ));
    }
    let info = MountInfo::read(text).context(Kind::InvalidArgument, || "mount info".to_owned())?;
    info.wanted(volume)?;
    let folder = root.join(encode(volume));
    let text = serde_json::to_string(&info).internal(|| "mount info".to_owned())?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .internal(|| format!("create {}", folder.display()))?;
    // Whole or not at all: a container may be starting.
    let (file, new) = (folder.join(FILE), folder.join(".new"));
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, &file))
        .internal(|| format!("write {}", file.display()))
}

fn remove_below(root: &Path, volume: &Path) -> Result<()> {
    let folder = root.join(encode(volume));
    fs::remove_dir_all(&folder).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ShimError::new(
            Kind::NotFound,
            format!("volume {} is not a direct-assigned one", volume.display()),
        ),
        _ => ShimError::new(
            Kind::Internal,
            format!("remove {}: {error}", folder.display()),
        ),
    })
}

fn volume_below(root: &Path, path: &Path) -> Result<Option<Wanted>> {
    let file = root.join(encode(path)).join(FILE);
    let context = || format!("direct-assigned volume {}", path.display());
    let text = match fs::read_to_string(&file) {
        // A path that has no place there can't have been told either.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ENAMETOOLONG) =>
        {
            return Ok(None);
        }
        text => text.internal(context)?,
    };
    let info = MountInfo::read(&text).context(Kind::InvalidArgument, context)?;
    info.wanted(path).map(Some)
}

impl MountInfo {
    fn read(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    fn wanted(&self, volume: &Path) -> Result<Wanted> {
        let wrong = |what: String| {
            let text = format!("direct-assigned volume {}: {what}", volume.display());
            ShimError::new(Kind::InvalidArgument, text)
        };
        if !["block", "directvol"].contains(&self.kind.as_str()) {
            let what = format!("volume-type {:?}: wants block or directvol", self.kind);
            return Err(wrong(what));
        }
        if !self.device.is_absolute() {
            let what = format!("device {:?}: wants an absolute path", self.device);
            return Err(wrong(what));
        }
        if self.filesystem.is_empty() {
            return Err(wrong("fstype: missing".to_owned()));
        }
        let filesystem = Filesystem {
            kind: self.filesystem.clone(),
            options: options_for(&self.filesystem, self.options.iter()),
            point: in_guest(volume),
            group: self.group().map_err(wrong)?,
        };
        Ok(Wanted::filesystem(&self.device, filesystem))
    }

    /// Kubernetes' `fsGroup` and its policy.
    fn group(&self) -> Result<Option<FSGroup>, String> {
        let mut group = None;
        let mut policy = FSGroupChangePolicy::Always;
        for (key, value) in &self.metadata {
            let what = || format!("metadata {key}: {value:?}");
            match key.as_str() {
                "fsGroup" => group = Some(value.parse().map_err(|_| what())?),
                "fsGroupChangePolicy" => {
                    policy = match value.as_str() {
                        "Always" => FSGroupChangePolicy::Always,
                        "OnRootMismatch" => FSGroupChangePolicy::OnRootMismatch,
                        _ => return Err(what()),
                    }
                }
                _ => return Err(format!("metadata {key}: unknown")),
            }
        }
        Ok(group.map(|group_id| FSGroup {
            group_id,
            group_change_policy: policy.into(),
            ..FSGroup::default()
        }))
    }
}

/// A path as a file name: base64, URL-safe (RFC 4648, section 5).
fn encode(path: &Path) -> String {
    BASE64URL.encode(path.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    const INFO: &str = r#"{"volume-type": "block", "device": "/dev/sdf", "fstype": "xfs",
        "metadata": {"fsGroup": "3000", "fsGroupChangePolicy": "OnRootMismatch"},
        "options": ["ro", "noatime"]}"#;

    #[test]
    fn paths_become_names() {
        for (path, name) in [
            ("/a", "L2E="),
            ("/ab", "L2Fi"),
            ("/abc", "L2FiYw=="),
            ("/\u{3ff}?>", "L8-_Pz4="),
        ] {
            assert_eq!(encode(Path::new(path)), name);
        }
    }

    #[test]
    fn a_volume_that_is_told_is_a_disk() {
        let root = tempfile::tempdir().unwrap();
        let path = Path::new("/var/lib/kubelet/pods/u/volumes/v/mount");
        assert_eq!(volume_below(root.path(), path).unwrap(), None);
        add_below(root.path(), path, INFO).unwrap();
        let wanted = volume_below(root.path(), path).unwrap().unwrap();
        assert!(wanted.read_only);
        let Role::Filesystem(filesystem) = wanted.role else {
            panic!("not a file system");
        };
        assert_eq!(filesystem.kind, "xfs");
        assert_eq!(filesystem.options, ["ro", "noatime", "nouuid"]);
        let group = filesystem.group.unwrap();
        assert_eq!(group.group_id, 3000);
        // What Kata's own tools write in its place.
        let other = INFO
            .replace("volume-type", "volume_type")
            .replace("fstype", "fs_type");
        add_below(root.path(), path, &other).unwrap();
        remove_below(root.path(), path).unwrap();
        assert_eq!(volume_below(root.path(), path).unwrap(), None);
        let error = remove_below(root.path(), path).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_told_wrong_is_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        let path = Path::new("/v");
        for (from, to, word) in [
            ("\"block\"", "\"spdkvol\"", "spdkvol"),
            ("/dev/sdf", "sdf", "device \"sdf\""),
            ("\"xfs\"", "\"\"", "fstype"),
            ("3000", "many", "fsGroup"),
            ("OnRootMismatch", "Never", "fsGroupChangePolicy"),
            ("fsGroup\"", "fsgroup\"", "fsgroup"),
            ("\"options\"", "\"option\"", "option"),
        ] {
            let text = INFO.replacen(from, to, 1);
            assert_ne!(text, INFO);
            let error = add_below(root.path(), path, &text).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument);
            assert!(error.chain().contains(word), "{}", error.chain());
        }
        add_below(root.path(), Path::new("v"), INFO).unwrap_err();
        let long = format!("/{}", "x".repeat(250));
        add_below(root.path(), Path::new(&long), INFO).unwrap_err();
        assert_eq!(volume_below(root.path(), Path::new(&long)).unwrap(), None);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
