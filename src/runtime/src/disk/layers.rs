// SPDX-License-Identifier: Apache-2.0
//! A root file system of layers, each in a file, as containerd's EROFS snapshotter has it: read-only
//! layers, and one that may be written. Each becomes a disk of the machine, and the guest joins them.
//!
//! The last mount is the overlay. Its options say by templates which of the mounts before is what,
//! and in what order the read-only ones lie: the uppermost first, as in any `lowerdir`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use protocols::containerd::mount::Mount;
use vmm::arch::x86_64::layout::HOTPLUG_SLOTS;

use super::{Filesystem, Role, Source, Wanted, options_for, rootfs_in_guest};
use crate::error::{Context, Kind, Result, ShimError};
use crate::template::{self, BLOB, Piece, wrong};

const EROFS: &str = "erofs";
/// What the guest can write to, of what containerd makes.
const WRITABLE: [&str; 2] = ["ext4", "xfs"];

/// Where an EROFS has its magic number, and that (Linux, `fs/erofs/erofs_fs.h`).
const SUPERBLOCK: u64 = 1024;
const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();

/// An option of the overlay's: a folder to make before.
const MAKE: &str = "X-containerd.mkdir.path=";

/// The agent's words for the parts of an overlay, as Kata's agent has them.
const ONE_OF_SEVERAL: &str = "X-kata.multi-layer=true";
const UPPER: &str = "X-kata.overlay-upper";
const LOWER: &str = "X-kata.overlay-lower";
const MAKE_IN_GUEST: &str = "X-kata.mkdir.path={{ mount 0 }}";

/// What the overlay is made of, by the numbers of mounts.
#[derive(Debug, PartialEq, Eq)]
struct Overlay {
    upper: usize,
    /// The uppermost first.
    lower: Vec<usize>,
    /// Folders to make on the writable layer.
    folders: Vec<String>,
}

/// Whether these are layers of which the writable one is on a disk. Where that is a folder of the
/// host's, or there is none, the host joins them.
pub(super) fn are_disks(mounts: &[Mount]) -> bool {
    let Some((_, layers)) = mounts.split_last() else {
        return false;
    };
    mounts.iter().any(template::has_steps) && layers.iter().any(|mount| !is_erofs(mount))
}

/// The disks, in the order that the agent takes them in.
pub(super) fn disks(container: &str, mounts: &[Mount]) -> Result<Vec<Wanted>> {
    let (overlay, layers) = read(mounts)?;
    let mut disks = Vec::new();
    let numbers = [overlay.upper].into_iter().chain(overlay.lower);
    for (place, number) in numbers.enumerate() {
        let Some(mount) = layers.get(number) else {
            continue;
        };
        let kind = template::kind(mount);
        let mut options = options_for(kind, template::options(mount, number)?);
        if place == 0 {
            options.extend([ONE_OF_SEVERAL, UPPER].map(str::to_owned));
            options.extend(
                overlay
                    .folders
                    .iter()
                    .map(|it| format!("{MAKE_IN_GUEST}{it}")),
            );
        } else {
            // Of the layer that follows them.
            let blobs = options.iter().filter_map(|it| it.strip_prefix(BLOB));
            disks.extend(blobs.map(|blob| Wanted {
                source: Source::Path(PathBuf::from(blob)),
                read_only: true,
                role: Role::Blob,
            }));
            options.retain(|it| !it.starts_with(BLOB) && it != "rw" && it != "ro");
            options.extend(["ro", ONE_OF_SEVERAL, LOWER].map(str::to_owned));
        }
        disks.push(Wanted {
            source: Source::Path(PathBuf::from(&mount.source)),
            read_only: place != 0,
            role: Role::Layer(Filesystem {
                kind: kind.to_owned(),
                options,
                point: rootfs_in_guest(container),
                group: None,
            }),
        });
    }
    if disks.len() > HOTPLUG_SLOTS.len() {
        let line = format!(
            "rootfs: layers on {} disks, where a machine takes {}: default_size = \"0\" of containerd's \
             EROFS snapshotter has the host join them",
            disks.len(),
            HOTPLUG_SLOTS.len()
        );
        return Err(ShimError::new(Kind::FailedPrecondition, line));
    }
    // A line about each file, before there is a machine.
    disks.iter().try_for_each(Wanted::check)?;
    Ok(disks)
}

