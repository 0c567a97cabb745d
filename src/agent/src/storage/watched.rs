// SPDX-License-Identifier: Apache-2.0
//! `watchable-bind`: a small folder of the host, such as a ConfigMap's, whose changes a container
//! sees as on a host, by inotify too.
//!
//! A shared file system tells the guest nothing of what the host does. So the container gets a copy
//! in memory, which is made equal to the folder when the runtime says that it has changed, or, for a
//! runtime that doesn't, every second. It changes as a kubelet changes the folder itself: what is new
//! is there whole before a link leads to it, a file or link is replaced by one rename, and what is
//! gone goes last.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, sleep};
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
    fchmod, fchown, fstat, futimens, mkdirat, openat2, readlinkat, renameat, statat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;
use tracing::warn;

use crate::error::{Context as _, Result};
use crate::mount::{self, MountOptions, Target};

/// Where the copies' file systems are.
const HOME: &str = "/run/kata-containers/watched";
/// A ConfigMap has 1 MiB at most; a projected volume may have several. What is larger is no copy.
const LIMIT: u64 = 8 << 20;
const MOST_NAMES: u64 = 4096;
/// What the container sees, and where what is to come there is made.
const CONTENT: &CStr = c"content";
const STAGING: &CStr = c"staging";
/// The one name in the staging folder.
const NEXT: &CStr = c"next";
/// A kubelet may exchange a folder while it is being read.
const ATTEMPTS: u32 = 5;

/// How often a folder is looked at, for a runtime that doesn't say when it changes.
const PAUSE: Duration = Duration::from_secs(1);

/// What a system call answers.
type Done<T = ()> = std::result::Result<T, Errno>;

/// Numbers the copies.
static COPIES: AtomicU64 = AtomicU64::new(0);

/// A folder and its copy.
#[derive(Debug)]
pub(super) struct Watched {
    source: PathBuf,
    /// The copy's file system.
    home: PathBuf,
    /// Held while the copy changes.
    changing: Mutex<()>,
}

impl Watched {
    /// Copies the folder `source`.
    ///
    /// # Errors
    ///
    /// `TooLarge`, or the kernel's reason.
    pub(super) fn new(source: &Path) -> std::result::Result<Self, Refusal> {
        measure(&folder(source).context(|| format!("source {source:?}"))?)?;
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let home = Path::new(HOME).join(number.to_string());
        // The names need memory as well.
        let options = [
            "nosuid".to_owned(),
            "nodev".to_owned(),
            "mode=0755".to_owned(),
            format!("size={}", LIMIT.saturating_mul(2)),
            format!("nr_inodes={}", MOST_NAMES.saturating_mul(2)),
        ];
        let options = MountOptions::parse(&options)?;
        let mounted = mount::filesystem("tmpfs", "", &options)?;
        for name in [CONTENT, STAGING] {
            mkdirat(&mounted, name, Mode::from_raw_mode(0o755)).context(|| "make a folder")?;
        }
        let target = mount::create_beneath(&home, Target::Directory)
            .context(|| format!("mkdir {home:?}"))?;
        mount::attach(&mounted, target.as_fd(), &options)?;
        let watched = Self {
            source: source.to_owned(),
            home,
            changing: Mutex::default(),
        };
        match watched.refresh() {
            Ok(()) => Ok(watched),
            Err(error) => {
                watched.remove()?;
                Err(error.into())
            }
        }
    }

    /// What the container is to get.
    pub(super) fn content(&self) -> PathBuf {
        self.home.join(CONTENT.to_str().unwrap_or_default())
    }

