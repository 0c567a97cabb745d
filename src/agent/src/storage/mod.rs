// SPDX-License-Identifier: Apache-2.0
//! Storages: what the runtime wants mounted in the guest before a sandbox or container uses it.
//!
//! A mount point that several containers name is mounted once and counted.

mod disk;
mod driver;
mod group;
mod huge;
mod layers;
mod stale;
mod watched;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocols::agent::agent::Storage;
use tracing::warn;

use driver::Mounted;
pub(crate) use driver::drivers;
pub(crate) use stale::remove as remove_stale;

use crate::disk::{Disk, Transport};
use crate::error::{AgentError, Kind, Result};
use crate::reaper::Reaper;
use crate::task::blocking;

/// All storages of the sandbox.
#[derive(Debug)]
pub(crate) struct Storages {
    /// How long a plugged disk may take to appear.
    patience: Duration,
    reaper: Reaper,
    points: Mutex<HashMap<PathBuf, Arc<Point>>>,
}

/// One mount point. Its lock is held across the mount, so that a second user waits for the first.
type Point = tokio::sync::Mutex<Users>;

#[derive(Debug, Default)]
struct Users {
    count: usize,
    /// Counted once more, for the sandbox: what is there stays for containers to come.
    kept: bool,
    storage: Option<Mounted>,
}

/// What is mounted as one.
#[derive(Debug)]
enum Wanted {
    One(Storage),
    /// The writable one first.
    Layers(Vec<Storage>),
}

impl Wanted {
    fn mount_point(&self) -> &str {
        match self {
            Self::One(storage) => &storage.mount_point,
            Self::Layers(storages) => storages.first().map_or("", |first| &first.mount_point),
        }
    }

    fn is_shared(&self) -> bool {
        match self {
            Self::One(storage) => storage.shared,
            Self::Layers(storages) => storages.first().is_some_and(|first| first.shared),
        }
    }
}

/// Storages that one container uses, in the order of their mounting.
#[derive(Debug, Default)]
pub(crate) struct Held(Vec<PathBuf>);

impl Storages {
    pub(crate) fn new(patience: Duration, reaper: Reaper) -> Self {
        Self {
            patience,
            reaper,
            points: Mutex::default(),
        }
    }

    /// Mounts all of `wanted`; on failure none of them stays.
    ///
    /// # Errors
    ///
    /// The first storage that can't be mounted, by name.
    pub(crate) async fn add(&self, wanted: Vec<Storage>) -> Result<Held> {
        let mut held = Held::default();
        for wanted in layers::group(wanted)? {
            let path = PathBuf::from(wanted.mount_point());
            match self.add_one(path.clone(), wanted).await {
                Ok(()) => held.0.push(path),
                Err(error) => {
                    self.remove(held).await;
                    return Err(error);
                }
            }
        }
        Ok(held)
    }

    async fn add_one(&self, path: PathBuf, wanted: Wanted) -> Result<()> {
        let point = self.point(&path);
        let mut users = point.lock().await;
        let shared = wanted.is_shared();
        if users.storage.is_none() {
            let mounted = match wanted {
                Wanted::One(mut storage) => {
                    self.find_disk(&mut storage).await?;
                    blocking(move || driver::mount(&storage)).await
                }
                Wanted::Layers(mut storages) => {
                    for storage in &mut storages {
                        self.find_disk(storage).await?;
                    }
                    blocking(move || layers::mount(&storages)).await
                }
            };
            match mounted {
                Ok(mounted) => users.storage = Some(mounted),
                Err(error) => {
                    drop(users);
                    self.forget(&path, &point);
                    return Err(error);
                }
            }
        }
        users.count = users.count.saturating_add(1);
        if shared && !users.kept {
            users.kept = true;
            users.count = users.count.saturating_add(1);
        }
        Ok(())
    }

