// SPDX-License-Identifier: Apache-2.0
//! What containers bind from the host, in the tree that their guest sees: each thing once, however
//! many of them use it.
//!
//! To the guest, a file that is reached through two mounts is two files, each with a cache and locks
//! of its own. Containers that share a volume must share its mount.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::share::make_folder;
use crate::error::{Context, Kind, Result, ShimError};
use crate::mount;
use crate::spec::Bind;

/// The folders of the tree: what the guest may cache for a moment, and what not at all.
const CACHED: &str = "volumes";
pub(super) const UNCACHED: &str = "watchable";

/// What is bound, by its place in the tree.
#[derive(Debug, Default)]
pub(super) struct Binds {
    places: Mutex<HashMap<String, Arc<Mutex<Place>>>>,
}

/// One place. Locked while it is being mounted, so that a second user waits for the first, and
/// nobody else does.
#[derive(Debug, Default)]
struct Place {
    bind: Option<Bind>,
    users: BTreeSet<String>,
}

/// What is bound, whichever of a container's mounts it is.
fn what(bind: &Bind) -> Bind {
    Bind {
        mount: 0,
        ..bind.clone()
    }
}

/// Where something is in the tree, the same for all that ask for the same.
pub(super) fn place(bind: &Bind) -> String {
    let mut hasher = DefaultHasher::new();
    what(bind).hash(&mut hasher);
    let folder = if bind.cached { CACHED } else { UNCACHED };
    format!("{folder}/{:016x}", hasher.finish())
}

impl Binds {
    /// Makes the folders of a new tree.
    pub(super) fn prepare(tree: &Path) -> Result<()> {
        make_folder(&tree.join(CACHED))?;
        make_folder(&tree.join(UNCACHED))
    }

    /// Binds something for a container, unless it is there for another.
    pub(super) fn add(&self, tree: &Path, container: &str, bind: &Bind) -> Result<()> {
        let name = place(bind);
        let place = Arc::clone(lock(&self.places).entry(name.clone()).or_default());
        let mut place = lock(&place);
        match &place.bind {
            Some(there) if *there == what(bind) => {}
            Some(there) => {
                // 64 bits are enough but for somebody who looks for such a pair.
                return Err(ShimError::new(
                    Kind::InvalidArgument,
                    format!(
                        "mount {}: its place in the guest is that of {}",
                        bind.source.display(),
                        there.source.display()
                    ),
                ));
            }
            None => {
                let target = tree.join(&name);
                if let Err(error) = mount_at(&target, bind) {
                    // An empty mount point, which the next to try finds.
                    let _ = remove_point(&target);
                    return Err(error);
                }
                place.bind = Some(what(bind));
            }
        }
        place.users.insert(container.to_owned());
        Ok(())
    }

    /// Takes away what only this container used.
    pub(super) fn remove(&self, tree: &Path, container: &str) -> Result<()> {
        let places: Vec<_> = lock(&self.places)
            .iter()
            .map(|(name, place)| (name.clone(), Arc::clone(place)))
            .collect();
        for (name, shared) in places {
            let mut place = lock(&shared);
            if !place.users.contains(container) || place.users.len() > 1 {
                place.users.remove(container);
                continue;
            }
            let target = tree.join(&name);
            unmount(&target).internal(|| format!("unmount {}", target.display()))?;
            *place = Place::default();
            drop(place);
            self.forget(&name);
        }
        Ok(())
    }

    /// Drops the entry of a place that nobody uses or waits for.
    fn forget(&self, name: &str) {
        let mut places = lock(&self.places);
        // One for the table and one for the caller: nobody else can get at it meanwhile.
        if places
            .get(name)
            .is_some_and(|place| Arc::strong_count(place) == 2)
        {
            places.remove(name);
        }
    }
}

fn mount_at(target: &Path, bind: &Bind) -> Result<()> {
    let source = &bind.source;
    let metadata = fs::metadata(source).context(Kind::InvalidArgument, || {
        format!("mount {}", source.display())
    })?;
    if metadata.is_dir() {
        make_folder(target)?;
    } else if metadata.is_file() {
        File::create(target).internal(|| format!("create {}", target.display()))?;
    } else {
        return Err(ShimError::new(
            Kind::InvalidArgument,
            format!(
                "mount {}: only files and folders can be shared with the guest",
                source.display()
            ),
        ));
    }
    mount::bind(source, target, bind.tree, bind.read_only, bind.private)
}

/// Unmounts what is at a place, and removes the mount point.
pub(super) fn unmount(target: &Path) -> io::Result<()> {
    match mount::unmount(target) {
        Ok(()) => {}
        // Never mounted: the create failed before.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {}
        Err(error) => return Err(error),
    }
    remove_point(target)
}

/// Not recursive: below a mount that stayed there is somebody's data.
fn remove_point(target: &Path) -> io::Result<()> {
    match fs::remove_dir(target).or_else(|_| fs::remove_file(target)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::mount::Tree;

    fn bind(source: &str, mount: usize) -> Bind {
        Bind {
            mount,
            source: PathBuf::from(source),
            file: None,
            tree: Tree::Recursive,
            read_only: None,
            private: false,
            cached: true,
        }
    }

    #[test]
    fn the_same_thing_has_the_same_place() {
        let one = bind("/srv/a", 1);
        // Whichever of a container's mounts it is.
        assert_eq!(place(&one), place(&bind("/srv/a", 2)));
        assert_ne!(place(&one), place(&bind("/srv/b", 1)));
        // What one may not write must be another mount.
        let guarded = Bind {
            read_only: Some(Tree::Single),
            ..bind("/srv/a", 1)
        };
        assert_ne!(place(&one), place(&guarded));
        // Somebody has put another file in its place meanwhile.
        let replaced = Bind {
            file: Some((1, 2)),
            ..bind("/srv/a", 1)
        };
        assert_ne!(place(&one), place(&replaced));
        let live = Bind {
            cached: false,
            ..bind("/srv/a", 1)
        };
        assert!(place(&live).starts_with("watchable/"));
    }

    #[test]
    fn a_place_that_cannot_be_mounted_is_left_as_it_was() {
        let tree = tempfile::tempdir().unwrap();
        Binds::prepare(tree.path()).unwrap();
        let binds = Binds::default();
        let error = binds.add(tree.path(), "c1", &bind("/nonexistent", 0));
        let error = error.unwrap_err().chain();
        assert!(error.contains("mount /nonexistent"), "{error}");
        let null = binds.add(tree.path(), "c1", &bind("/dev/null", 0));
        assert!(null.unwrap_err().chain().contains("only files and folders"));
        let left = fs::read_dir(tree.path().join(CACHED)).unwrap().count();
        assert_eq!(left, 0);
        binds.remove(tree.path(), "c1").unwrap();
    }
}
