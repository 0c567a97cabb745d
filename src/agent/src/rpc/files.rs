// SPDX-License-Identifier: Apache-2.0
//! CopyFile: files that the runtime puts into the guest.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path};

use protocols::agent::agent::CopyFileRequest;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, mkdirat, openat,
    openat2, renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, Target};

/// Copies go below this folder only.
const PLACE: &str = "/run/kata-containers";
/// A file that is not complete yet has this after its name.
const PARTIAL: &str = ".partial";

/// CopyFile: a folder, a link, or a piece of a file. A file appears under its name when its last
/// piece has come.
///
/// # Errors
///
/// A path outside of the folder for copies or through a link; the kernel's reason.
pub(super) fn copy(request: &CopyFileRequest) -> Result<()> {
    copy_below(Path::new(PLACE), request).map_err(|error| {
        AgentError::new(
            error.kind(),
            format!("copy {:?}: {}", request.path, error.line()),
        )
    })
}

fn copy_below(place: &Path, request: &CopyFileRequest) -> Result<()> {
    let path = Path::new(&request.path);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(AgentError::invalid("the path is no file"));
    };
    if !folder.starts_with(place) || !path.components().all(plain) {
        return Err(AgentError::invalid(format!(
            "the path is not below {place:?}"
        )));
    }
    let folder = make_folder(folder, request.dir_mode)?;
    let name = name.to_string_lossy();
    match FileType::from_raw_mode(request.file_mode) {
        FileType::Directory => {
            match mkdirat(&folder, &*name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(AgentError::io("mkdir", error)),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(&folder, &*name, flags, Mode::empty()).context(|| "open")?;
            give(&folder, &name, request)?;
            fchmod(&made, Mode::from_raw_mode(request.file_mode)).context(|| "set mode")
        }
        FileType::Symlink => {
            let target = str::from_utf8(&request.data)
                .map_err(|_| AgentError::invalid("the link's target is no text"))?;
            remove(&folder, &name)?;
            symlinkat(target, &folder, &*name).context(|| "make the link")?;
            give(&folder, &name, request)
        }
        FileType::RegularFile | FileType::Unknown => copy_piece(&folder, &name, request),
        other => Err(AgentError::unsupported(format!("files of type {other:?}"))),
    }
}

fn copy_piece(folder: &OwnedFd, name: &str, request: &CopyFileRequest) -> Result<()> {
    let number = |what: &str, value: i64| {
        u64::try_from(value).map_err(|_| AgentError::invalid(format!("{what} {value}")))
    };
    let (offset, size) = (
        number("offset", request.offset)?,
        number("size", request.file_size)?,
    );
    let length = u64::try_from(request.data.len()).unwrap_or(u64::MAX);
    let end = offset
        .checked_add(length)
        .filter(|end| *end <= size)
        .ok_or_else(|| AgentError::invalid("the piece reaches past the file's end"))?;
    let partial = format!("{name}{PARTIAL}");
    if offset == 0 {
        // What an earlier attempt left is not part of this file.
        remove(folder, &partial)?;
    }
    let mut flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if offset == 0 {
        flags |= OFlags::CREATE | OFlags::EXCL;
    }
    let file = openat(folder, &*partial, flags, Mode::from_raw_mode(0o600))
        .context(|| "open what was copied before")?;
    let file = File::from(file);
    file.write_all_at(&request.data, offset)
        .context(|| "write")?;
    if end < size {
        return Ok(());
    }
    give(folder, &partial, request)?;
    // After the owner, whose change takes the set-user-id bit away.
    fchmod(&file, Mode::from_raw_mode(request.file_mode & 0o7777)).context(|| "set mode")?;
    renameat(folder, &*partial, folder, name).context(|| "rename")
}

/// Opens the folder, made with `mode` if it is not there. Links on the way are refused.
fn make_folder(path: &Path, mode: u32) -> Result<OwnedFd> {
    let open = || {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
    };
    match open() {
        Err(Errno::NOENT) => {}
        other => return other.context(|| format!("open {path:?}")),
    }
    mount::create_beneath(path, Target::Directory).context(|| format!("mkdir {path:?}"))?;
    let folder = open().context(|| format!("open {path:?}"))?;
    if mode != 0 {
        fchmod(&folder, Mode::from_raw_mode(mode & 0o7777))
            .context(|| format!("set mode of {path:?}"))?;
    }
    Ok(folder)
}

fn give(folder: &OwnedFd, name: &str, request: &CopyFileRequest) -> Result<()> {
    let id = |what: &str, id: i32| {
        u32::try_from(id).map_err(|_| AgentError::invalid(format!("{what} {id}")))
    };
    let owner = Uid::from_raw(id("uid", request.uid)?);
    let group = Gid::from_raw(id("gid", request.gid)?);
    chownat(
        folder,
        name,
        Some(owner),
        Some(group),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .context(|| "set owner")
}

fn remove(folder: &OwnedFd, name: &str) -> Result<()> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(AgentError::io("remove what was there", error)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn request(path: &Path, data: &[u8]) -> CopyFileRequest {
        CopyFileRequest {
            path: path.to_str().unwrap().to_owned(),
            file_size: data.len().try_into().unwrap(),
            file_mode: 0o100_640,
            dir_mode: 0o700,
            uid: rustix::process::getuid().as_raw().cast_signed(),
            gid: rustix::process::getgid().as_raw().cast_signed(),
            data: data.to_vec(),
            ..CopyFileRequest::default()
        }
    }

    #[test]
    fn pieces_become_a_file_with_the_last() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a/b/file");
        let mut piece = request(&path, b"hello ");
        piece.file_size = 11;
        copy_below(place.path(), &piece).unwrap();
        assert!(!path.exists());
        piece.offset = 6;
        piece.data = b"world".to_vec();
        copy_below(place.path(), &piece).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"hello world");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&path), 0o640);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        // Once more, shorter.
        copy_below(place.path(), &request(&path, b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn folders_and_links_are_copied_too() {
        let place = tempfile::tempdir().unwrap();
        let mut folder = request(&place.path().join("folder"), b"");
        folder.file_mode = 0o040_711;
        copy_below(place.path(), &folder).unwrap();
        copy_below(place.path(), &folder).unwrap();
        let mut link = request(&place.path().join("folder/link"), b"..data/x");
        link.file_mode = 0o120_777;
        copy_below(place.path(), &link).unwrap();
        copy_below(place.path(), &link).unwrap();
        let target = fs::read_link(place.path().join("folder/link")).unwrap();
        assert_eq!(target, Path::new("..data/x"));
    }

    #[test]
    fn nothing_is_written_elsewhere() {
        let place = tempfile::tempdir().unwrap();
        let below = place.path().join("place");
        fs::create_dir(&below).unwrap();
        symlink(place.path(), below.join("out")).unwrap();
        for path in ["place/../x", "x", "place/out/x", "place"] {
            let wanted = request(&place.path().join(path), b"x");
            copy_below(&below, &wanted).unwrap_err();
        }
        assert!(!place.path().join("x").exists());
        let mut long = request(&below.join("x"), b"x");
        long.file_size = 0;
        copy_below(&below, &long).unwrap_err();
    }
}
