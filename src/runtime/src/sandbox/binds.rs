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
    places: Mutex<HashMap<String, Place>>,
}

/// One place.
#[derive(Debug, Default)]
struct Place {
    users: BTreeSet<String>,
    mounted: Arc<Mounted>,
}

/// What is mounted at a place. Locked while that changes, so that a second user waits for the first,
/// and nobody else does.
type Mounted = Mutex<Option<Bind>>;

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
        let shared = {
            let mut places = lock(&self.places);
            let place = places.entry(name.clone()).or_default();
            place.users.insert(container.to_owned());
            Arc::clone(&place.mounted)
        };
        let mut mounted = lock(&shared);
        let there = match &*mounted {
            Some(there) if *there == what(bind) => Ok(()),
            // 64 bits are enough but for somebody who looks for such a pair.
            Some(there) => Err(ShimError::new(
                Kind::InvalidArgument,
                format!(
                    "mount {}: its place in the guest is that of {}",
                    bind.source.display(),
                    there.source.display()
                ),
            )),
            None => {
                let target = tree.join(&name);
                let done = mount_at(&target, bind);
                if done.is_ok() {
                    *mounted = Some(what(bind));
                } else {
                    // An empty mount point, which the next to try finds.
                    let _ = remove_point(&target);
                }
                done
            }
        };
        drop(mounted);
        drop(shared);
        if there.is_err() {
            let mut places = lock(&self.places);
            if let Some(place) = places.get_mut(&name) {
                place.users.remove(container);
            }
            forget(&mut places, &name);
        }
        there
    }

    /// Takes away what only this container used; answers its places.
    pub(super) fn remove(&self, tree: &Path, container: &str) -> Result<Vec<String>> {
        let mut unused = Vec::new();
        for (name, place) in &mut *lock(&self.places) {
            if place.users.remove(container) && place.users.is_empty() {
                unused.push((name.clone(), Arc::clone(&place.mounted)));
            }
        }
        let mut removed = Ok(Vec::new());
        for (name, mounted) in unused {
            let mut there = lock(&mounted);
            // Somebody may have come meanwhile, and waits for this lock.
            let used = |place: &Place| !place.users.is_empty();
            if lock(&self.places).get(&name).is_some_and(used) || there.is_none() {
                continue;
            }
            let target = tree.join(&name);
            match unmount(&target).internal(|| format!("unmount {}", target.display())) {
                Ok(_) => {
                    *there = None;
                    if let Ok(names) = &mut removed {
                        names.push(name.clone());
                    }
                }
                Err(error) => {
                    // It can be removed again.
                    if let Some(place) = lock(&self.places).get_mut(&name) {
                        place.users.insert(container.to_owned());
                    }
                    removed = removed.and(Err(error));
                }
            }
            drop(there);
            drop(mounted);
            forget(&mut lock(&self.places), &name);
        }
        removed
    }
}

/// Drops the entry of a place that nobody uses or waits for.
fn forget(places: &mut HashMap<String, Place>, name: &str) {
    let idle = |place: &Place| place.users.is_empty() && Arc::strong_count(&place.mounted) == 1;
    if places.get(name).is_some_and(idle) {
        places.remove(name);
    }
}

pub(super) fn mount_at(target: &Path, bind: &Bind) -> Result<()> {
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

/// Unmounts what is at a place, and removes the mount point; whether there was a mount.
pub(super) fn unmount(target: &Path) -> io::Result<bool> {
    let mounted = match mount::unmount(target) {
        Ok(()) => true,
        // Never mounted: the create failed before.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => false,
        Err(error) => return Err(error),
    };
    remove_point(target)?;
    Ok(mounted)
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
        assert!(lock(&binds.places).is_empty());
        binds.remove(tree.path(), "c1").unwrap();
    }
}
