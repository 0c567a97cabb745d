// SPDX-License-Identifier: Apache-2.0
//! `tmpcopyup`: a tmpfs that starts with the files that it would hide.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chmodat, chownat,
    fchmod, fchown, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

/// Folders within folders. Each holds two descriptors open.
const DEEPEST: usize = 128;

/// Copies what is in the folder `from` into the folder `to`: owners, modes and times with it, and
/// without following links.
///
/// # Errors
///
/// The kernel's; ELOOP for folders that lie too deep.
pub(crate) fn copy_up(from: impl AsFd, to: impl AsFd) -> Result<(), Errno> {
    let from = openat(
        from,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let to = openat(
        to,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    copy_folder(&from, &to, 0)
}

fn copy_folder(from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<(), Errno> {
    if depth > DEEPEST {
        return Err(Errno::LOOP);
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from, to, name, depth)?;
        }
    }
    Ok(())
}

fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth: usize) -> Result<(), Errno> {
    let status = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(status.st_mode);
    let owner = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    match FileType::from_raw_mode(status.st_mode) {
        FileType::Directory => {
            mkdirat(to, name, Mode::RWXU)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let inner = openat(to, name, flags, Mode::empty())?;
            let outer = openat(from, name, flags, Mode::empty())?;
            copy_folder(&outer, &inner, depth.saturating_add(1))?;
            fchown(&inner, Some(owner.0), Some(owner.1))?;
            fchmod(&inner, mode)?;
        }
        FileType::RegularFile => {
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let source = openat(from, name, flags | OFlags::RDONLY, Mode::empty())?;
            let target = openat(
                to,
                name,
                flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
                Mode::RUSR | Mode::WUSR,
            )?;
            let (mut source, mut target) = (File::from(source), File::from(target));
            io::copy(&mut source, &mut target)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            fchown(&target, Some(owner.0), Some(owner.1))?;
            fchmod(&target, mode)?;
        }
        FileType::Symlink => {
            symlinkat(&readlinkat(from, name, Vec::new())?, to, name)?;
            let link = AtFlags::SYMLINK_NOFOLLOW;
            chownat(to, name, Some(owner.0), Some(owner.1), link)?;
        }
        kind => {
            mknodat(to, name, kind, mode, status.st_rdev)?;
            let link = AtFlags::SYMLINK_NOFOLLOW;
            chownat(to, name, Some(owner.0), Some(owner.1), link)?;
            chmodat(to, name, mode, AtFlags::empty())?;
        }
    }
    utimensat(to, name, &times(&status), AtFlags::SYMLINK_NOFOLLOW)
}

fn times(status: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or_default(),
    };
    Timestamps {
        last_access: time(status.st_atime, status.st_atime_nsec),
        last_modification: time(status.st_mtime, status.st_mtime_nsec),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn files_folders_and_links_are_copied_with_their_modes() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir_all(path("from/a/b")).unwrap();
        fs::create_dir(path("to")).unwrap();
        fs::write(path("from/a/b/file"), "text").unwrap();
        fs::set_permissions(path("from/a"), fs::Permissions::from_mode(0o1700)).unwrap();
        symlink("/etc/passwd", path("from/link")).unwrap();
        let open = |name| File::open(path(name)).unwrap();
        copy_up(open("from"), open("to")).unwrap();
        assert_eq!(fs::read_to_string(path("to/a/b/file")).unwrap(), "text");
        let mode = fs::metadata(path("to/a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1700);
        let link = fs::read_link(path("to/link")).unwrap();
        assert_eq!(link.to_str(), Some("/etc/passwd"));
        let time = |name| {
            fs::symlink_metadata(path(name))
                .unwrap()
                .modified()
                .unwrap()
        };
        assert_eq!(time("to/a/b/file"), time("from/a/b/file"));
    }
}
