// SPDX-License-Identifier: Apache-2.0
//! What a sandbox owns on the host, written down before it is made.
//!
//! A line an object, appended. Teardown removes the objects in reverse order; so does `delete`
//! when the shim is dead, whatever the moment of its death: an object that was written down but
//! not made yet is simply not there, and a torn last line names nothing that exists.
//!
//! Mounts are not listed: they live in the shim's own mount namespace and end with it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::cgroup::Cgroup;
use crate::error::{Context, Kind, Result, ShimError};
use crate::network::{self, Link};
use crate::process::ProcessId;

/// How long a killed process may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A thing on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Object {
    /// A folder that is empty when it is removed.
    Folder(PathBuf),
    /// A socket or file.
    File(PathBuf),
    /// A process that ends with the sandbox.
    Process(ProcessId),
    /// The cgroup of its machine.
    Cgroup(Cgroup),
    /// A network interface that was made for the sandbox.
    Link(Link),
    /// The redirection of a network interface that was there before.
    Redirect {
        link: Link,
        /// Whether the qdisc that holds it was made for it.
        qdisc: bool,
    },
}

/// The list of a sandbox's objects.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    objects: Vec<Object>,
}

impl Journal {
    /// Starts the journal of a new sandbox. One of the same name whose processes are all gone is
    /// removed first: nobody has called `delete` for it.
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        if let Some(old) = Self::open(path.clone())?
            && !old.is_in_use()
        {
            warn!(journal = %path.display(), "removing what an earlier sandbox has left");
            old.remove_all()?;
        }
        let context = || format!("create {}", path.display());
        if let Some(folder) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .internal(context)?;
        }
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => ShimError::new(
                    Kind::AlreadyExists,
                    format!("{} exists: the sandbox is in use", path.display()),
                ),
                _ => ShimError::new(Kind::Internal, format!("{}: {error}", context())),
            })?;
        Ok(Self {
            path,
            file,
            objects: Vec::new(),
        })
    }

    /// Reads the journal of a sandbox whose shim is gone; `None` where there is none.
    pub(crate) fn open(path: PathBuf) -> Result<Option<Self>> {
        let context = || format!("read {}", path.display());
        let file = match OpenOptions::new().append(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).internal(context),
        };
        let text = fs::read_to_string(&path).internal(context)?;
        let objects = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        Ok(Some(Self {
            path,
            file,
            objects,
        }))
    }

    /// Whether one of the sandbox's processes is still there.
    fn is_in_use(&self) -> bool {
        self.objects
            .iter()
            .any(|object| matches!(object, Object::Process(process) if process.exists()))
    }

    /// Writes an object down; it may be made afterwards.
    pub(crate) fn record(&mut self, object: Object) -> Result<()> {
        let context = || format!("write {}", self.path.display());
        let mut line = serde_json::to_vec(&object).internal(context)?;
        line.push(b'\n');
        self.file.write_all(&line).internal(context)?;
        self.objects.push(object);
        Ok(())
    }

    /// Writes a folder down and makes it, for root only.
    pub(crate) fn make_folder(&mut self, path: &Path) -> Result<()> {
        self.record(Object::Folder(path.to_owned()))?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .internal(|| format!("create {}", path.display()))
    }

    /// Removes everything but processes: the sandbox's owner has seen to its children, and is
    /// itself in the list.
    pub(crate) fn close(mut self) -> Result<()> {
        self.objects
            .retain(|object| !matches!(object, Object::Process(_)));
        self.remove_all()
    }

    /// Removes every object, then the journal and its folder. Goes on past what can't be removed,
    /// and then keeps the journal, so that another try can follow.
    pub(crate) fn remove_all(mut self) -> Result<()> {
        let mut failure = None;
        while let Some(object) = self.objects.pop() {
            if let Err(error) = remove(&object) {
                warn!(?object, %error, "not removed");
                failure.get_or_insert_with(|| format!("remove {object:?}: {error}"));
            }
        }
        if let Some(failure) = failure {
            return Err(ShimError::new(Kind::Internal, failure));
        }
        let folder = self.path.parent().map(Path::to_owned);
        gone(fs::remove_file(&self.path))
            .and_then(|()| folder.map_or(Ok(()), |folder| gone(fs::remove_dir(folder))))
            .internal(|| format!("remove {}", self.path.display()))
    }
}

fn remove(object: &Object) -> io::Result<()> {
    match object {
        // Never recursive: what is in there isn't ours to judge, and a bind mount is a way out.
        Object::Folder(path) => gone(fs::remove_dir(path)),
        Object::File(path) => gone(fs::remove_file(path)),
        Object::Process(process) => process.kill(KILL_TIMEOUT),
        Object::Cgroup(cgroup) => cgroup.remove(),
        Object::Link(link) => network::remove_link(link),
        Object::Redirect { link, qdisc } => network::remove_redirect(link, *qdisc),
    }
}

/// What is gone already needs no removal.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn everything_goes_in_reverse_order_even_after_a_crash() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pod/journal");
        let outer = root.path().join("outer");
        let inner = outer.join("inner");
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();

        let mut journal = Journal::create(path.clone()).unwrap();
        journal.make_folder(&outer).unwrap();
        journal.make_folder(&inner).unwrap();
        journal.record(Object::File(inner.join("socket"))).unwrap();
        fs::write(inner.join("socket"), "").unwrap();
        journal
            .record(Object::File(root.path().join("never-made")))
            .unwrap();
        journal
            .record(Object::Process(ProcessId::of(child.id()).unwrap()))
            .unwrap();
        // The process dies in the middle of a line.
        journal.file.write_all(b"{\"folder\":\"/").unwrap();
        drop(journal);

        // The killed child stays a zombie until it is reaped, so another thread does that.
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        Journal::open(path.clone())
            .unwrap()
            .unwrap()
            .remove_all()
            .unwrap();
        assert!(!reaper.join().unwrap().success());
        assert!(!outer.exists());
        assert!(!path.parent().unwrap().exists());
        assert!(Journal::open(path).unwrap().is_none());
    }

    #[test]
    fn a_second_sandbox_of_the_same_name_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pod/journal");
        let mut first = Journal::create(path.clone()).unwrap();
        first
            .record(Object::Process(ProcessId::own().unwrap()))
            .unwrap();
        assert_eq!(
            Journal::create(path).unwrap_err().kind(),
            Kind::AlreadyExists
        );
    }

    #[test]
    fn what_a_dead_sandbox_left_makes_room_for_the_next() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pod/journal");
        let folder = root.path().join("folder");
        let mut child = Command::new("true").spawn().unwrap();
        let mut first = Journal::create(path.clone()).unwrap();
        first
            .record(Object::Process(ProcessId::of(child.id()).unwrap()))
            .unwrap();
        first.make_folder(&folder).unwrap();
        child.wait().unwrap();
        Journal::create(path).unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn a_folder_with_foreign_contents_stays_and_so_does_the_journal() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pod/journal");
        let folder = root.path().join("folder");
        let mut journal = Journal::create(path.clone()).unwrap();
        journal.make_folder(&folder).unwrap();
        fs::write(folder.join("foreign"), "").unwrap();
        assert!(journal.remove_all().is_err());
        assert!(folder.join("foreign").exists());
        assert!(path.exists());
    }
}