    /// Makes the copy equal to the folder.
    ///
    /// # Errors
    ///
    /// The kernel's reason; the copy is then whole, but may be old in parts.
    pub(super) fn refresh(&self) -> Result<()> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = || {
            let home = folder(&self.home)?;
            let copier = Copier {
                staging: below(home.as_fd(), STAGING)?,
            };
            let (from, to) = (folder(&self.source)?, below(home.as_fd(), CONTENT)?);
            own(to.as_fd(), &fstat(&from)?)?;
            copier.equalize(from.as_fd(), to.as_fd())
        };
        let mut last = copy();
        for _ in 1..ATTEMPTS {
            // What was there when it was listed is gone by now.
            if !matches!(last, Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR)) {
                break;
            }
            last = copy();
        }
        last.context(|| format!("copy {:?}", self.source))
    }

    /// Takes the copy away; who has it mounted keeps it as it is.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn remove(&self) -> Result<()> {
        mount::detach(&self.home)?;
        // Only a mount point: nothing is lost where it stays.
        let _ = std::fs::remove_dir(&self.home);
        Ok(())
    }
}

/// Looks at a folder every second, for a runtime that doesn't say when it changes.
pub(super) fn look_again(watched: &Arc<Watched>) {
    let watched = Arc::downgrade(watched);
    let look = move || {
        loop {
            sleep(PAUSE);
            let Some(watched) = watched.upgrade() else {
                return;
            };
            if let Err(error) = watched.refresh() {
                warn!(error = error.line(), "a copy is out of date");
            }
        }
    };
    if let Err(error) = Builder::new().name("watch".to_owned()).spawn(look) {
        warn!(%error, "nobody looks at a folder");
    }
}

/// Why there is no copy.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The folder is larger than a ConfigMap may be.
    TooLarge,
    Failed(crate::error::AgentError),
}

impl From<crate::error::AgentError> for Refusal {
    fn from(error: crate::error::AgentError) -> Self {
        Self::Failed(error)
    }
}

/// Makes folders equal.
struct Copier {
    staging: OwnedFd,
}

impl Copier {
    fn equalize(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Done {
        let wanted = names(from)?;
        let mut links = Vec::new();
        for name in &wanted {
            let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => self.folder(from, to, name, &stat)?,
                FileType::RegularFile => self.file(from, to, name, &stat)?,
                FileType::Symlink => links.push((name, stat)),
                // Nobody's configuration.
                _ => {}
            }
        }
        for (name, stat) in links {
            self.link(from, to, name, &stat)?;
        }
        for name in names(to)? {
            if !wanted.contains(&name) {
                remove(to, &name)?;
            }
        }
        Ok(())
    }

    fn folder(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, wanted: &Stat) -> Done {
        if !is(to, name, FileType::Directory)? {
            remove(to, name)?;
            mkdirat(to, name, Mode::from_raw_mode(0o700))?;
        }
        let (from, to) = (below(from, name)?, below(to, name)?);
        self.equalize(from.as_fd(), to.as_fd())?;
        own(to.as_fd(), wanted)
    }

    fn file(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, wanted: &Stat) -> Done {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let bytes = read(&open(from, name, flags)?)?;
        if is(to, name, FileType::RegularFile)? {
            let there = open(to, name, flags)?;
            // Times alone don't tell: two writes may fall into one tick of the clock.
            if read(&there)? == bytes {
                return own(there.as_fd(), wanted);
            }
        } else {
            remove(to, name)?;
        }
        remove(self.staging.as_fd(), NEXT)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mut next = File::from(open(self.staging.as_fd(), NEXT, flags)?);
        next.write_all(&bytes).map_err(|error| errno(&error))?;
        own(next.as_fd(), wanted)?;
        futimens(&next, &times(wanted))?;
        renameat(&self.staging, NEXT, to, name)
    }

