// SPDX-License-Identifier: Apache-2.0
//! Paths inside a root, by `openat2(2)`: links of the image stay in the image.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;

/// What a mount needs as its target.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    /// A folder.
    Directory,
    /// Anything else: a file, socket or device is bound over an empty file.
    File,
}

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

/// Opens `path` as seen from `root`, and makes what is missing of it.
///
/// # Errors
///
/// The kernel's; ENOENT or EEXIST when a dangling link is in the way.
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
    let names: Vec<&OsStr> = path
        .components()
        .filter_map(|component| match component {
            Component::Normal(_) | Component::ParentDir => Some(component.as_os_str()),
            _ => None,
        })
        .collect();
    let mut parent = open(root, Path::new("."), OFlags::DIRECTORY, resolve)?;
    let mut prefix = PathBuf::new();
    for (index, name) in names.iter().enumerate() {
        prefix.push(name);
        let last = index.saturating_add(1) == names.len();
        let found = match open(root, &prefix, OFlags::empty(), resolve) {
            Err(Errno::NOENT) => {
                // The parent was resolved inside the root and a single name follows nothing.
                make(&parent, name, if last { target } else { Target::Directory })?;
                open(root, &prefix, OFlags::empty(), resolve)?
            }
            other => other?,
        };
        parent = found;
    }
    Ok(parent)
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
    use std::os::unix::fs::symlink;

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
    fn a_dangling_link_is_not_followed() {
        let (folder, fd) = root();
        symlink("/nowhere", folder.path().join("link")).unwrap();
        create_in_root(fd.as_fd(), Path::new("/link/x"), Target::Directory).unwrap_err();
        assert!(!folder.path().join("nowhere").exists());
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
