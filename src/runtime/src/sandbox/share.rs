// SPDX-License-Identifier: Apache-2.0
//! The tree of files that a sandbox's guest sees over virtio-fs.
//!
//! The tree is a small tmpfs in the shim's own mount namespace, over an empty folder of the host:
//!
//! ```text
//! <share>/rw/rootfs/<container>              the container's root file system, of a snapshotter
//! <share>/rw/passthrough/<container>/rootfs  the same, a folder of the host that others may change
//! <share>/rw/passthrough/sandbox-mounts/<name>  what the operator shares with every guest
//! <share>/rw/volumes/<n>                     what containers bind from the host
//! <share>/rw/watchable/<n>                   the same, where nothing is cached
//! <share>/ro                                 the same, which the guest gets
//! <share>/layers/<container>                 layers, while a root file system is made of them
//! ```
//!
//! The guest gets a read-only view of the tmpfs, into which the mounts made in `rw` propagate as
//! writable as they are. So it can write to what it was given and to nothing else: it can't fill
//! the host's memory, and it can't put a link where the shim mounts next. Nothing has to be
//! removed after a crash but the one empty folder.

use std::fs::{self, DirBuilder};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use protocols::agent::agent::Storage;
use protocols::containerd::mount::Mount;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use tokio::task::spawn_blocking;
use vmm::control::FsCache;

use super::Sandbox;
use super::binds::{self, Binds, UNCACHED};
use super::host_paths::HostPath;
use crate::error::{Context, Kind, Result, ShimError};
use crate::mount::{self, Tree};
use crate::spec::Bind;
use crate::template;

/// Where the agent mounts the tree.
pub(crate) const GUEST_ROOT: &str = "/run/kata-containers/shared/containers";

/// The tree's name on the virtio-fs device.
pub(super) const TAG: &str = "kataShared";

/// Where every guest finds what the operator shares, in Kata's place.
const HOST_PATHS: &str = "passthrough/sandbox-mounts";

/// Root file systems that a snapshotter made for one container: nobody but the guest changes them.
const OWN: &str = "rootfs";

/// Folders and empty files only: mount points.
const TMPFS_OPTIONS: &str = "mode=0755,size=4m,nr_inodes=64k";

/// Places of the shared tree where nothing is any more.
#[must_use]
#[derive(Debug)]
pub(crate) struct Gone(Vec<String>);

/// The shared tree.
#[derive(Debug)]
pub(crate) struct Share {
    root: PathBuf,
    binds: Binds,
    /// What comes late, after the end of the sandbox, must not mount anything any more.
    closed: RwLock<bool>,
}

/// The tree, for the agent to mount.
pub(super) fn storage() -> Storage {
    Storage {
        driver: "virtio-fs".to_owned(),
        source: TAG.to_owned(),
        fstype: "virtiofs".to_owned(),
        options: vec!["nodev".to_owned()],
        mount_point: GUEST_ROOT.to_owned(),
        ..Storage::default()
    }
}

/// What the guest may cache otherwise than the `cache` that is configured.
pub(super) fn cache_below(cache: FsCache) -> Vec<(String, FsCache)> {
    let own = match cache {
        FsCache::Never => FsCache::Never,
        FsCache::Auto | FsCache::Always => FsCache::Always,
    };
    vec![(UNCACHED.to_owned(), FsCache::Never), (OWN.to_owned(), own)]
}

/// Where a container's root file system is in the tree.
fn rootfs_place(container: &str, mounts: &[Mount]) -> String {
    if mounts.is_empty() {
        folder_rootfs(container)
    } else {
        own_rootfs(container)
    }
}

fn own_rootfs(container: &str) -> String {
    format!("{OWN}/{container}")
}

fn folder_rootfs(container: &str) -> String {
    format!("passthrough/{container}/rootfs")
}

impl Share {
    /// Makes the tree over the folder `root`.
    pub(crate) fn create(root: &Path) -> Result<Self> {
        let context = || format!("make the shared tree at {}", root.display());
        let share = Self {
            root: root.to_owned(),
            binds: Binds::default(),
            closed: RwLock::new(false),
        };
        rustix::mount::mount(
            "tmpfs",
            root,
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            Some(
                std::ffi::CString::new(TMPFS_OPTIONS)
                    .internal(context)?
                    .as_c_str(),
            ),
        )
        .internal(context)?;
        let made = share.prepare();
        if made.is_err() {
            // Not all of it is there, and what is must not stay.
            let _ = mount::unmount(root);
        }
        made.map(|()| share)
    }

    /// Makes the two views of a new tree.
    fn prepare(&self) -> Result<()> {
        let root = &self.root;
        let context = || format!("make the shared tree at {}", root.display());
        // What follows stays inside the tmpfs: it must not spread from here either.
        let private = MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change(root, private).internal(context)?;
        let (writable, guest) = (self.writable(), self.guest());
        make_folder(&writable.join("passthrough"))?;
        make_folder(&writable.join(OWN))?;
        Binds::prepare(&writable)?;
        make_folder(&guest)?;
        mount::bind(&writable, &writable, Tree::Single, None, false)?;
        rustix::mount::mount_change(&writable, MountPropagationFlags::SHARED).internal(context)?;
        mount::bind(&writable, &guest, Tree::Single, Some(Tree::Single), false)?;
        // Takes what happens in `rw`, gives nothing back.
        let downstream = MountPropagationFlags::DOWNSTREAM;
        rustix::mount::mount_change(&guest, downstream).internal(context)?;
        Ok(())
    }