    /// Puts the node of a storage's disk, once it is there and has a file system, in place of what
    /// says where it is.
    async fn find_disk(&self, storage: &mut Storage) -> Result<()> {
        let transport = match storage.driver.as_str() {
            // The disks of layers are named by their nodes or as virtio's.
            layers::DRIVER => Transport::Pci,
            other => match Transport::named(other) {
                Some(transport) => transport,
                None => return Ok(()),
            },
        };
        let named = |storage: &Storage, error| driver::named(storage, &error);
        let found = Disk::await_at(transport, &storage.source, self.patience).await;
        storage.source = match found {
            Ok(disk) => disk.path.display().to_string(),
            Err(error) => return Err(named(storage, error)),
        };
        if storage.driver == layers::DRIVER {
            let found = layers::find_blobs(storage, self.patience).await;
            found.map_err(|error| named(storage, error))?;
        }
        let formatted = disk::format(storage, &self.reaper).await;
        formatted.map_err(|error| named(storage, error))
    }

    /// UpdateEphemeralMounts: an ephemeral storage gets other options, such as a size; a copy of a
    /// folder is made equal to it.
    ///
    /// # Errors
    ///
    /// Another driver, a place where nothing of the kind is mounted, or the kernel's reason.
    pub(crate) async fn update(&self, storage: Storage) -> Result<()> {
        if storage.driver != "watchable-bind" {
            return blocking(move || driver::remount(&storage)).await;
        }
        let path = PathBuf::from(&storage.mount_point);
        let point = self.point(&path);
        let users = point.lock().await;
        let copy = match &users.storage {
            Some(Mounted::Copy(_, copy)) => Some(Arc::clone(copy)),
            Some(_) => None,
            None => {
                drop(users);
                self.forget(&path, &point);
                let line = format!("nothing is mounted on {:?}", storage.mount_point);
                return Err(AgentError::new(Kind::NotFound, line));
            }
        };
        drop(users);
        match copy {
            Some(copy) => blocking(move || copy.refresh()).await,
            // The folder itself: there is nothing to do.
            None => Ok(()),
        }
    }

    /// Unmounts what outlives the containers that use it; what is mounted below something comes
    /// before it.
    pub(crate) async fn end(&self) {
        let mut kept: Vec<PathBuf> = Vec::new();
        {
            let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
            kept.extend(points.keys().cloned());
        }
        kept.sort();
        self.remove(Held(kept)).await;
    }

    /// Gives storages back, the last mounted first. Failures are logged: there is nobody who
    /// could do better.
    pub(crate) async fn remove(&self, held: Held) {
        for path in held.0.into_iter().rev() {
            let point = self.point(&path);
            let mut users = point.lock().await;
            users.count = users.count.saturating_sub(1);
            if users.count > 0 {
                continue;
            }
            if let Some(mounted) = users.storage.take()
                && let Err(error) = blocking(move || mounted.unmount()).await
            {
                warn!(path = %path.display(), error = error.line(), "storage stays");
            }
            drop(users);
            self.forget(&path, &point);
        }
    }

    /// Drops the entry of a mount point that nobody uses or waits for.
    fn forget(&self, path: &Path, point: &Arc<Point>) {
        let mut points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        // One for the table and one for the caller: nobody else can get at it meanwhile.
        if Arc::strong_count(point) == 2 {
            points.remove(path);
        }
    }

    fn point(&self, path: &Path) -> Arc<Point> {
        let mut points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(points.entry(path.to_owned()).or_default())
    }
}

/// A text as sizes and files of the kernel's.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(text: &str) {
    huge::fuzz(text);
    stale::fuzz(text);
}

/// Storages of a request, checked with nothing mounted.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_request(storages: Vec<Storage>) {
    for storage in &storages {
        let _ = crate::mount::MountOptions::parse(&storage.options);
        if let Some(transport) = Transport::named(&storage.driver) {
            let _ = transport.place(&storage.source);
        }
    }
    let _ = layers::group(storages).map(|wanted| {
        wanted
            .iter()
            .all(|wanted| wanted.is_shared() && wanted.mount_point().is_empty())
    });
}
