// SPDX-License-Identifier: Apache-2.0
//! User namespaces: made and mapped by the helper, which keeps the guest's own rights for the
//! mounts that only those can make, and enters last. What is cloned then belongs to the namespace.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use protocols::agent::oci;
use rustix::fs::{CWD, Mode, OFlags, fchmod, openat};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::devices::{self, Node};
use super::plan::{ContainerPlan, MountPlan, Namespace};
use super::rootfs;
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};
use crate::sys;
use crate::sys::clone::{Holder, SingleThreaded};

/// Ids of the container as ids of the guest.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Mappings {
    uids: Vec<Mapping>,
    gids: Vec<Mapping>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Mapping {
    container: u32,
    guest: u32,
    size: u32,
}

impl Mappings {
    /// The mappings of a new user namespace; `None` when the spec wants none.
    ///
    /// # Errors
    ///
    /// Mappings without a new user namespace or a namespace without, and ones without root, who
    /// makes the container.
    pub(crate) fn new(linux: &oci::Linux, new: bool) -> Result<Option<Self>> {
        let map = |field: &str, mappings: &[oci::LinuxIDMapping]| -> Result<Vec<Mapping>> {
            let mappings: Vec<Mapping> = mappings
                .iter()
                .map(|mapping| Mapping {
                    container: mapping.ContainerID,
                    guest: mapping.HostID,
                    size: mapping.Size,
                })
                .collect();
            let wrong = |what: &str| AgentError::invalid(format!("linux.{field}: {what}"));
            match (new, mappings.is_empty()) {
                (false, true) => Ok(mappings),
                (false, false) => Err(wrong("needs a new user namespace of the container")),
                (true, true) => Err(wrong("a new user namespace needs mappings")),
                (true, false) if guest_id(&mappings, 0).is_none() => {
                    Err(wrong("id 0 of the container is not mapped"))
                }
                (true, false) => Ok(mappings),
            }
        };
        let uids = map("uidMappings", &linux.UIDMappings)?;
        let gids = map("gidMappings", &linux.GIDMappings)?;
        Ok(new.then_some(Self { uids, gids }))
    }

    /// The guest's ids for a user and group of the container.
    fn guest(&self, uid: u32, gid: u32) -> Option<(u32, u32)> {
        guest_id(&self.uids, uid).zip(guest_id(&self.gids, gid))
    }
}

fn guest_id(mappings: &[Mapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container)?;
        (offset < mapping.size)
            .then(|| mapping.guest.checked_add(offset))
            .flatten()
    })
}

/// As the kernel wants it in `uid_map` and `gid_map` (user_namespaces(7)).
fn words(mappings: &[Mapping]) -> String {
    let line =
        |mapping: &Mapping| format!("{} {} {}\n", mapping.container, mapping.guest, mapping.size);
    mappings.iter().map(line).collect()
}

/// What only the guest's own root can make for a container.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// Detached, by the position of the plan's mounts.
    pub(super) mounts: Vec<Option<OwnedFd>>,
    /// Device nodes, each a detached mount. A user namespace can't make any.
    pub(super) nodes: Option<Vec<(Node, OwnedFd)>>,
}

/// Makes the user namespace of the plan, or takes the one to join; prepares what needs the guest's
/// rights, and enters.
///
/// # Errors
///
/// The first step that failed.
pub(super) fn enter(
    proof: &SingleThreaded,
    plan: &ContainerPlan,
    joined: Option<BorrowedFd<'_>>,
) -> Result<Prepared> {
    let made;
    let namespace = match (&plan.mappings, joined) {
        (Some(mappings), _) => {
            made = make(proof, mappings)?;
            made.as_fd()
        }
        (None, Some(joined)) => joined,
        (None, None) => return Ok(Prepared::default()),
    };
    let mut prepared = Prepared::default();
    for entry in &plan.rootfs.mounts {
        let mount = prepare(plan, entry, namespace).map_err(|error| entry.failed(&error))?;
        prepared.mounts.push(mount);
    }
    prepared.nodes = Some(nodes(plan)?);
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::User))
        .context(|| "enter the user namespace")?;
    Ok(prepared)
}

/// Lets the container open its standard streams again, as /dev/stdout: their pipes are the guest
/// root's, and only who may look into the process finds them.
pub(super) fn open_streams(streams: &[OwnedFd]) {
    for stream in streams {
        // Not all files have modes.
        let _ = fchmod(stream, Mode::from_raw_mode(0o666));
    }
}

