// SPDX-License-Identifier: Apache-2.0
//! A volume that is given to a group, as Kubernetes' `fsGroup` says: everything in it belongs to
//! the group, which may read and write it, and so will what is made in it later.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocols::agent::agent::FSGroup;
use protocols::agent::types::FSGroupChangePolicy;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, chmodat, chownat, fchmod, fchown, fstat, openat,
    statat,
};

use crate::error::{Context as _, Result};

const SET_GROUP: u32 = 0o2000;
const FOLDER: u32 = SET_GROUP | 0o770;
const FILE: u32 = 0o660;

/// Gives the tree at `root` to a group. Links are not followed, so nothing outside is reached.
///
/// # Errors
///
/// The kernel's.
pub(super) fn give(root: &OwnedFd, group: &FSGroup) -> Result<()> {
    let gid = group.group_id;
    let is = fstat(root).context(|| "look at the root")?;
    if FileType::from_raw_mode(is.st_mode) != FileType::Directory {
        let gid = Gid::from_raw(gid);
        let give = || {
            fchown(root, None, Some(gid))?;
            fchmod(root, Mode::from_raw_mode(is.st_mode & 0o7777 | FILE))
        };
        return give().context(|| format!("give it to group {gid}"));
    }
    let policy = group.group_change_policy.enum_value_or_default();
    let belongs = is.st_gid == gid && is.st_mode & FOLDER == FOLDER;
    if policy == FSGroupChangePolicy::OnRootMismatch && belongs {
        return Ok(());
    }
    let gid = Gid::from_raw(gid);
    give_folder(root.as_fd(), gid).context(|| format!("give it to group {gid}"))
}

/// The root comes last: it tells that all is done.
fn give_folder(folder: BorrowedFd<'_>, gid: Gid) -> rustix::io::Result<()> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            give_entry(folder, name, gid)?;
        }
    }
    let mode = fstat(folder)?.st_mode & 0o7777;
    // Changing the owner clears bits of the mode.
    fchown(folder, None, Some(gid))?;
    fchmod(folder, Mode::from_raw_mode(mode | FOLDER))
}

fn give_entry(folder: BorrowedFd<'_>, name: &CStr, gid: Gid) -> rustix::io::Result<()> {
    let found = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            give_folder(openat(folder, name, flags, Mode::empty())?.as_fd(), gid)
        }
        FileType::Symlink => chownat(folder, name, None, Some(gid), AtFlags::SYMLINK_NOFOLLOW),
        _ => {
            chownat(folder, name, None, Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            // Nobody else is there yet who could put a link in its place.
            let mode = Mode::from_raw_mode(found.st_mode & 0o7777 | FILE);
            chmodat(folder, name, mode, AtFlags::empty())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_group_may_read_and_write_what_it_is_given() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("root");
        fs::create_dir_all(root.join("a")).unwrap();
        fs::write(root.join("a/file"), "").unwrap();
        let outside = place.path().join("outside");
        fs::write(&outside, "").unwrap();
        symlink(&outside, root.join("link")).unwrap();
        let set = |path: &std::path::Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let mode = |path: &std::path::Path| path.metadata().unwrap().mode() & 0o7777;
        for path in [&outside, &root.join("a/file")] {
            set(path, 0o604);
        }
        set(&root, 0o700);
        let mut group = FSGroup {
            // Anybody may give what is theirs to a group that they are in.
            group_id: rustix::process::getgid().as_raw(),
            ..FSGroup::default()
        };
        let open = || OwnedFd::from(fs::File::open(&root).unwrap());
        give(&open(), &group).unwrap();
        assert_eq!(mode(&root), 0o2770);
        assert_eq!(mode(&root.join("a")) & 0o2770, 0o2770);
        assert_eq!(mode(&root.join("a/file")), 0o664);
        assert_eq!(mode(&outside), 0o604);

        set(&root.join("a/file"), 0o600);
        group.group_change_policy = FSGroupChangePolicy::OnRootMismatch.into();
        give(&open(), &group).unwrap();
        assert_eq!(mode(&root.join("a/file")), 0o600);
        set(&root, 0o700);
        give(&open(), &group).unwrap();
        assert_eq!(mode(&root.join("a/file")), 0o660);
    }
}
