// SPDX-License-Identifier: Apache-2.0
//! Storages: what the runtime wants mounted in the guest before a sandbox or container uses it.
//!
//! A mount point that several containers name is mounted once and counted.

mod disk;
mod driver;
mod group;
mod huge;
mod watched;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocols::agent::agent::Storage;
use tokio::task::spawn_blocking;
use tracing::warn;

pub(crate) use driver::DRIVERS;
use driver::Mounted;

use crate::disk::Disk;
use crate::error::{AgentError, Kind, Result};

/// All storages of the sandbox.
#[derive(Debug)]
pub(crate) struct Storages {
    /// How long a plugged disk may take to appear.
    patience: Duration,
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

/// Storages that one container uses, in the order of their mounting.
#[derive(Debug, Default)]
pub(crate) struct Held(Vec<PathBuf>);

impl Storages {
    pub(crate) fn new(patience: Duration) -> Self {
        Self {
            patience,
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
        for storage in wanted {
            let path = PathBuf::from(&storage.mount_point);
            match self.add_one(path.clone(), storage).await {
                Ok(()) => held.0.push(path),
                Err(error) => {
                    self.remove(held).await;
                    return Err(error);
                }
            }
        }
        Ok(held)
    }

    async fn add_one(&self, path: PathBuf, mut storage: Storage) -> Result<()> {
        let point = self.point(&path);
        let mut users = point.lock().await;
        let shared = storage.shared;
        if users.storage.is_none() {
            if storage.driver == disk::DRIVER {
                let found = Disk::await_at(&storage.source, self.patience).await;
                let found = found.map_err(|error| driver::named(&storage, &error))?;
                storage.source = found.path.display().to_string();
            }
            let mounted = blocking(move || driver::mount(&storage)).await?;
            users.storage = Some(mounted);
        }
        users.count = users.count.saturating_add(1);
        if shared && !users.kept {
            users.kept = true;
            users.count = users.count.saturating_add(1);
        }
        Ok(())
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

/// Runs mount work, which may wait for a device, away from the event loop.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(AgentError::internal(format!("storage task: {error}"))),
    }
}
