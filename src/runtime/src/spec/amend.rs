// SPDX-License-Identifier: Apache-2.0
//! What changes in a specification when its container lives in a guest: names of things on the
//! host are replaced by the guest's, or refused.

use std::collections::HashMap;
use std::fs;
use std::mem;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::makedev;
use tracing::{debug, warn};

use super::model::{Device, Hooks, Mount, Namespace, Process, Resources, Seccomp, Spec};
use crate::error::{Kind, Result, ShimError};
use crate::mount::Tree;
use crate::sandbox::check_nodes;

/// File systems that a guest mounts as the specification says. All are the kernel's own; any
/// other would be made from something of the host.
const GUEST_FILESYSTEMS: [&str; 7] = [
    "cgroup", "cgroup2", "devpts", "mqueue", "proc", "sysfs", "tmpfs",
];

/// Character devices that are the same in every Linux (Documentation/admin-guide/devices.txt).
const COMMON_DEVICES: [(i64, i64); 10] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
];

/// A bind mount of something on the host, to be shared with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Bind {
    /// Position among the specification's mounts.
    pub(crate) mount: usize,
    pub(crate) source: PathBuf,
    /// Device and inode of what is there, once it has been looked at.
    pub(crate) file: Option<(u64, u64)>,
    pub(crate) tree: Tree,
    /// Which mounts of the tree are read-only.
    pub(crate) read_only: Option<Tree>,
    /// What the host mounts in it later stays out.
    pub(crate) private: bool,
    /// Whether the guest may trust for a moment what it has seen of it.
    pub(crate) cached: bool,
}

/// A block device of the host, to be plugged into the machine. The agent puts the guest's numbers
/// in place of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// In the container.
    pub(crate) path: String,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) read_only: bool,
}

/// Where a container lives in its guest.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    /// Its root file system.
    pub(crate) rootfs: &'a str,
    /// Whether its seccomp profile is applied.
    pub(crate) seccomp: bool,
    /// The pod, for a container of one.
    pub(crate) pod: Option<Pod<'a>>,
}

/// A container's pod.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pod<'a> {
    pub(crate) id: &'a str,
    /// The process of the host that was reported for the pod's sandbox container.
    pub(crate) pid: u32,
    /// Kernel parameters of its namespaces.
    pub(crate) sysctls: &'a HashMap<String, String>,
    /// Its shared memory in the guest.
    pub(crate) shm: &'a str,
}

/// What is left for the caller to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Amended {
    /// Bind mounts, to share; their sources are to be replaced then.
    pub(crate) binds: Vec<Bind>,
    /// Block devices, to plug in.
    pub(crate) block_devices: Vec<BlockDevice>,
    /// The container joins the pod's processes.
    pub(crate) shares_pids: bool,
    /// CPUs of the host that it may run on, if it says; a list as in its specification.
    pub(crate) cpus: String,
}

