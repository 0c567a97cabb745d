// SPDX-License-Identifier: Apache-2.0
//! What stands behind a container's bind mounts, and how each comes into the guest.
//!
//! Most are shared with it as they are. A kubelet's volumes in memory are made in the guest's own
//! memory, where they are as fast and counted as the pod's; those that it writes configuration to
//! reach the container as a copy that follows them, because a shared file system tells a guest
//! nothing of what the host changes.

mod kubelet;
mod watch;

use std::path::{Path, PathBuf};

use protocols::agent::agent::Storage;
use rustix::fs::{StatFs, statfs};

use self::kubelet::Volume;
pub(crate) use self::watch::Watcher;
use crate::error::{Context, Kind, Result, ShimError};
use crate::mount;
use crate::sandbox::Share;
use crate::spec::{Bind, HugepageLimit};

/// The pod's volumes in the guest's memory.
const GUEST_MEMORY: &str = "/run/kata-containers/sandbox/ephemeral";

/// Copies of folders that the host changes.
const GUEST_COPIES: &str = "/run/kata-containers/sandbox/watchable";

/// Driver option of `watchable-bind`: the agent need not look for changes, it is told.
const TOLD: &str = "io.katacontainers.volume.watchable.told";

/// `statfs(2)`: huge pages.
const HUGETLBFS: i64 = 0x9584_58f6;

/// A container's bind mounts, sorted by what becomes of them.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    /// Shared with the guest.
    pub(crate) shared: Vec<Bind>,
    /// What the agent mounts, in order.
    pub(crate) storages: Vec<Storage>,
    /// Where the guest finds each: the mount's position in the specification, and a path.
    pub(crate) sources: Vec<(usize, String)>,
    /// Folders that the host changes.
    pub(crate) watched: Vec<Watched>,
}

/// A folder of the host whose changes the guest is told of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Watched {
    pub(crate) folder: PathBuf,
    /// Its copy in the guest.
    pub(crate) storage: Storage,
}

impl Volumes {
    /// Sorts the bind mounts of a container.
    ///
    /// # Errors
    /// A volume in huge pages whose container has no limit of them.
    pub(crate) fn sort(
        container: &str,
        binds: Vec<Bind>,
        huge_pages: &[HugepageLimit],
    ) -> Result<Self> {
        let mut volumes = Self::default();
        for bind in binds {
            volumes.add(container, bind, huge_pages)?;
        }
        Ok(volumes)
    }

    fn add(&mut self, container: &str, mut bind: Bind, limits: &[HugepageLimit]) -> Result<()> {
        bind.file = rustix::fs::stat(&bind.source)
            .ok()
            .map(|there| (there.st_dev, there.st_ino));
        match kubelet::volume(&bind.source) {
            Some(Volume::Empty(empty)) => {
                // One that is gone is told of where it is shared.
                let held = statfs(&empty.folder).ok();
                let memory = match held {
                    Some(held) if held.f_type == mount::TMPFS_MAGIC => {
                        Some(("tmpfs", vec![format!("size={}", mount::size(&held))]))
                    }
                    Some(held) if held.f_type == HUGETLBFS => {
                        Some(("hugetlbfs", huge_pages(&bind, &held, limits)?))
                    }
                    _ => None,
                };
                if let Some((kind, options)) = memory {
                    return self.in_memory(&bind, &empty, kind, options);
                }
            }
            Some(Volume::Configuration) if bind.read_only.is_some() && bind.source.is_dir() => {
                bind.cached = false;
                self.copied(container, &bind);
            }
            Some(Volume::Configuration) | None => {}
        }
        if bind.cached {
            let path = Share::volume_in_guest(&bind);
            self.sources.push((bind.mount, path));
        }
        self.shared.push(bind);
        Ok(())
    }

    /// A volume in the guest's memory, the same for all containers of the pod.
    fn in_memory(
        &mut self,
        bind: &Bind,
        empty: &kubelet::Empty,
        kind: &str,
        mut options: Vec<String>,
    ) -> Result<()> {
        let context = || format!("mount {}", empty.folder.display());
        let owner = rustix::fs::stat(&empty.folder).context(Kind::InvalidArgument, context)?;
        let mount_point = format!("{GUEST_MEMORY}/{}", empty.name);
        options.extend([
            format!("mode={:o}", owner.st_mode & 0o7777),
            format!("uid={}", owner.st_uid),
            format!("gid={}", owner.st_gid),
        ]);
        self.storages.push(Storage {
            driver: "ephemeral".to_owned(),
            source: kind.to_owned(),
            fstype: kind.to_owned(),
            options,
            mount_point: mount_point.clone(),
            // It is there for the pod's containers to come.
            shared: true,
            ..Storage::default()
        });
        if let Some(below) = &empty.below {
            let inner = rustix::fs::stat(&bind.source).context(Kind::InvalidArgument, context)?;
            let path = Path::new(&mount_point).join(below).display().to_string();
            self.storages.push(Storage {
                driver: "local".to_owned(),
                options: vec![format!("mode={:o}", inner.st_mode & 0o7777)],
                mount_point: path.clone(),
                shared: true,
                ..Storage::default()
            });
            self.sources.push((bind.mount, path));
        } else {
            self.sources.push((bind.mount, mount_point));
        }
        Ok(())
    }

