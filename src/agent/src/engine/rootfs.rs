// SPDX-License-Identifier: Apache-2.0
//! The container's file system: its root, its mounts and devices, and the way in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, fstatfs, openat};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{chdir, fchdir, pivot_root};

use super::plan::{MountPlan, RootfsPlan};
use super::user_namespace::Prepared;
use super::{devices, user};
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};
use crate::sys::mount::{Attributes, set_attributes};

/// A container's file system that is built, and not entered yet.
#[derive(Debug)]
pub(super) struct Rootfs {
    /// The root folder; everything else is resolved from it.
    pub(super) root: OwnedFd,
    /// Mounts that become read-only once the files and mount points in them are made.
    read_only: Vec<OwnedFd>,
}

/// Builds the root in this mount namespace, which is the container's own.
///
/// # Errors
///
/// The first step that failed, with its path.
pub(super) fn build(
    plan: &RootfsPlan,
    prepared: &Prepared,
    user_namespace: bool,
) -> Result<Rootfs> {
    // Nothing that is mounted from here on may appear in the agent's namespace.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(|| "leave the propagation of mounts")?;
    let root = attach_root(&plan.path)?;
    if user_namespace {
        // Not before: the way to the root may be the guest's alone.
        user::become_root()?;
    }
    let mut read_only = Vec::new();
    let mut ready = prepared.mounts.iter();
    for entry in &plan.mounts {
        let ready = ready.next().and_then(Option::as_ref);
        let unfinished =
            mount_one(root.as_fd(), entry, ready).map_err(|error| entry.failed(&error))?;
        read_only.extend(unfinished);
    }
    // A /dev of the guest or of the runtime is left as it is.
    let dev = Path::new("/dev");
    let foreign = |entry: &MountPlan| entry.options.bind && entry.destination == dev;
    if plan.mounts.iter().any(foreign) {
        devices::check(root.as_fd(), &plan.devices)?;
    } else {
        devices::create(root.as_fd(), &plan.devices, prepared.nodes.as_deref())?;
    }
    Ok(Rootfs { root, read_only })
}

impl Rootfs {
    /// Takes no more files: mounts that are to be read-only are from here on.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn finish(&self) -> Result<()> {
        for mount in &self.read_only {
            make_read_only(mount).context(|| "make a mount read-only")?;
        }
        Ok(())
    }
}

