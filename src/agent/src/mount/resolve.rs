// SPDX-License-Identifier: Apache-2.0
//! Paths inside a root, by `openat2(2)`: links of the image stay in the image.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, readlinkat};
use rustix::io::Errno;

/// What a mount needs as its target.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    /// A folder.
    Directory,
    /// Anything else: a file, socket or device is bound over an empty file.
    File,
}

/// Links to nothing on the way to one target: as many as the kernel follows.
const MOST_LINKS: usize = 40;

const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// Opens `path` as seen from `root` (O_PATH), wherever links in it point.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn open_in_root(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    open(root, path, OFlags::empty(), IN_ROOT)
}

/// Whether a link is part of `path`.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn is_linked(root: BorrowedFd<'_>, path: &Path) -> Result<bool, Errno> {
    match open(
        root,
        path,
        OFlags::empty(),
        IN_ROOT.union(ResolveFlags::NO_SYMLINKS),
    ) {
        Ok(_) => Ok(false),
        Err(Errno::LOOP) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Opens `path` as seen from `root`, and makes what is missing of it. Images have links whose
/// targets come with the container, such as that of `/etc/resolv.conf` to a folder in `/run`: what
/// such a link points to is made, inside the root.
///
/// # Errors
///
/// The kernel's; ELOOP when links lead nowhere.
pub(crate) fn create_in_root(
    root: BorrowedFd<'_>,
    path: &Path,
    target: Target,
) -> Result<OwnedFd, Errno> {
    create(root, path, target, IN_ROOT)
}

/// Opens a path of the guest itself, and makes what is missing of it. Links are refused: part of
/// the path may lie in a folder that containers can write.
///
/// # Errors
///
/// The kernel's; ELOOP when there is a link.
pub(crate) fn create_beneath(path: &Path, target: Target) -> Result<OwnedFd, Errno> {
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    create(
        root.as_fd(),
        path,
        target,
        IN_ROOT.union(ResolveFlags::NO_SYMLINKS),
    )
}

fn open(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    loop {
        match openat2(root, path, flags, Mode::empty(), resolve) {
            // A rename raced with "..": the kernel asks to try again.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

fn create(
    root: BorrowedFd<'_>,
    path: &Path,
    target: Target,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    match open(root, path, OFlags::empty(), resolve) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut rest = names(path);
    let mut parent = open(root, Path::new("."), OFlags::DIRECTORY, resolve)?;
    // Always looked up from the root, so that nothing in it, ".." neither, leads out.
    let mut prefix = PathBuf::new();
    let mut links = 0_usize;
    while let Some(name) = rest.pop_front() {
        let next = prefix.join(&name);
        let found = match open(root, &next, OFlags::empty(), resolve) {
            Err(Errno::NOENT) => {
                if let Some(link) = link_at(&parent, &name)? {
                    links = links.saturating_add(1);
                    if links > MOST_LINKS || resolve.contains(ResolveFlags::NO_SYMLINKS) {
                        return Err(Errno::LOOP);
                    }
                    if link.is_absolute() {
                        prefix = PathBuf::new();
                        parent = open(root, Path::new("."), OFlags::DIRECTORY, resolve)?;
                    }
                    let mut spliced = names(&link);
                    spliced.append(&mut rest);
                    rest = spliced;
                    continue;
                }
                let kind = match rest.is_empty() {
                    true => target,
                    false => Target::Directory,
                };
                // The parent was resolved inside the root and a single name follows nothing.
                make(&parent, &name, kind)?;
                open(root, &next, OFlags::empty(), resolve)?
            }
            other => other?,
        };
        parent = found;
        prefix = next;
    }
    Ok(parent)
}

/// The names of a path that are to be looked up one after the other.
fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().to_owned())
        .collect()
}

/// What the link `name` points to; `None` when there is no such link.
fn link_at(parent: &OwnedFd, name: &OsStr) -> Result<Option<PathBuf>, Errno> {
    match readlinkat(parent, name, Vec::new()) {
        Ok(link) => Ok(Some(OsString::from_vec(link.into_bytes()).into())),
        Err(Errno::NOENT | Errno::INVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

fn make(parent: &OwnedFd, name: &OsStr, target: Target) -> Result<(), Errno> {
    let made = match target {
        Target::Directory => mkdirat(parent, name, Mode::from_raw_mode(0o755)),
        Target::File => openat(
            parent,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        )
        .map(drop),
    };
    match made {
        // Another container's create was faster; a link in its place fails at the next open.
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use rustix::fs::fstat;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let fd = openat(CWD, folder.path(), OFlags::PATH, Mode::empty()).unwrap();
        (folder, fd)
    }

    #[test]
    fn absolute_links_stay_inside() {
        let (folder, fd) = root();
        fs::create_dir(folder.path().join("real")).unwrap();
        symlink("/real", folder.path().join("link")).unwrap();
        create_in_root(fd.as_fd(), Path::new("/link/a/b"), Target::Directory).unwrap();
        assert!(folder.path().join("real/a/b").is_dir());
    }

    #[test]
    fn upward_links_stay_inside() {
        let (folder, fd) = root();
        symlink("../../../../../../tmp", folder.path().join("up")).unwrap();
        fs::create_dir(folder.path().join("tmp")).unwrap();
        create_in_root(fd.as_fd(), Path::new("/up/inside"), Target::File).unwrap();
        assert!(folder.path().join("tmp/inside").is_file());
    }

    #[test]
    fn what_a_dangling_link_points_to_is_made() {
        let (folder, fd) = root();
        let inside = |path: &str| folder.path().join(path);
        fs::create_dir(inside("etc")).unwrap();
        symlink(
            "../run/systemd/resolve/stub-resolv.conf",
            inside("etc/resolv.conf"),
        )
        .unwrap();
        symlink("/tmp/hosts", inside("etc/hosts")).unwrap();
        symlink("hosts", inside("etc/chain")).unwrap();
        symlink("/var/data", inside("link")).unwrap();
        for (path, target, made) in [
            (
                "/etc/resolv.conf",
                Target::File,
                "run/systemd/resolve/stub-resolv.conf",
            ),
            ("/etc/chain", Target::File, "tmp/hosts"),
            ("/link/x", Target::Directory, "var/data/x"),
        ] {
            let opened = create_in_root(fd.as_fd(), Path::new(path), target).unwrap();
            let made = fs::symlink_metadata(inside(made)).unwrap();
            assert_eq!(made.is_dir(), target == Target::Directory, "{path}");
            assert_eq!(made.ino(), fstat(&opened).unwrap().st_ino, "{path}");
        }
    }

    #[test]
    fn dangling_links_do_not_lead_out() {
        let outside = tempfile::tempdir().unwrap();
        let path = outside.path().join("root");
        fs::create_dir_all(path.join("a/b")).unwrap();
        let fd = openat(CWD, &path, OFlags::PATH, Mode::empty()).unwrap();
        let escaped = outside.path().join("escaped");
        let absolute = escaped.strip_prefix("/").unwrap();
        for (link, made) in [
            (Path::new("../../../../x"), Path::new("x")),
            (Path::new("../../../escaped"), Path::new("escaped")),
            (Path::new("/../../../y"), Path::new("y")),
            (Path::new("/new/../../../z"), Path::new("z")),
            (&escaped, absolute),
        ] {
            symlink(link, path.join("a/b/link")).unwrap();
            create_in_root(fd.as_fd(), Path::new("/a/b/link"), Target::File).unwrap();
            assert!(path.join(made).is_file(), "{link:?}");
            fs::remove_file(path.join("a/b/link")).unwrap();
        }
        let left: Vec<_> = fs::read_dir(outside.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["root"]);
    }

    #[test]
    fn links_without_an_end_are_refused() {
        let (folder, fd) = root();
        let refused = |path: &str| {
            let made = create_in_root(fd.as_fd(), Path::new(path), Target::File);
            assert_eq!(made.unwrap_err(), Errno::LOOP, "{path}");
        };
        symlink("two", folder.path().join("one")).unwrap();
        symlink("one", folder.path().join("two")).unwrap();
        refused("/one");
        refused("/one/x");
        // A loop that the kernel sees once the first folder is there.
        symlink("missing/../late", folder.path().join("late")).unwrap();
        refused("/late");
        // More links than the kernel follows, although they have an end.
        for index in 0..=MOST_LINKS {
            let next = format!("missing{index}/../l{}", index.saturating_add(1));
            symlink(next, folder.path().join(format!("l{index}"))).unwrap();
        }
        refused("/l0");
        assert!(create_in_root(fd.as_fd(), Path::new("/l5"), Target::File).is_ok());
    }

    #[test]
    fn files_and_folders_are_made() {
        let (folder, fd) = root();
        create_in_root(fd.as_fd(), Path::new("/etc/hosts"), Target::File).unwrap();
        assert!(folder.path().join("etc/hosts").is_file());
        create_in_root(fd.as_fd(), Path::new("a/./b/"), Target::Directory).unwrap();
        assert!(folder.path().join("a/b").is_dir());
    }

    #[test]
    fn guest_paths_refuse_links() {
        let (folder, _) = root();
        symlink("/tmp", folder.path().join("link")).unwrap();
        let error = create_beneath(&folder.path().join("link/x"), Target::Directory).unwrap_err();
        assert_eq!(error, Errno::LOOP);
    }
}