    /// A copy that follows the folder.
    fn copied(&mut self, container: &str, bind: &Bind) {
        let path = format!("{GUEST_COPIES}/{container}/{}", bind.mount);
        let storage = Storage {
            driver: "watchable-bind".to_owned(),
            source: Share::volume_in_guest(bind),
            fstype: "bind".to_owned(),
            options: vec!["rbind".to_owned(), "ro".to_owned()],
            mount_point: path.clone(),
            ..Storage::default()
        };
        self.watched.push(Watched {
            folder: bind.source.clone(),
            storage,
        });
        self.sources.push((bind.mount, path));
    }

    /// All that the agent is to mount; `told` if it will hear of each change of the folders.
    pub(crate) fn for_agent(&self, told: bool) -> Vec<Storage> {
        let mut storages = self.storages.clone();
        storages.extend(self.watched.iter().map(|watched| {
            let mut storage = watched.storage.clone();
            if told {
                storage.driver_options.push(TOLD.to_owned());
            }
            storage
        }));
        storages
    }
}

/// Options of a hugetlbfs: the size of its pages, and as many as the container may have.
fn huge_pages(bind: &Bind, held: &StatFs, limits: &[HugepageLimit]) -> Result<Vec<String>> {
    let page = u64::try_from(held.f_bsize).unwrap_or(0);
    let mut limits = limits.iter();
    match limits.find(|limit| kubelet::page_size(&limit.page_size) == Some(page)) {
        Some(limit) => Ok(vec![
            format!("pagesize={page}"),
            format!("size={}", limit.limit),
        ]),
        None => Err(ShimError::new(
            Kind::InvalidArgument,
            format!(
                "mount {}: the container has no limit of huge pages of {} kB",
                bind.source.display(),
                page >> 10
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::mount::Tree;

    fn sorted(source: &Path, read_only: Option<Tree>) -> Volumes {
        let bind = Bind {
            mount: 3,
            source: source.to_owned(),
            file: None,
            tree: Tree::Recursive,
            read_only,
            private: true,
            cached: true,
        };
        Volumes::sort("c1", vec![bind], &[]).unwrap()
    }

    fn folder(root: &Path, path: &str) -> PathBuf {
        let folder = root.join("pods/u-1/volumes").join(path);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn configuration_is_copied_and_watched() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path(), "kubernetes.io~configmap/settings");
        let volumes = sorted(&folder, Some(Tree::Single));
        let [watched] = volumes.watched.as_slice() else {
            panic!("{volumes:?}");
        };
        assert_eq!(watched.folder, folder);
        let copy = "/run/kata-containers/sandbox/watchable/c1/3";
        assert_eq!(watched.storage.mount_point, copy);
        assert_eq!(volumes.sources, [(3, copy.to_owned())]);
        // The agent copies from where the host's changes are seen at once.
        assert!(!volumes.shared.first().unwrap().cached);
        assert!(watched.storage.source.contains("/containers/watchable/"));
        assert!(volumes.for_agent(false)[0].driver_options.is_empty());
        assert_eq!(volumes.for_agent(true)[0].driver_options, [TOLD]);
    }

    #[test]
    fn other_folders_are_shared_as_they_are() {
        let root = tempfile::tempdir().unwrap();
        let writable = folder(root.path(), "kubernetes.io~configmap/settings");
        let data = folder(root.path(), "kubernetes.io~empty-dir/data");
        for (source, read_only) in [(&writable, None), (&data, Some(Tree::Single))] {
            let volumes = sorted(source, read_only);
            assert_eq!(volumes.shared.len(), 1, "{}", source.display());
            assert!(volumes.watched.is_empty() && volumes.storages.is_empty());
            assert!(volumes.sources[0].1.contains("/containers/volumes/"));
        }
    }
}