/// Makes `root` the root of this process and of the mount namespace.
///
/// # Errors
///
/// The kernel's.
pub(super) fn enter(root: &OwnedFd, plan: &RootfsPlan) -> Result<()> {
    let context = || format!("change root to {:?}", plan.path);
    // The old root ends up on top of the new one, from where it can be unmounted without a folder
    // to put it in.
    let old = openat(
        CWD,
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(context)?;
    fchdir(root).context(context)?;
    pivot_root(".", ".").context(context)?;
    fchdir(&old).context(context)?;
    // Unmounting must not reach the agent's namespace, which it came from.
    mount_change(
        ".",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(context)?;
    unmount(".", UnmountFlags::DETACH).context(context)?;
    chdir("/").context(context)?;

    if let Some(propagation) = plan.propagation {
        let (attributes, recursive) = propagation.attributes();
        set_attributes(root.as_fd(), attributes, recursive)
            .context(|| "set the root's propagation")?;
    }
    if plan.readonly {
        make_read_only(root).context(|| "make the root read-only")?;
    }
    Ok(())
}

fn make_read_only(mount: &OwnedFd) -> io::Result<()> {
    let attributes = Attributes {
        set: libc::MOUNT_ATTR_RDONLY,
        ..Attributes::default()
    };
    set_attributes(mount.as_fd(), attributes, false)
}

/// The root folder as a mount of its own, as `pivot_root(2)` and a read-only root need it.
fn attach_root(path: &Path) -> Result<OwnedFd> {
    let failed =
        |error: AgentError| AgentError::new(error.kind(), format!("rootfs: {}", error.line()));
    let options = MountOptions::parse(&["rbind"])?;
    let root = mount::bind(path, &options).map_err(failed)?;
    let status = fstat(&root).context(|| format!("rootfs {path:?}"))?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Directory {
        return Err(AgentError::invalid(format!(
            "rootfs {path:?}: not a directory"
        )));
    }
    let target = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("rootfs {path:?}"))?;
    mount::attach(&root, target.as_fd(), &options).map_err(failed)?;
    Ok(root)
}

/// Carries out one entry. The result is the mount if it has yet to become read-only.
fn mount_one(
    root: BorrowedFd<'_>,
    entry: &MountPlan,
    ready: Option<&OwnedFd>,
) -> Result<Option<OwnedFd>> {
    if entry.options.remount {
        let place = mount::open_in_root(root, &entry.destination).context(|| "look it up")?;
        return mount::remount(&place, &entry.options).map(|()| None);
    }
    let mut made = None;
    let mount = match ready {
        Some(ready) => ready,
        None => made.insert(make(entry, covered_mode(root, entry))?),
    };
    let target =
        match FileType::from_raw_mode(fstat(mount).context(|| "look at the source")?.st_mode) {
            FileType::Directory => Target::Directory,
            _ => Target::File,
        };
    let destination = mount::create_in_root(root, &entry.destination, target)
        .context(|| "make the mount point")?;
    if matches!(entry.kind.as_str(), "proc" | "sysfs") && !entry.options.bind {
        stays_in_place(root, entry)?;
    }
    may_cover(root, entry, mount, &destination)?;
    if entry.options.copy_up {
        mount::copy_up(&destination, mount).context(|| "tmpcopyup")?;
    }
    mount::attach(mount, destination.as_fd(), &entry.options)?;
    Ok(made.filter(|_| is_filled(entry) && entry.options.read_only()))
}

/// Makes the entry's mount, detached; a tmpfs with the mode `covered` unless the entry has one.
///
/// # Errors
///
/// The kernel's reason.
pub(super) fn make(entry: &MountPlan, covered: Option<Mode>) -> Result<OwnedFd> {
    if entry.options.bind {
        return mount::bind(&PathBuf::from(&entry.source), &entry.options);
    }
    // cgroup v2 is all there is; specs ask for it by either name.
    let kind = match entry.kind.as_str() {
        "cgroup" => "cgroup2",
        kind => kind,
    };
    let source = if entry.source.is_empty() {
        kind
    } else {
        &entry.source
    };
    let mut options = entry.options.clone();
    if is_filled(entry) {
        options = options.writable();
    }
    match covered {
        Some(mode) if !options.has_parameter("mode") => {
            let mode = format!("{:o}", mode.as_raw_mode());
            options.parameters.push(("mode".to_owned(), Some(mode)));
        }
        _ => {}
    }
    if kind == "cgroup2" {
        // From the guest's own cgroup namespace a mount sets these for the whole guest, or clears them.
        for flag in ["nsdelegate", "memory_recursiveprot"] {
            options.parameters.push((flag.to_owned(), None));
        }
    }
    mount::filesystem(kind, source, &options)
}

/// Whether the container's files and mount points are made in the new file system.
fn is_filled(entry: &MountPlan) -> bool {
    !entry.options.bind && matches!(entry.kind.as_str(), "tmpfs" | "devtmpfs")
}

/// The mode of the folder that a tmpfs covers, which it takes over as with other runtimes.
fn covered_mode(root: BorrowedFd<'_>, entry: &MountPlan) -> Option<Mode> {
    if entry.kind != "tmpfs" || entry.options.bind {
        return None;
    }
    let folder = mount::open_in_root(root, &entry.destination).ok()?;
    Some(Mode::from_raw_mode(fstat(&folder).ok()?.st_mode))
}

/// A link in place of /proc or /sys would carry the kernel's files past the masks that are laid
/// over them by name (CVE-2019-19921).
fn stays_in_place(root: BorrowedFd<'_>, entry: &MountPlan) -> Result<()> {
    match mount::is_linked(root, &entry.destination) {
        Ok(false) => Ok(()),
        Ok(true) => Err(AgentError::precondition("the mount point is behind a link")),
        Err(error) => Err(AgentError::io("look at the mount point", error)),
    }
}

/// Files of a procfs that other runtimes let mounts cover: what is told there is about the machine
/// and of no weight for the container's walls.
const COVERABLE: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// Refuses to cover a procfs or a part of it by something else: programs would take that for the
/// kernel's words, and write to it what was meant for the kernel (CVE-2019-16884, CVE-2025-52881).
/// Asked of the mount point that was opened, so no link gets past it.
fn may_cover(
    root: BorrowedFd<'_>,
    entry: &MountPlan,
    mount: &OwnedFd,
    destination: &OwnedFd,
) -> Result<()> {
    let is_proc = |file: &OwnedFd| {
        fstatfs(file).is_ok_and(|status| u64::try_from(status.f_type) == Ok(PROC_SUPER_MAGIC))
    };
    if !is_proc(destination) || is_proc(mount) {
        return Ok(());
    }
    let path: PathBuf = Path::new("/")
        .join(&entry.destination)
        .components()
        .collect();
    let named = COVERABLE.iter().any(|file| Path::new(file) == path);
    if named && mount::is_linked(root, &entry.destination) == Ok(false) {
        return Ok(());
    }
    Err(AgentError::invalid(
        "the mount point is part of a proc file system",
    ))
}

const PROC_SUPER_MAGIC: u64 = 0x9fa0;
