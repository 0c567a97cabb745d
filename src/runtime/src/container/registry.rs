// SPDX-License-Identifier: Apache-2.0
//! The containers of a shim, by name.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::Handle;
use crate::error::{Kind, Result, ShimError};

/// The containers.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    containers: Mutex<HashMap<String, Place>>,
    emptied: Notify,
}

/// What stands under a name.
#[derive(Debug)]
enum Place {
    /// A container that is being created; whether nobody wants it any more.
    Reserved {
        cancelled: bool,
    },
    Taken(Handle),
}

/// A name that is taken until it is released: a create that fails gives it back.
#[derive(Debug)]
pub(crate) struct Reservation {
    registry: Arc<Registry>,
    id: String,
    fulfilled: bool,
}

impl Registry {
    /// Takes a name for a container that is being created.
    pub(crate) fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation> {
        match self.lock().entry(id.to_owned()) {
            Entry::Occupied(_) => Err(ShimError::new(
                Kind::AlreadyExists,
                format!("container {id} exists already"),
            )),
            Entry::Vacant(entry) => {
                entry.insert(Place::Reserved { cancelled: false });
                Ok(Reservation {
                    registry: Arc::clone(self),
                    id: id.to_owned(),
                    fulfilled: false,
                })
            }
        }
    }

    pub(crate) fn find(&self, id: &str) -> Result<Handle> {
        match self.lock().get(id) {
            Some(Place::Taken(handle)) => Ok(handle.clone()),
            Some(Place::Reserved { .. }) => Err(ShimError::new(
                Kind::FailedPrecondition,
                format!("container {id} is being created"),
            )),
            None => Err(ShimError::new(
                Kind::NotFound,
                format!("container {id} does not exist"),
            )),
        }
    }

    /// Nobody wants the container of this name any more, should it still be being created.
    pub(crate) fn cancel(&self, id: &str) {
        if let Some(Place::Reserved { cancelled }) = self.lock().get_mut(id) {
            *cancelled = true;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Forgets a container.
    pub(super) fn remove(&self, id: &str) {
        let mut containers = self.lock();
        containers.remove(id);
        if containers.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// Waits until there is no container any more.
    pub(crate) async fn emptied(&self) {
        let emptied = self.emptied.notified();
        let mut emptied = pin!(emptied);
        // Hears what happens from here on, before it looks.
        emptied.as_mut().enable();
        if !self.is_empty() {
            emptied.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// The container exists: its life begins, unless it was cancelled. Then the name comes back,
    /// and stays taken until the container is undone.
    pub(crate) fn fulfil(mut self, begin: impl FnOnce() -> Handle) -> Result<(), Self> {
        let registry = Arc::clone(&self.registry);
        // No cancellation comes in between.
        let mut containers = registry.lock();
        if let Some(Place::Reserved { cancelled: true }) = containers.get(&self.id) {
            return Err(self);
        }
        self.fulfilled = true;
        containers.insert(self.id.clone(), Place::Taken(begin()));
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.fulfilled {
            self.registry.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_while_its_container_is_made() {
        let registry = Arc::new(Registry::default());
        let reservation = registry.reserve("a").unwrap();
        assert_eq!(
            registry.reserve("a").unwrap_err().kind(),
            Kind::AlreadyExists
        );
        assert_eq!(
            registry.find("a").unwrap_err().kind(),
            Kind::FailedPrecondition
        );
        drop(reservation);
        assert_eq!(registry.find("a").unwrap_err().kind(), Kind::NotFound);
        assert!(registry.is_empty());
    }
}