    fn link(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, wanted: &Stat) -> Done {
        let target = readlinkat(from, name, Vec::new())?;
        if is(to, name, FileType::Symlink)? {
            if readlinkat(to, name, Vec::new())? == target {
                return Ok(());
            }
        } else if is(to, name, FileType::Directory)? {
            remove(to, name)?;
        }
        remove(self.staging.as_fd(), NEXT)?;
        symlinkat(&target, &self.staging, NEXT)?;
        rustix::fs::chownat(
            &self.staging,
            NEXT,
            Some(Uid::from_raw(wanted.st_uid)),
            Some(Gid::from_raw(wanted.st_gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        renameat(&self.staging, NEXT, to, name)
    }
}

/// Gives a file or folder its owner and mode, unless it has them.
fn own(file: BorrowedFd<'_>, wanted: &Stat) -> Done {
    let there = fstat(file)?;
    if (there.st_uid, there.st_gid) != (wanted.st_uid, wanted.st_gid) {
        let (uid, gid) = (Uid::from_raw(wanted.st_uid), Gid::from_raw(wanted.st_gid));
        fchown(file, Some(uid), Some(gid))?;
    }
    // A new owner may have cost it bits.
    if fstat(file)?.st_mode != wanted.st_mode {
        fchmod(file, Mode::from_raw_mode(wanted.st_mode))?;
    }
    Ok(())
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

/// Whether the folder is small enough.
fn measure(folder: &OwnedFd) -> std::result::Result<(), Refusal> {
    fn add(folder: BorrowedFd<'_>, sums: &mut (u64, u64)) -> Done {
        for name in names(folder)? {
            let stat = statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            sums.0 = sums.0.saturating_add(1);
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory if sums.0 <= MOST_NAMES => {
                    add(below(folder, &name)?.as_fd(), sums)?;
                }
                FileType::RegularFile => {
                    sums.1 = sums
                        .1
                        .saturating_add(u64::try_from(stat.st_size).unwrap_or(0));
                }
                _ => {}
            }
        }
        Ok(())
    }
    let mut sums = (0, 0);
    add(folder.as_fd(), &mut sums).context(|| "look at the folder")?;
    if sums.0 > MOST_NAMES || sums.1 > LIMIT {
        return Err(Refusal::TooLarge);
    }
    Ok(())
}

fn folder(path: &Path) -> Done<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}

fn below(folder: BorrowedFd<'_>, name: &CStr) -> Done<OwnedFd> {
    open(folder, name, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Opens one plain name, whatever a container has put there.
fn open(folder: BorrowedFd<'_>, name: &CStr, flags: OFlags) -> Done<OwnedFd> {
    openat2(
        folder,
        name,
        flags | OFlags::CLOEXEC,
        if flags.contains(OFlags::CREATE) {
            Mode::from_raw_mode(0o600)
        } else {
            Mode::empty()
        },
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
    )
}

/// The names in a folder, in order: a kubelet's `..data` comes before what leads through it.
fn names(folder: BorrowedFd<'_>) -> Done<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn is(folder: BorrowedFd<'_>, name: &CStr, kind: FileType) -> Done<bool> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == kind),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes a name with all that is below it, if it is there.
fn remove(folder: BorrowedFd<'_>, name: &CStr) -> Done {
    if is(folder, name, FileType::Directory)? {
        let inner = below(folder, name)?;
        for name in names(inner.as_fd())? {
            remove(inner.as_fd(), &name)?;
        }
        return unlinkat(folder, name, AtFlags::REMOVEDIR);
    }
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

fn read(file: &OwnedFd) -> Done<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::from(file.try_clone().map_err(|error| errno(&error))?);
    file.take(LIMIT.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| errno(&error))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > LIMIT {
        return Err(Errno::FBIG);
    }
    Ok(bytes)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    struct Folders {
        root: tempfile::TempDir,
    }

    impl Folders {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            for name in ["from", "to", "staging"] {
                fs::create_dir(root.path().join(name)).unwrap();
            }
            Self { root }
        }

        fn from(&self) -> PathBuf {
            self.root.path().join("from")
        }

        fn to(&self) -> PathBuf {
            self.root.path().join("to")
        }

        fn copy(&self) {
            let open = |path: &Path| folder(path).unwrap();
            let copier = Copier {
                staging: open(&self.root.path().join("staging")),
            };
            let (from, to) = (open(&self.from()), open(&self.to()));
            copier.equalize(from.as_fd(), to.as_fd()).unwrap();
        }
    }

    /// As a kubelet's atomic writer does.
    fn publish(folder: &Path, version: &str, keys: &[(&str, &str)]) {
        let data = format!("..{version}");
        fs::create_dir(folder.join(&data)).unwrap();
        for (key, value) in keys {
            fs::write(folder.join(&data).join(key), value).unwrap();
        }
        let old = fs::read_link(folder.join("..data")).ok();
        symlink(&data, folder.join("..data_tmp")).unwrap();
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
        for (key, _) in keys {
            let _ = symlink(format!("..data/{key}"), folder.join(key));
        }
        if let Some(old) = old {
            for key in fs::read_dir(folder.join(&old)).unwrap() {
                let name = key.unwrap().file_name();
                if !folder.join(&data).join(&name).exists() {
                    fs::remove_file(folder.join(name)).unwrap();
                }
            }
            fs::remove_dir_all(folder.join(old)).unwrap();
        }
    }

    fn listing(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_copy_follows_what_a_kubelet_publishes() {
        let folders = Folders::new();
        let (from, to) = (folders.from(), folders.to());
        publish(&from, "1", &[("a", "one"), ("b", "two")]);
        folders.copy();
        assert_eq!(fs::read_to_string(to.join("a")).unwrap(), "one");
        assert_eq!(listing(&to), ["..1", "..data", "a", "b"]);
        publish(&from, "2", &[("a", "three"), ("c", "four")]);
        folders.copy();
        assert_eq!(fs::read_to_string(to.join("a")).unwrap(), "three");
        assert_eq!(fs::read_to_string(to.join("c")).unwrap(), "four");
        assert_eq!(listing(&to), ["..2", "..data", "a", "c"]);
    }

    #[test]
    fn whatever_was_there_becomes_what_is_wanted() {
        let folders = Folders::new();
        let (from, to) = (folders.from(), folders.to());
        fs::create_dir_all(to.join("x/y")).unwrap();
        fs::write(to.join("x/y/z"), "old").unwrap();
        symlink("/etc", to.join("d")).unwrap();
        fs::write(to.join("l"), "old").unwrap();
        fs::write(from.join("x"), "new").unwrap();
        fs::set_permissions(from.join("x"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::create_dir(from.join("d")).unwrap();
        fs::write(from.join("d/file"), "below").unwrap();
        symlink("x", from.join("l")).unwrap();
        folders.copy();
        assert_eq!(fs::read_to_string(to.join("x")).unwrap(), "new");
        assert_eq!(to.join("x").metadata().unwrap().mode() & 0o777, 0o640);
        assert!(to.join("d").symlink_metadata().unwrap().is_dir());
        assert_eq!(fs::read_to_string(to.join("d/file")).unwrap(), "below");
        assert_eq!(fs::read_link(to.join("l")).unwrap(), Path::new("x"));
    }

    #[test]
    fn what_did_not_change_is_not_touched() {
        let folders = Folders::new();
        fs::write(folders.from().join("f"), "same").unwrap();
        folders.copy();
        let before = folders.to().join("f").metadata().unwrap();
        folders.copy();
        let after = folders.to().join("f").metadata().unwrap();
        assert_eq!(
            (before.ino(), before.ctime_nsec()),
            (after.ino(), after.ctime_nsec())
        );
        // Of the same length, and perhaps in the same tick of the clock.
        fs::write(folders.from().join("f"), "SAME").unwrap();
        folders.copy();
        assert_eq!(fs::read_to_string(folders.to().join("f")).unwrap(), "SAME");
    }

    #[test]
    fn a_large_folder_is_refused() {
        let folders = Folders::new();
        let open = folder(&folders.from()).unwrap();
        let file = File::create(folders.from().join("f")).unwrap();
        file.set_len(LIMIT).unwrap();
        assert!(measure(&open).is_ok());
        file.set_len(LIMIT + 1).unwrap();
        assert!(matches!(measure(&open), Err(Refusal::TooLarge)));
    }
}