    /// A tree that isn't there: nothing was mounted.
    #[cfg(test)]
    pub(crate) fn for_test() -> Self {
        Self {
            root: PathBuf::from("/nonexistent"),
            binds: Binds::default(),
            closed: RwLock::new(false),
        }
    }

    /// The folder that the guest gets.
    pub(crate) fn open(&self) -> Result<OwnedFd> {
        let guest = self.guest();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, &guest, flags, Mode::empty())
            .internal(|| format!("open {}", guest.display()))
    }

    /// Keeps the tree from being closed.
    fn hold(&self) -> Result<RwLockReadGuard<'_, bool>> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return Err(ShimError::new(
                Kind::FailedPrecondition,
                "the sandbox has ended",
            ));
        }
        Ok(closed)
    }

    /// Mounts a container's root file system: a snapshotter's mounts, or, where it has none, the
    /// folder that the specification names.
    pub(crate) fn add_rootfs(
        &self,
        container: &str,
        mounts: &[Mount],
        folder: &Path,
    ) -> Result<()> {
        let _open = self.hold()?;
        let target = self.writable().join(rootfs_place(container, mounts));
        make_folder(&target)?;
        if mounts.is_empty() {
            mount::bind(folder, &target, Tree::Recursive, None, false)
        } else if mounts.iter().any(template::has_steps) {
            let stage = self.root.join("layers").join(container);
            mount::mount_layers(mounts, &stage, &target)
        } else {
            mount::mount_all(mounts, &target)
        }
    }

    /// Shares what the operator shares with every guest.
    pub(super) fn add_host_paths(&self, paths: &[HostPath]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        let _open = self.hold()?;
        let folder = self.writable().join(HOST_PATHS);
        make_folder(&folder)?;
        paths.iter().try_for_each(|path| {
            let bind = Bind {
                mount: 0,
                source: path.path().to_owned(),
                file: None,
                tree: Tree::Recursive,
                read_only: (!path.writable).then_some(Tree::Recursive),
                private: true,
                cached: true,
            };
            binds::mount_at(&folder.join(path.name()), &bind)
                .context(Kind::InvalidArgument, || "sandbox_bind_mounts".to_owned())
        })
    }

    /// Where the guest finds a container's root file system.
    pub(crate) fn rootfs_in_guest(container: &str, mounts: &[Mount]) -> String {
        in_guest(&rootfs_place(container, mounts))
    }

    /// Where the guest finds what a container binds.
    pub(crate) fn volume_in_guest(bind: &Bind) -> String {
        in_guest(&binds::place(bind))
    }

    /// Shares a file or folder of the host with a container.
    pub(crate) fn add_volume(&self, container: &str, bind: &Bind) -> Result<()> {
        let _open = self.hold()?;
        self.binds.add(&self.writable(), container, bind)
    }

    /// Takes all of a container's mounts away, in the guest's view as well; answers their places.
    pub(crate) fn remove(&self, container: &str) -> Result<Vec<String>> {
        let tree = self.writable();
        let mut places = Vec::new();
        // It is in one of them, or in none where the create failed before.
        for place in [own_rootfs(container), folder_rootfs(container)] {
            let rootfs = tree.join(&place);
            if binds::unmount(&rootfs).internal(|| format!("unmount {}", rootfs.display()))? {
                places.push(place);
            }
        }
        let _ = fs::remove_dir(tree.join("passthrough").join(container));
        places.extend(self.binds.remove(&tree, container)?);
        Ok(places)
    }

    /// Takes the tree away, with all that is still mounted in it.
    pub(crate) fn close(&self) -> Result<()> {
        let mut closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        *closed = true;
        mount::unmount(&self.root).internal(|| format!("unmount {}", self.root.display()))
    }

    fn writable(&self) -> PathBuf {
        self.root.join("rw")
    }

    fn guest(&self) -> PathBuf {
        self.root.join("ro")
    }
}

impl Sandbox {
    /// Takes away what was shared with a container that is gone.
    pub(crate) async fn unshare(&self, container: &str) -> Result<Gone> {
        let (share, container) = (self.share(), container.to_owned());
        let places = spawn_blocking(move || share.remove(&container));
        places.await.internal(|| "task".to_owned())?.map(Gone)
    }

    /// Has the guest forget what was taken away. What it knows of it is open on the host: a mount
    /// and the space of removed files stay.
    pub(crate) async fn forget(&self, gone: Gone) {
        if self.has_ended() {
            return;
        }
        for place in gone.0 {
            self.agent.look_at_gone(&in_guest(&place)).await;
        }
    }
}

/// Where the guest finds a place of the tree.
fn in_guest(place: &str) -> String {
    format!("{GUEST_ROOT}/{place}")
}

pub(super) fn make_folder(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .internal(|| format!("create {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_snapshotters_mounts_are_the_guests_alone() {
        let policy = |cache, mounts: &[Mount]| {
            let place = rootfs_place("c1", mounts);
            let below = |(folder, _): &(String, FsCache)| {
                Path::new(&place).parent() == Some(Path::new(folder))
            };
            let own = cache_below(cache).into_iter().find(below);
            own.map_or(cache, |(_, cache)| cache)
        };
        let mounts = [Mount::default()];
        assert_eq!(policy(FsCache::Auto, &mounts), FsCache::Always);
        assert_eq!(policy(FsCache::Auto, &[]), FsCache::Auto);
        // What is configured holds: somebody looks for a fault, say.
        assert_eq!(policy(FsCache::Never, &mounts), FsCache::Never);
    }
}