fn make(proof: &SingleThreaded, mappings: &Mappings) -> Result<OwnedFd> {
    let holder =
        Holder::clone(proof, Namespace::User.flag()).context(|| "make a user namespace")?;
    let path = |name: &str| format!("/proc/{}/{name}", holder.pid());
    for (file, field, map) in [
        ("uid_map", "uidMappings", &mappings.uids),
        ("gid_map", "gidMappings", &mappings.gids),
    ] {
        fs::write(path(file), words(map)).map_err(|error| {
            AgentError::invalid(format!(
                "linux.{field}: {:?}: {}",
                words(map).trim_end(),
                AgentError::io("the kernel refuses", error).line()
            ))
        })?;
    }
    openat(
        CWD,
        path("ns/user"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "open the user namespace")
}

/// Binds: their sources may lie where the container's root may not look, and only the guest's root
/// maps ids. Views of a namespace that isn't the container's own: the namespace's owner decides.
fn prepare(
    plan: &ContainerPlan,
    entry: &MountPlan,
    namespace: BorrowedFd<'_>,
) -> Result<Option<OwnedFd>> {
    if entry.options.remount {
        return Ok(None);
    }
    let shared = |kind| !plan.new_namespaces.contains(&kind);
    let wanted = entry.options.bind
        || match entry.kind.as_str() {
            "mqueue" => shared(Namespace::Ipc),
            "sysfs" => shared(Namespace::Network),
            "cgroup" | "cgroup2" => shared(Namespace::Cgroup),
            _ => false,
        };
    if !wanted {
        return Ok(None);
    }
    let mount = rootfs::make(entry, None)?;
    mount::map_ids(&mount, &entry.options, namespace)?;
    Ok(Some(mount))
}

/// Covered by a file system for the nodes, for a moment, in a mount namespace of the helper's own.
const PLACE: &str = "/tmp";

fn nodes(plan: &ContainerPlan) -> Result<Vec<(Node, OwnedFd)>> {
    sys::process::new_mount_namespace().context(|| "make a mount namespace")?;
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(|| "leave the propagation of mounts")?;
    let options = MountOptions::parse(&["nosuid", "noexec", "mode=755"])?;
    let folder = mount::filesystem("tmpfs", "devices", &options)?;
    let place = mount::create_beneath(PLACE.as_ref(), Target::Directory).context(|| PLACE)?;
    mount::attach(&folder, place.as_fd(), &options)?;
    let mut mounts = Vec::new();
    for (index, node) in devices::all(&plan.rootfs.devices).enumerate() {
        let name = index.to_string();
        let (uid, gid) = node.owner();
        let owner = match &plan.mappings {
            Some(mappings) => mappings.guest(uid, gid),
            None => Some((uid, gid)),
        };
        let Some(owner) = owner else {
            return Err(AgentError::invalid(format!(
                "linux.devices: {:?}: its owner is not mapped",
                node.path()
            )));
        };
        devices::make(&folder, &name, &node, owner)?;
        let file = openat(
            &folder,
            &name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(|| format!("device {:?}", node.path()))?;
        let mount = mount::clone_mount(file.as_fd(), false)
            .context(|| format!("device {:?}", node.path()))?;
        mounts.push((node, mount));
    }
    mount::detach(PLACE.as_ref())?;
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(uids: &[(u32, u32, u32)]) -> oci::Linux {
        let mapping = |&(container, guest, size): &(u32, u32, u32)| oci::LinuxIDMapping {
            ContainerID: container,
            HostID: guest,
            Size: size,
            ..oci::LinuxIDMapping::default()
        };
        let mappings: Vec<_> = uids.iter().map(mapping).collect();
        oci::Linux {
            UIDMappings: mappings.clone(),
            GIDMappings: mappings,
            ..oci::Linux::default()
        }
    }

    #[test]
    fn mappings_and_namespace_go_together() {
        assert_eq!(Mappings::new(&linux(&[]), false).unwrap(), None);
        Mappings::new(&linux(&[]), true).unwrap_err();
        Mappings::new(&linux(&[(0, 1000, 10)]), false).unwrap_err();
        let error = Mappings::new(&linux(&[(1, 1000, 10)]), true).unwrap_err();
        assert!(error.line().contains("id 0"));
    }

    #[test]
    fn ids_are_the_guests() {
        let linux = linux(&[(0, 1000, 10), (10, 5000, 2)]);
        let mappings = Mappings::new(&linux, true).unwrap().unwrap();
        assert_eq!(mappings.guest(0, 11), Some((1000, 5001)));
        assert_eq!(mappings.guest(12, 0), None);
        assert_eq!(words(&mappings.uids), "0 1000 10\n10 5000 2\n");
        let over = [Mapping {
            container: 0,
            guest: u32::MAX,
            size: 2,
        }];
        assert_eq!(guest_id(&over, 1), None);
    }
}
