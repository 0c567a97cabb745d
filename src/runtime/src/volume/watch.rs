// SPDX-License-Identifier: Apache-2.0
//! Watches folders that the host changes, and tells the guest: by inotify, so that nothing wakes up
//! as long as nothing changes.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::warn;

use super::Watched;
use crate::agent::Agent;
use crate::raw;

/// What is a change. Files may be written in place as well.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW);

/// Changes seldom come alone: a kubelet makes half a dozen to publish one.
const SETTLE: Duration = Duration::from_millis(20);

/// How deep folders are watched. A kubelet's are two deep, with keys that name sub-folders a few more.
const DEPTH: usize = 8;

/// The folders that a sandbox's containers have copies of.
#[derive(Debug, Default)]
pub(crate) struct Watcher {
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    watches: Arc<Watches>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Watches {
    inotify: AsyncFd<OwnedFd>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Which volume's folder a watch belongs to.
    roots: HashMap<i32, PathBuf>,
    /// Each container's.
    containers: HashMap<String, Vec<Watched>>,
}

impl Watcher {
    /// Watches a container's folders; whether every change of them will be told. Must be called in the
    /// runtime.
    pub(crate) fn add(&self, container: &str, watched: &[Watched], agent: &Agent) -> bool {
        if watched.is_empty() {
            return true;
        }
        let added = self.start(agent).and_then(|watches| {
            let mut table = watches.lock();
            for one in watched {
                watches.watch(&mut table, &one.folder, &one.folder, 0)?;
            }
            let all = watched.to_vec();
            table.containers.insert(container.to_owned(), all);
            Ok(())
        });
        match added {
            Ok(()) => true,
            Err(error) => {
                // The host has only so many instances and watches for a user.
                warn!(container, %error, "volumes not watched: the guest looks at them every second");
                self.remove(container);
                false
            }
        }
    }

    /// A container is gone.
    pub(crate) fn remove(&self, container: &str) {
        let mut running = self.lock();
        let Some(Running { watches, task }) = &*running else {
            return;
        };
        let mut table = watches.lock();
        table.containers.remove(container);
        let used: BTreeSet<PathBuf> = table.folders().map(Path::to_owned).collect();
        table.roots.retain(|&watch, root| {
            let keep = used.contains(root);
            if !keep {
                // It may be gone with its folder.
                let _ = inotify::remove_watch(&watches.inotify, watch);
            }
            keep
        });
        let idle = table.containers.is_empty();
        drop(table);
        if idle {
            task.abort();
            *running = None;
        }
    }

