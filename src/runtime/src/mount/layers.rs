// SPDX-License-Identifier: Apache-2.0
//! Mounts of which later ones are made of those before, as their templates say: layers in files below
//! a folder of the host's that may be written. They are made in the shim's mount namespace, as
//! containerd makes them on the host for a runtime that does not take them itself.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use protocols::containerd::mount::Mount;

use super::{mount_one, unmount};
use crate::error::{Context, Kind, Result};
use crate::raw::loops;
use crate::template::{self, BLOB, Piece};

/// What layers are, and what is made of them.
const KINDS: [&str; 3] = ["erofs", "overlay", "bind"];

const CONTROL: &str = "/dev/loop-control";
/// How often another process may take the loop device that was free.
const ATTEMPTS: u32 = 32;

/// Where layers are mounted while something is made of them, which keeps them. Gone with this value.
#[derive(Debug)]
struct Stage<'path> {
    folder: &'path Path,
    points: Vec<PathBuf>,
}

/// Makes the mounts: all but the last in `folder`, which is gone in the end, the last at `target`.
pub(crate) fn mount_layers(mounts: &[Mount], folder: &Path, target: &Path) -> Result<()> {
    let Some((last, layers)) = mounts.split_last() else {
        return Ok(());
    };
    let mut stage = Stage {
        folder,
        points: Vec::new(),
    };
    for (at, layer) in layers.iter().enumerate() {
        let point = folder.join(at.to_string());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&point)
            .internal(|| format!("create {}", point.display()))?;
        stage.mount(layer, at, &point)?;
        stage.points.push(point);
    }
    stage.mount(last, layers.len(), target)
}

impl Stage<'_> {
    fn mount(&self, mount: &Mount, at: usize, target: &Path) -> Result<()> {
        let kind = template::kind(mount);
        if !KINDS.contains(&kind) {
            let what = format!("type {:?} is none of {}", mount.type_, KINDS.join(", "));
            return Err(template::unsupported(at, &what));
        }
        let mut plain = Mount {
            type_: kind.to_owned(),
            source: self.expand(&mount.source, at)?,
            ..Mount::default()
        };
        // Until the mount has them.
        let mut devices = Vec::new();
        let mut attach = |path: &str| -> Result<String> {
            let (name, device) = attach(path).context(Kind::InvalidArgument, || path.to_owned())?;
            devices.push(device);
            Ok(name)
        };
        if mount.options.iter().any(|option| option == "loop") {
            plain.source = attach(&plain.source)?;
        }
        for option in template::options(mount, at)? {
            plain.options.push(match option.strip_prefix(BLOB) {
                Some(blob) => format!("{BLOB}{}", attach(blob)?),
                None => self.expand(option, at)?,
            });
        }
        mount_one(&plain, target).context(Kind::Internal, || {
            format!("rootfs: mount {at}: {}", mount.source)
        })
    }

    /// A text with where mounts are in place of its templates.
    fn expand(&self, text: &str, at: usize) -> Result<String> {
        let pieces = template::pieces(text, at)?.into_iter();
        let expanded = pieces.map(|piece| match piece {
            Piece::Text(text) => text.to_owned(),
            Piece::Mounts(numbers) => {
                let points = numbers.iter().filter_map(|number| self.points.get(*number));
                let points: Vec<_> = points.map(|it| it.display().to_string()).collect();
                points.join(":")
            }
        });
        Ok(expanded.collect())
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        for point in self.points.iter().rev() {
            let _ = unmount(point);
        }
        // Empty folders; what is mounted on is not removed.
        for entry in fs::read_dir(self.folder).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(self.folder);
    }
}

/// A loop device that shows a file, by name, and itself: it ends with its last user.
fn attach(path: &str) -> io::Result<(String, File)> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let file = File::open(path)?;
    let control = File::open(CONTROL)
        .map_err(|error| io::Error::new(error.kind(), format!("{CONTROL}: {error}")))?;
    let mut attempts = ATTEMPTS;
    loop {
        let name = format!("/dev/loop{}", loops::free(&control)?);
        let device = File::open(&name)?;
        match loops::configure(&device, &file) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && attempts > 0 => {
                attempts = attempts.saturating_sub(1);
            }
            configured => return configured.map(|()| (name, device)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::mount;

    #[test]
    fn templates_are_where_layers_are_mounted() {
        let stage = Stage {
            folder: Path::new("/nonexistent"),
            points: ["/s/0", "/s/1"].map(PathBuf::from).to_vec(),
        };
        let expanded = stage.expand("lowerdir={{ overlay 0 1 }}:/a", 2).unwrap();
        assert_eq!(expanded, "lowerdir=/s/0:/s/1:/a");
        assert_eq!(stage.expand("upperdir=/u", 2).unwrap(), "upperdir=/u");
        stage.expand("{{ mount 2 }}", 2).unwrap_err();
    }

    #[test]
    fn what_can_not_be_mounted_is_told_and_nothing_stays() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("layers");
        let missing = place.path().join("layer.erofs").display().to_string();
        let overlay = mount("format/overlay", "overlay", &["lowerdir={{ mount 0 }}"]);
        for (layer, words) in [
            (
                mount("erofs", &missing, &["ro", "loop"]),
                "layer.erofs: No such file",
            ),
            (
                mount("squashfs", "/a", &["ro", "loop"]),
                "type \"squashfs\" is none of erofs",
            ),
            (mount("erofs", "/", &["ro", "loop"]), "/: it is no file"),
            (
                mount("erofs", "/a", &["X-containerd.dmverity=/a"]),
                "dmverity_mode",
            ),
        ] {
            let error = mount_layers(&[layer, overlay.clone()], &folder, place.path());
            let error = error.unwrap_err().chain();
            assert!(error.contains(words), "{words}: {error}");
            assert!(!folder.exists());
        }
    }
}