/// Amends all but the sources of bind mounts.
pub(crate) fn amend(spec: &mut Spec, place: &Place<'_>) -> Result<Amended> {
    match &mut spec.root {
        Some(root) => place.rootfs.clone_into(&mut root.path),
        None => return Err(refused("root", "missing")),
    }
    match &mut spec.process {
        Some(process) => amend_process(process)?,
        None => return Err(refused("process", "missing")),
    }
    hooks(&spec.hooks)?;
    // What is left runs on the host, but for programs of the container itself.
    spec.hooks = Hooks {
        start_container: mem::take(&mut spec.hooks.start_container),
        ..Hooks::default()
    };
    let linux = &mut spec.linux;
    if !linux.mount_label.is_empty() {
        debug!(
            label = linux.mount_label,
            "the guest has no SELinux: mount label dropped"
        );
        linux.mount_label.clear();
    }
    let (namespaces, shares_pids) = namespaces(mem::take(&mut linux.namespaces), place.pod)?;
    linux.namespaces = namespaces;
    for (name, value) in place.pod.iter().flat_map(|pod| pod.sysctls) {
        // Set once a container: the namespaces are the pod's, and the value is the same.
        linux
            .sysctl
            .entry(name.clone())
            .or_insert_with(|| value.clone());
    }
    linux.cgroups_path = guest_cgroup(&linux.cgroups_path);
    let devices = mem::take(&mut linux.devices);
    let resources = linux.resources.as_ref();
    let (devices, block_devices) = self::devices(devices, resources, is_at_its_path)?;
    linux.devices = devices;
    let cpus = match &mut linux.resources {
        Some(resources) => take_cpus(resources)?,
        None => String::new(),
    };
    match &linux.seccomp {
        Some(profile) if place.seccomp => self::seccomp(profile)?,
        Some(_) => {
            warn!("seccomp profile dropped: the configuration says disable_guest_seccomp");
            linux.seccomp = None;
        }
        None => {}
    }
    let mut binds = Vec::new();
    for (index, mount) in spec.mounts.iter_mut().enumerate() {
        match place.pod.filter(|pod| pod.owns_shm(mount)) {
            Some(pod) => pod.shm.clone_into(&mut mount.source),
            None => binds.extend(bind(index, mount)?),
        }
    }
    Ok(Amended {
        binds,
        block_devices,
        shares_pids,
        cpus,
    })
}

impl Pod<'_> {
    /// Whether a mount is the pod's shared memory: the host's own, or what containerd and CRI-O
    /// make, in a folder named by the pod. Anything else there is a volume.
    fn owns_shm(self, mount: &Mount) -> bool {
        let source = Path::new(&mount.source);
        let named = |folder: &Path| folder.iter().any(|name| name == self.id);
        mount.destination == "/dev/shm"
            && mount.is_bind()
            && (source == Path::new("/dev/shm")
                || source.ends_with("shm") && source.parent().is_some_and(named))
    }
}

/// Amends a process: the container's own, or an exec's.
pub(crate) fn amend_process(process: &mut Process) -> Result<()> {
    // To the kernel, an id of -1 means "leave it": it would be root's.
    let user = &process.user;
    let ids = [user.uid, user.gid];
    if ids
        .iter()
        .chain(&user.additional_gids)
        .any(|&id| id == u32::MAX)
    {
        return Err(refused("process.user", "4294967295 is nobody's id"));
    }
    // Security modules are the host kernel's, which never sees the process. containerd names its
    // default AppArmor profile wherever the host has AppArmor; on a host without, the same
    // container runs without. The guest's kernel is such a host, with a machine around it.
    if !process.apparmor_profile.is_empty() {
        debug!(
            profile = process.apparmor_profile,
            "the guest has no AppArmor: profile dropped"
        );
        process.apparmor_profile.clear();
    }
    if !process.selinux_label.is_empty() {
        debug!(
            label = process.selinux_label,
            "the guest has no SELinux: label dropped"
        );
        process.selinux_label.clear();
    }
    // A name has a meaning in Windows only.
    process.user.username.clear();
    Ok(())
}

/// CPUs and memory nodes are numbered by the host: the machine is held to the CPUs, not the
/// container in it.
pub(crate) fn take_cpus(resources: &mut Resources) -> Result<String> {
    let Some(cpu) = &mut resources.cpu else {
        return Ok(String::new());
    };
    check_nodes(&mem::take(&mut cpu.mems))?;
    Ok(mem::take(&mut cpu.cpus))
}

/// Most hooks run on the host, which the runtime sees to; `startContainer`'s are programs of the
/// container, which the agent runs. Others run a program of the host in the container's namespaces,
/// where it isn't. A runtime that doesn't run one must not run the container either.
fn hooks(hooks: &Hooks) -> Result<()> {
    if hooks.create_container.is_empty() {
        return Ok(());
    }
    Err(refused(
        "hooks.createContainer",
        "a program of the host can't run in the guest",
    ))
}