/// Sorts the mounts: what the overlay is made of, and all but the overlay.
fn read(mounts: &[Mount]) -> Result<(Overlay, &[Mount])> {
    let (last, layers) = mounts
        .split_last()
        .ok_or_else(|| ShimError::new(Kind::InvalidArgument, "rootfs: no mounts"))?;
    for (number, mount) in layers.iter().enumerate() {
        let kind = mount.type_.as_str();
        if kind != EROFS && !WRITABLE.contains(&kind) {
            return Err(unknown(number, mount));
        }
    }
    let at = layers.len();
    if template::kind(last) != "overlay" {
        return Err(unknown(at, last));
    }
    if let Some((number, _)) = (mounts.iter().enumerate()).find(|(_, it)| !it.target.is_empty()) {
        return Err(wrong(number, "a layer has no target of its own"));
    }
    let (mut upper, mut work, mut lower, mut folders) = (None, None, Vec::new(), Vec::new());
    for option in &last.options {
        if let Some(text) = option.strip_prefix("upperdir=") {
            upper = Some(folder(text, at)?);
        } else if let Some(text) = option.strip_prefix("workdir=") {
            work = Some(folder(text, at)?);
        } else if let Some(text) = option.strip_prefix("lowerdir=") {
            lower = whole(text, at)?;
        } else if let Some(text) = option.strip_prefix(MAKE) {
            folders.push(folder(text, at)?);
        } else if !option.is_empty() && option != "rw" {
            let what = format!("option {option:?} is not supported for layers on disks");
            return Err(template::unsupported(at, &what));
        }
    }
    let (Some((upper, "/upper")), Some((same, "/work"))) = (upper, work) else {
        let what = "upperdir and workdir have to be /upper and /work of a mount before";
        return Err(wrong(at, what));
    };
    if same != upper || folders.iter().any(|(number, _)| *number != upper) {
        return Err(wrong(at, "its folders have to be on one layer"));
    }
    if layers.get(upper).is_none_or(is_erofs) {
        return Err(wrong(upper, "an EROFS can't be the writable layer"));
    }
    let mut used = lower.clone();
    used.push(upper);
    used.sort_unstable();
    if lower.is_empty() || !used.into_iter().eq(0..layers.len()) {
        return Err(wrong(
            at,
            "each mount before has to be one of its layers, once",
        ));
    }
    if let Some(number) = (lower.iter()).find(|it| !layers.get(**it).is_some_and(is_erofs)) {
        return Err(wrong(*number, "only an EROFS can be a read-only layer"));
    }
    let folders = folders.into_iter().map(|(_, path)| path.to_owned());
    let overlay = Overlay {
        upper,
        lower,
        folders: folders.collect(),
    };
    Ok((overlay, layers))
}

/// A folder on one mount: its number, and the path there.
fn folder(text: &str, at: usize) -> Result<(usize, &str)> {
    match *template::pieces(text, at)? {
        [Piece::Mounts(ref mounts), Piece::Text(path)] if path.starts_with('/') => match **mounts {
            [number] => Ok((number, path)),
            _ => Err(wrong(at, &format!("{text:?} is more than one folder"))),
        },
        _ => Err(wrong(
            at,
            &format!("{text:?} is no folder of a mount before"),
        )),
    }
}

/// Mounts as they are, with colons between them.
fn whole(text: &str, at: usize) -> Result<Vec<usize>> {
    let mut numbers = Vec::new();
    for piece in template::pieces(text, at)? {
        match piece {
            Piece::Mounts(mounts) => numbers.extend(mounts),
            Piece::Text(":") => {}
            Piece::Text(other) => {
                return Err(wrong(at, &format!("lowerdir: {other:?} is no layer")));
            }
        }
    }
    Ok(numbers)
}