    fn start(&self, agent: &Agent) -> io::Result<Arc<Watches>> {
        let mut running = self.lock();
        if let Some(running) = &*running {
            return Ok(Arc::clone(&running.watches));
        }
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let watches = Arc::new(Watches {
            inotify: raw::await_readable(inotify)?,
            table: Mutex::default(),
        });
        let task = tokio::spawn(tell(Arc::clone(&watches), agent.clone()));
        *running = Some(Running {
            watches: Arc::clone(&watches),
            task,
        });
        Ok(watches)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(running) = &*self.lock() {
            running.task.abort();
        }
    }
}

impl Table {
    fn folders(&self) -> impl Iterator<Item = &Path> {
        let all = self.containers.values().flatten();
        all.map(|watched| watched.folder.as_path())
    }
}

impl Watches {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a folder of the volume at `root` and those in it.
    fn watch(&self, table: &mut Table, root: &Path, folder: &Path, depth: usize) -> io::Result<()> {
        let watch = inotify::add_watch(&self.inotify, folder, CHANGES)?;
        table.roots.insert(watch, root.to_owned());
        if depth == DEPTH {
            return Ok(());
        }
        for entry in folder.read_dir()? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                match self.watch(table, root, &entry.path(), depth.saturating_add(1)) {
                    // Gone meanwhile, as the folder above will tell.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Takes what has happened; the volumes that it happened to.
    fn take(&self) -> io::Result<BTreeSet<PathBuf>> {
        let mut changed = BTreeSet::new();
        let mut buffer = [const { std::mem::MaybeUninit::uninit() }; 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut table = self.lock();
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(changed),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                changed.extend(table.folders().map(Path::to_owned));
            } else if event.events().contains(ReadFlags::IGNORED) {
                table.roots.remove(&event.wd());
            } else if let Some(root) = table.roots.get(&event.wd()) {
                changed.insert(root.clone());
            }
        }
    }

    /// Watches folders that are new in a volume; the copies that are to follow.
    fn follow(&self, root: &Path) -> Vec<Watched> {
        let mut table = self.lock();
        if let Err(error) = self.watch(&mut table, root, root, 0) {
            warn!(folder = %root.display(), %error, "not all watched");
        }
        let all = table.containers.values().flatten();
        all.filter(|watched| watched.folder == root)
            .cloned()
            .collect()
    }
}

/// Has the guest's copies follow, as long as there is a guest.
async fn tell(watches: Arc<Watches>, agent: Agent) {
    loop {
        let ready = match watches.inotify.readable().await {
            Ok(mut ready) => {
                ready.clear_ready();
                sleep(SETTLE).await;
                watches.take()
            }
            Err(error) => Err(error),
        };
        let changed = match ready {
            Ok(changed) => changed,
            Err(error) => {
                warn!(%error, "volumes not watched any more");
                return;
            }
        };
        for root in changed {
            for watched in watches.follow(&root) {
                if let Err(error) = agent.update_storage(watched.storage).await {
                    warn!(folder = %root.display(), error = error.chain(), "a copy is out of date");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use protocols::agent::agent::Storage;
    use tokio::net::UnixStream;
    use tokio::sync::watch;

    use super::*;

    fn watched(folder: &Path) -> Watched {
        Watched {
            folder: folder.to_owned(),
            storage: Storage::default(),
        }
    }

    /// A watcher whose task does not run: the test takes the events.
    fn started(folders: &[&Path]) -> (Watcher, Arc<Watches>, UnixStream) {
        let (stream, peer) = UnixStream::pair().unwrap();
        let (_, machine) = watch::channel(None);
        let agent = Agent::new(stream, Duration::from_secs(1), machine);
        let watcher = Watcher::default();
        for (number, folder) in folders.iter().enumerate() {
            assert!(watcher.add(&format!("c{number}"), &[watched(folder)], &agent));
        }
        let watches = Arc::clone(&watcher.lock().as_ref().unwrap().watches);
        watcher.lock().as_ref().unwrap().task.abort();
        (watcher, watches, peer)
    }

    #[tokio::test]
    async fn what_a_kubelet_publishes_is_heard() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (root.path().join("one"), root.path().join("other"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&other).unwrap();
        let (_watcher, watches, _peer) = started(&[&one, &other]);
        assert!(watches.take().unwrap().is_empty());
        fs::create_dir(one.join("..1")).unwrap();
        assert_eq!(watches.take().unwrap(), BTreeSet::from([one.clone()]));
        assert_eq!(watches.follow(&one).len(), 1);
        // In a folder that is new.
        fs::write(one.join("..1/key"), "value").unwrap();
        assert_eq!(watches.take().unwrap(), BTreeSet::from([one.clone()]));
        symlink("..1", one.join("..data_tmp")).unwrap();
        fs::rename(one.join("..data_tmp"), one.join("..data")).unwrap();
        fs::remove_dir(&other).unwrap();
        assert!(watches.take().unwrap().contains(&one));
    }

    #[tokio::test]
    async fn who_is_gone_is_not_watched() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().to_owned();
        let (watcher, watches, _peer) = started(&[&folder, &folder]);
        watcher.remove("c0");
        fs::write(folder.join("a"), "").unwrap();
        assert_eq!(watches.take().unwrap().len(), 1);
        assert_eq!(watches.follow(&folder).len(), 1);
        watcher.remove("c1");
        assert!(watcher.lock().is_none());
        fs::write(folder.join("b"), "").unwrap();
        assert!(watches.take().unwrap().is_empty());
    }
}
