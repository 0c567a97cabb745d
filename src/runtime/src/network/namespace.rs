// SPDX-License-Identifier: Apache-2.0
//! A network namespace: held open, named so that another at the same path can't be mistaken for
//! it, and entered by threads that end there.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Kind, Result, ShimError};
use crate::raw;

/// Names a namespace for the journal: where it was found, and the kernel's number of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamespaceId {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// An open network namespace. It lives at least as long as this does.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
    id: NamespaceId,
}

impl NamespaceId {
    fn of(path: &Path, file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// The namespace, if it is still there.
    pub(super) fn find(&self) -> io::Result<Option<Namespace>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    // The last is what the kernel says of a process that is gone.
                    Some(libc::ENOENT | libc::ENOTDIR | libc::ESRCH)
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let id = Self::of(&self.path, &file)?;
        Ok(self.is_same(&id).then_some(Namespace { file, id }))
    }
}

impl Namespace {
    /// Opens the namespace of a pod. The host's own is refused: its interfaces are not a guest's
    /// to take.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let context = || format!("network namespace {}", path.display());
        let file = File::open(path).context(Kind::FailedPrecondition, context)?;
        let id = NamespaceId::of(path, &file).internal(context)?;
        for host in ["/proc/thread-self/ns/net", "/proc/1/ns/net"] {
            // Where process 1 may not be looked at, the own namespace must do.
            let Ok(host) = fs::metadata(host) else {
                continue;
            };
            if (host.dev(), host.ino()) == (id.device, id.inode) {
                return Err(ShimError::new(
                    Kind::InvalidArgument,
                    format!("{}: is the host's own, which a guest can't use", context()),
                ));
            }
        }
        let namespace = Self { file, id };
        // Tells a namespace from any other file.
        namespace
            .run(|| ())
            .context(Kind::InvalidArgument, context)?;
        Ok(namespace)
    }

    /// A new one, for what is to be seen by nobody, or is wired later by somebody who finds it
    /// through a process in it.
    pub(crate) fn create() -> Result<Self> {
        let path = Path::new("/proc/thread-self/ns/net");
        let made = in_thread(|| {
            raw::own_network_namespace()?;
            File::open(path)
        });
        let context = || "make a network namespace".to_owned();
        let file = made.and_then(|made| made).internal(context)?;
        // The path means something else to every thread, and by its number this is found at none.
        let id = NamespaceId::of(Path::new(""), &file).internal(context)?;
        Ok(Self { file, id })
    }

    pub(crate) fn id(&self) -> &NamespaceId {
        &self.id
    }

    /// Runs `work` in the namespace, on a thread of its own, which ends with it. What is made
    /// there stays there: sockets, taps, and processes with the threads that wait for them.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let namespace = self.file.as_fd();
        in_thread(move || {
            enter(namespace)?;
            Ok(work())
        })?
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
    Ok(())
}

fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".to_owned())
            .stack_size(256 * 1024)
            .spawn_scoped(scope, work)?
            .join()
            .map_err(|_| io::Error::other("the thread panicked"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_s_own_namespace_is_refused() {
        let error = Namespace::open(Path::new("/proc/self/ns/net")).unwrap_err();
        assert!(error.chain().contains("is the host's own"), "{error}");
    }

    #[test]
    fn a_missing_one_and_another_file_are_named() {
        let error = Namespace::open(Path::new("/nonexistent/ns")).unwrap_err();
        assert!(error.chain().contains("/nonexistent/ns: No such file"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Namespace::open(file.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.chain().contains(file.path().to_str().unwrap()));
    }

    #[test]
    fn another_file_at_the_path_is_not_the_namespace() {
        let path = Path::new("/proc/self/ns/net");
        let file = File::open(path).unwrap();
        let id = NamespaceId::of(path, &file).unwrap();
        assert!(id.find().unwrap().is_some());
        let other = NamespaceId {
            inode: id.inode.wrapping_add(1),
            ..id.clone()
        };
        assert!(other.find().unwrap().is_none());
        let gone = NamespaceId {
            path: "/proc/0/ns/net".into(),
            ..id
        };
        assert!(gone.find().unwrap().is_none());
    }
}