/// A namespace of the host can't be joined. The ones that a pod shares are shared by the machine
/// itself: a path there asks for what is the case anyway. The pod's processes are named by the
/// process that was reported for its sandbox container.
fn namespaces(namespaces: Vec<Namespace>, pod: Option<Pod<'_>>) -> Result<(Vec<Namespace>, bool)> {
    let mut kept = Vec::new();
    let mut shares_pids = false;
    for mut namespace in namespaces {
        match (namespace.kind.as_str(), namespace.path.is_empty()) {
            (_, true) => kept.push(namespace),
            // The guest's own network, IPC and host name are the pod's.
            ("network" | "ipc" | "uts", false) => {
                debug!(
                    kind = namespace.kind,
                    path = namespace.path,
                    "shared by the machine"
                );
            }
            ("pid", false) if pod.is_some_and(|pod| namespace.path == pod.pids()) => {
                // Made new for the first of them, joined by the others: the agent's business.
                namespace.path.clear();
                kept.push(namespace);
                shares_pids = true;
            }
            ("pid", false) if pod.is_some() => {
                return Err(refused(
                    "linux.namespaces: pid",
                    &format!(
                        "{}: of a pod's containers, either all share their processes or none; \
                         one can't join another's",
                        namespace.path
                    ),
                ));
            }
            (kind, false) => {
                return Err(refused(
                    &format!("linux.namespaces: {kind}"),
                    &format!("{} is a namespace of the host", namespace.path),
                ));
            }
        }
    }
    Ok((kept, shares_pids))
}

impl Pod<'_> {
    fn pids(self) -> String {
        format!("/proc/{}/ns/pid", self.pid)
    }
}

/// The guest's cgroup: the same path, with systemd's `slice:prefix:name` as a path too.
fn guest_cgroup(path: &str) -> String {
    match *path.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] => format!("/{slice}/{prefix}-{name}"),
        _ => path.to_owned(),
    }
}

/// Device nodes that mean in the guest what they mean on the host, and block devices, which can be
/// plugged in. Any other device that was asked for by name is refused. A privileged container gets
/// a list of all that the host has, which asks for every device of its machine: that is the guest,
/// with none of those. The list has each device `at_its_path` on the host; a block device at
/// another path is one that somebody asked for.
pub(super) fn devices(
    devices: Vec<Device>,
    resources: Option<&Resources>,
    at_its_path: impl Fn(&Device) -> bool,
) -> Result<(Vec<Device>, Vec<BlockDevice>)> {
    let privileged = resources.is_some_and(allows_all_devices);
    let (mut kept, mut disks, mut dropped) = (Vec::new(), Vec::new(), 0_usize);
    for device in devices {
        if is_common(&device) {
            kept.push(device);
        } else if device.kind == "b" && !(privileged && at_its_path(&device)) {
            disks.push(block_device(&device, resources)?);
            kept.push(device);
        } else if privileged {
            dropped = dropped.saturating_add(1);
        } else {
            return Err(refused(
                &format!("linux.devices: {}", device.path),
                "a device of the host can't be used in the guest",
            ));
        }
    }
    if dropped > 0 {
        warn!(
            count = dropped,
            "privileged: devices of the host are not in the guest"
        );
    }
    Ok((kept, disks))
}

fn block_device(device: &Device, resources: Option<&Resources>) -> Result<BlockDevice> {
    let number = |number: i64| {
        u32::try_from(number).map_err(|_| {
            let field = format!("linux.devices: {}", device.path);
            refused(&field, &format!("{number} is no number of a device"))
        })
    };
    let allows = |access| resources.is_some_and(|it| allows(it, device, access));
    Ok(BlockDevice {
        path: device.path.clone(),
        major: number(device.major)?,
        minor: number(device.minor)?,
        read_only: allows('r') && !allows('w'),
    })
}