fn is_erofs(mount: &Mount) -> bool {
    mount.type_ == EROFS
}

impl Wanted {
    /// That its source is there, and an EROFS where it has to be.
    fn check(&self) -> Result<()> {
        self.identity()?;
        if let (Source::Path(path), Role::Layer(filesystem)) = (&self.source, &self.role)
            && filesystem.kind == EROFS
            && magic(path).context(Kind::InvalidArgument, || self.name())? != Some(MAGIC)
        {
            return Err(self.wrong("it holds no EROFS"));
        }
        Ok(())
    }
}

/// What is where an EROFS has its magic number; nothing where the file is shorter.
fn magic(path: &Path) -> std::io::Result<Option<[u8; 4]>> {
    let mut magic = [0; MAGIC.len()];
    match File::open(path)?.read_exact_at(&mut magic, SUPERBLOCK) {
        Ok(()) => Ok(Some(magic)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn unknown(number: usize, mount: &Mount) -> ShimError {
    let what = format!(
        "type {:?}: a root file system of layers is made of erofs, {} and, last, an overlay",
        mount.type_,
        WRITABLE.join(" or ")
    );
    template::unsupported(number, &what)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::template::mount;

    /// As containerd has them, with files of the test's.
    fn mounts(folder: &Path) -> Vec<Mount> {
        let path = |name: &str| folder.join(name).display().to_string();
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&MAGIC);
        for name in ["top", "bottom", "blob"] {
            fs::write(path(name), &image).unwrap();
        }
        fs::write(path("writable"), "").unwrap();
        let blob = format!("device={}", path("blob"));
        vec![
            mount("ext4", path("writable"), &["rw", "loop"]),
            mount("erofs", path("top"), &["ro", "loop"]),
            mount("erofs", path("bottom"), &["ro", "loop", &blob]),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ overlay 1 2 }}",
                    "",
                ],
            ),
        ]
    }

    #[test]
    fn each_layer_is_a_disk_the_writable_one_first_and_then_the_uppermost() {
        let folder = tempfile::tempdir().unwrap();
        let mut mounts = mounts(folder.path());
        assert!(are_disks(&mounts));
        let told = |mounts: &[Mount]| -> Vec<_> {
            let disks = disks("c1", mounts).unwrap();
            let told = disks.into_iter().map(|disk| {
                let Source::Path(path) = disk.source else {
                    panic!("no path");
                };
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                let options = match disk.role {
                    Role::Layer(filesystem) => {
                        assert_eq!(filesystem.point, "/run/kata-containers/c1/rootfs");
                        filesystem.options.join(",")
                    }
                    Role::Blob => "blob".to_owned(),
                    other => panic!("{other:?}"),
                };
                (name, disk.read_only, options)
            });
            told.collect()
        };
        let lower = "ro,X-kata.multi-layer=true,X-kata.overlay-lower".to_owned();
        let upper = "rw,X-kata.multi-layer=true,X-kata.overlay-upper,\
                     X-kata.mkdir.path={{ mount 0 }}/upper:0755,\
                     X-kata.mkdir.path={{ mount 0 }}/work:0755";
        let mut expected = vec![
            ("writable".to_owned(), false, upper.to_owned()),
            ("top".to_owned(), true, lower.clone()),
            ("blob".to_owned(), true, "blob".to_owned()),
            ("bottom".to_owned(), true, lower),
        ];
        assert_eq!(told(&mounts), expected);
        // Templates say the order, not the order of the mounts.
        mounts[3].options[4] = "lowerdir={{ overlay 2 1 }}".to_owned();
        expected[1..].rotate_left(1);
        assert_eq!(told(&mounts), expected);
        mounts[3].options[4] = "lowerdir={{ mount 2 }}:{{ mount 1 }}".to_owned();
        assert_eq!(told(&mounts), expected);
    }

    #[test]
    fn what_is_not_on_a_disk_is_for_the_host() {
        let erofs = mount("erofs", "/top", &["ro", "loop"]);
        let folders = ["upperdir=/upper", "workdir=/work", "lowerdir={{ mount 0 }}"];
        let overlay = mount("format/mkdir/overlay", "overlay", &folders);
        assert!(!are_disks(&[erofs.clone(), overlay]));
        let bind = mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
        assert!(!are_disks(&[erofs.clone(), bind]));
        assert!(!are_disks(&[erofs]));
        assert!(!are_disks(&[
            mount("bind", "/", &[]),
            mount("bind", "/", &[])
        ]));
        assert!(!are_disks(&[]));
    }

    #[test]
    fn what_is_no_overlay_of_layers_is_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let good = mounts(folder.path());
        let refused = |change: &dyn Fn(&mut Vec<Mount>), words: &str| {
            let mut mounts = good.clone();
            change(&mut mounts);
            let error = disks("c1", &mounts).unwrap_err().chain();
            assert!(error.contains(words), "{words}: {error}");
        };
        let option = |number: usize, text: &'static str| {
            move |mounts: &mut Vec<Mount>| mounts[3].options[number] = text.to_owned()
        };
        refused(
            &option(4, "lowerdir={{ overlay 1 3 }}"),
            "mount 3 is not one of the 3",
        );
        refused(&option(4, "lowerdir={{ layers }}"), "\"layers\" is none of");
        refused(&option(4, "lowerdir={{ mount 1 }}"), "once");
        refused(&option(4, "lowerdir={{ overlay 0 2 }}"), "once");
        refused(&option(4, "lowerdir=/etc"), "\"/etc\" is no layer");
        refused(&option(4, ""), "once");
        refused(
            &option(3, "upperdir=/var/upper"),
            "\"/var/upper\" is no folder of a mount",
        );
        refused(&option(3, "upperdir={{ mount 1 }}/upper"), "on one layer");
        refused(
            &option(3, "upperdir={{ mount 0 }}/other"),
            "/upper and /work",
        );
        refused(
            &option(0, "X-containerd.mkdir.path=/etc"),
            "\"/etc\" is no folder",
        );
        refused(&option(5, "volatile"), "option \"volatile\"");
        let first = |change: fn(&mut Mount)| move |mounts: &mut Vec<Mount>| change(&mut mounts[1]);
        refused(
            &first(|it| it.type_ = "squashfs".to_owned()),
            "mount 1: type \"squashfs\"",
        );
        refused(&first(|it| it.target = "/a".to_owned()), "no target");
        refused(
            &first(|it| it.options.push("X-containerd.dmverity=/x".to_owned())),
            "dmverity_mode",
        );
        refused(
            &first(|it| it.options.push("X-containerd.y".to_owned())),
            "X-containerd.y",
        );
        refused(
            &first(|it| it.source.push_str(".gone")),
            "top.gone: No such file",
        );
        let no_erofs = folder.path().join("writable").display().to_string();
        let swap = move |mounts: &mut Vec<Mount>| mounts[1].source.clone_from(&no_erofs);
        refused(&swap, "writable: it holds no EROFS");
        let place = folder.path().display().to_string();
        let swap = move |mounts: &mut Vec<Mount>| mounts[1].source.clone_from(&place);
        refused(&swap, "neither a block device nor a file");
        refused(
            &|mounts| mounts[3].type_ = "format/bind".to_owned(),
            "\"format/bind\"",
        );
        refused(
            &|mounts| mounts[0].type_ = "mkfs/ext4".to_owned(),
            "\"mkfs/ext4\"",
        );
        refused(
            &|mounts| mounts[2].options[2].push_str(".gone"),
            "blob.gone: No such file",
        );
        let blob = good[2].options[2].clone();
        let many = move |mounts: &mut Vec<Mount>| {
            mounts[1].options.extend(vec![blob.clone(); 21]);
        };
        refused(&many, "25 disks, where a machine takes 24: default_size");
    }
}