/// Whether the device rules allow an access: the last rule about it decides.
fn allows(resources: &Resources, device: &Device, access: char) -> bool {
    let is = |wanted: Option<i64>, number: i64| {
        wanted.is_none_or(|wanted| wanted < 0 || wanted == number)
    };
    let mut rules = resources.devices.iter().rev();
    let rule = rules.find(|rule| {
        let everything = matches!(rule.kind.as_str(), "" | "a");
        let this = rule.kind == device.kind
            && is(rule.major, device.major)
            && is(rule.minor, device.minor);
        (everything || this) && (rule.access.is_empty() || rule.access.contains(access))
    });
    rule.is_some_and(|rule| rule.allow)
}

/// Whether the host has this very device at the path that it has in the container.
fn is_at_its_path(device: &Device) -> bool {
    let number = u32::try_from(device.major)
        .ok()
        .zip(u32::try_from(device.minor).ok())
        .map(|(major, minor)| makedev(major, minor));
    fs::metadata(&device.path)
        .is_ok_and(|found| found.file_type().is_block_device() && Some(found.rdev()) == number)
}

fn is_common(device: &Device) -> bool {
    match device.kind.as_str() {
        "c" | "u" => COMMON_DEVICES.contains(&(device.major, device.minor)),
        // A named pipe is nobody's hardware.
        kind => kind == "p",
    }
}

/// Whether the last word of the device rules is to allow everything.
fn allows_all_devices(resources: &Resources) -> bool {
    resources.devices.last().is_some_and(|rule| {
        rule.allow
            && matches!(rule.kind.as_str(), "" | "a")
            && rule.major.is_none_or(|major| major < 0)
            && rule.minor.is_none_or(|minor| minor < 0)
    })
}

/// The protocol carries no `defaultErrnoRet`; EPERM is what a filter returns without.
fn seccomp(profile: &Seccomp) -> Result<()> {
    const EPERM: u32 = 1;
    match profile.default_errno_ret {
        None | Some(EPERM) => Ok(()),
        Some(other) => Err(refused(
            "linux.seccomp.defaultErrnoRet",
            &format!("{other} can't be carried to the guest"),
        )),
    }
}

fn bind(index: usize, mount: &Mount) -> Result<Option<Bind>> {
    let has = |word: &str| mount.options.iter().any(|option| option == word);
    let name = || format!("mounts: {}", mount.destination);
    if !mount.is_bind() {
        if GUEST_FILESYSTEMS.contains(&mount.kind.as_str()) {
            return Ok(None);
        }
        return Err(refused(
            &name(),
            &format!("file system {:?} can't be mounted in the guest", mount.kind),
        ));
    }
    let source = PathBuf::from(&mount.source);
    if !source.is_absolute() {
        return Err(refused(
            &name(),
            &format!("source {:?} is not absolute", mount.source),
        ));
    }
    let kernels = ["/proc", "/sys", "/dev"]
        .iter()
        .any(|folder| source.starts_with(folder));
    if kernels && !source.starts_with(Path::new("/dev/shm")) {
        return Err(refused(
            &name(),
            &format!("{} belongs to the host's kernel", mount.source),
        ));
    }
    if has("shared") || has("rshared") {
        return Err(refused(
            &name(),
            "what is mounted in the guest can't be mounted on the host: propagation must be private \
             or slave",
        ));
    }
    Ok(Some(Bind {
        private: has("private") || has("rprivate"),
        cached: true,
        mount: index,
        source,
        file: None,
        tree: if has("rbind") {
            Tree::Recursive
        } else {
            Tree::Single
        },
        read_only: match (has("ro"), has("rro")) {
            (_, true) => Some(Tree::Recursive),
            (true, false) => Some(Tree::Single),
            (false, false) => None,
        },
    }))
}

fn refused(field: &str, reason: &str) -> ShimError {
    ShimError::new(
        Kind::InvalidArgument,
        format!("config.json: {field}: {reason}"),
    )
}
