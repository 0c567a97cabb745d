// SPDX-License-Identifier: Apache-2.0
//! From the OCI spec to a plan. What the spec asks is in the plan, or the spec is refused with
//! the field's name; nothing is dropped silently. Cgroup limits are `cgroup`'s part.

use std::path::{Component, Path, PathBuf};

use protocols::agent::oci;

use super::capabilities::Sets;
use super::devices::Node;
use super::hooks::Hooks;
use super::plan::{ContainerPlan, MountPlan, Namespace, ProcessPlan, RootfsPlan, WindowSize};
use super::rlimits::Limit;
use super::seccomp::Profile;
use super::sysctl;
use super::user_namespace::Mappings;
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{MountOptions, Propagation};

/// Namespaces that a spec asks to join, with the paths of their files.
pub(crate) type Joins = Vec<(Namespace, PathBuf)>;

/// Checks a container's spec. The plan's joined namespaces are in the order of the paths.
///
/// # Errors
///
/// The first field that is missing, contradictory or not supported.
pub(crate) fn container(spec: &oci::Spec) -> Result<(ContainerPlan, Joins)> {
    let process = required(spec.Process.as_ref(), "process")?;
    let root = required(spec.Root.as_ref(), "root")?;
    let linux = required(spec.Linux.as_ref(), "linux")?;
    refuse_unsupported(spec, linux)?;

    version(&spec.Version)?;
    let (new_namespaces, joins) = namespaces(&linux.Namespaces)?;
    let new_user = new_namespaces.contains(&Namespace::User);
    let joined_user = joins.iter().any(|(kind, _)| *kind == Namespace::User);
    let mappings = Mappings::new(linux, new_user)?;
    let seccomp = linux.Seccomp.as_ref().map(Profile::new).transpose()?;
    let mut process = self::process(process, None)?;
    process.seccomp = seccomp;
    process.user_namespace = new_user || joined_user;
    let plan = ContainerPlan {
        new_namespaces,
        joined_namespaces: joins.iter().map(|(kind, _)| *kind).collect(),
        rootfs: rootfs(spec, root, linux, process.user_namespace)?,
        hostname: Some(spec.Hostname.clone()).filter(|name| !name.is_empty()),
        sysctls: linux
            .Sysctl
            .iter()
            .map(|(name, value)| Ok((sysctl::path(name)?, value.clone())))
            .collect::<Result<_>>()?,
        mappings,
        hooks: Hooks::new(spec)?,
        process,
    };
    Ok((plan, joins))
}

impl ContainerPlan {
    /// Gives the container a new namespace of this kind, unless it joins one.
    pub(crate) fn isolate(&mut self, kind: Namespace) {
        if !self.new_namespaces.contains(&kind) && !self.joined_namespaces.contains(&kind) {
            self.new_namespaces.push(kind);
        }
    }

    /// Makes the container join a namespace of this kind, the last of those to join, unless it
    /// joins one already.
    pub(crate) fn join(&mut self, kind: Namespace) -> bool {
        self.new_namespaces.retain(|new| *new != kind);
        let joins = !self.joined_namespaces.contains(&kind);
        if joins {
            self.joined_namespaces.push(kind);
        }
        joins
    }

    /// Sets the host name of the UTS namespace that this process is in.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn set_hostname(&self) -> Result<()> {
        let Some(name) = &self.hostname else {
            return Ok(());
        };
        rustix::system::sethostname(name.as_bytes()).context(|| format!("set host name {name:?}"))
    }

    /// Whether the container has a host name to set but no namespace to set it in.
    ///
    /// # Errors
    ///
    /// INVALID_ARGUMENT then.
    pub(crate) fn check_hostname(&self) -> Result<()> {
        let uts = Namespace::Uts;
        let isolated = self.new_namespaces.contains(&uts) || self.joined_namespaces.contains(&uts);
        if self.hostname.is_some() && !isolated {
            return Err(AgentError::invalid(
                "hostname: needs a uts namespace of the container",
            ));
        }
        Ok(())
    }
}

/// AppArmor profiles that are nobody's choice.
const DEFAULT_PROFILES: [&str; 4] = [
    "",
    "unconfined",
    "cri-containerd.apparmor.d",
    "docker-default",
];

/// Checks a process. An exec without capabilities or seccomp takes those of the container's own
/// process, `init`.
///
/// # Errors
///
/// The first field that is missing, contradictory or not supported.
pub(crate) fn process(process: &oci::Process, init: Option<&ProcessPlan>) -> Result<ProcessPlan> {
    let user = process.User.get_or_default();
    if !user.Username.is_empty() {
        return Err(AgentError::unsupported(
            "process.user.username: only numeric ids name a user on Linux",
        ));
    }
    // What containerd and Docker put into each specification where the host has AppArmor, nobody has
    // asked for; Kata's runtime passes it on. A profile of somebody's own is asked for.
    if !DEFAULT_PROFILES.contains(&process.ApparmorProfile.as_str()) {
        return Err(AgentError::unsupported(
            "process.apparmorProfile: the guest kernel has no AppArmor",
        ));
    }
    if !process.SelinuxLabel.is_empty() {
        return Err(AgentError::unsupported(
            "process.selinuxLabel: the guest kernel has no SELinux",
        ));
    }
    if process.Args.first().is_none_or(String::is_empty) {
        return Err(AgentError::invalid("process.args: no program to execute"));
    }
    without_nul("process.args", &process.Args)?;
    without_nul("process.env", &process.Env)?;
    if !process.Cwd.starts_with('/') {
        return Err(AgentError::invalid(format!(
            "process.cwd: {:?} is not an absolute path",
            process.Cwd
        )));
    }
    let oom_score_adjust = i16::try_from(process.OOMScoreAdj)
        .ok()
        .filter(|score| (-1000..=1000).contains(score))
        .ok_or_else(|| {
            AgentError::invalid(format!(
                "process.oomScoreAdj: {} is not within -1000..1000",
                process.OOMScoreAdj
            ))
        })?;
    Ok(ProcessPlan {
        arguments: process.Args.clone(),
        environment: process.Env.clone(),
        cwd: PathBuf::from(&process.Cwd),
        uid: user.UID,
        gid: user.GID,
        groups: user.AdditionalGids.clone(),
        capabilities: match (process.Capabilities.as_ref(), init) {
            (Some(capabilities), _) => Sets::new(capabilities)?,
            (None, Some(init)) => init.capabilities,
            (None, None) => Sets::default(),
        },
        limits: Limit::all(&process.Rlimits)?,
        no_new_privileges: process.NoNewPrivileges,
        oom_score_adjust,
        terminal: process
            .Terminal
            .then(|| window_size(process.ConsoleSize.as_ref())),
        seccomp: init.and_then(|init| init.seccomp.clone()),
        user_namespace: init.is_some_and(|init| init.user_namespace),
    })
}

fn window_size(size: Option<&oci::Box>) -> WindowSize {
    let cells = |count| u16::try_from(count).unwrap_or(u16::MAX);
    size.map_or_else(WindowSize::default, |size| WindowSize {
        rows: cells(size.Height),
        columns: cells(size.Width),
    })
}

/// The major version of the specification is a promise of what fields mean.
fn version(version: &str) -> Result<()> {
    let major = version.split('.').next().unwrap_or_default();
    if matches!(major, "" | "1") {
        Ok(())
    } else {
        Err(AgentError::unsupported(format!(
            "ociVersion: {version:?}: only versions 1 are known"
        )))
    }
}

fn rootfs(
    spec: &oci::Spec,
    root: &oci::Root,
    linux: &oci::Linux,
    user_namespace: bool,
) -> Result<RootfsPlan> {
    let path = PathBuf::from(&root.Path);
    if !path.is_absolute() || path == Path::new("/") {
        return Err(AgentError::invalid(format!(
            "root.path: {path:?} is not a folder below /"
        )));
    }
    let propagation = match linux.RootfsPropagation.as_str() {
        "" => None,
        word => Some(Propagation::parse(word).ok_or_else(|| {
            AgentError::invalid(format!("linux.rootfsPropagation: {word:?} is unknown"))
        })?),
    };
    Ok(RootfsPlan {
        path,
        readonly: root.Readonly,
        propagation,
        mounts: spec
            .Mounts
            .iter()
            .map(|entry| mount(entry, user_namespace))
            .collect::<Result<_>>()?,
        devices: linux.Devices.iter().map(Node::new).collect::<Result<_>>()?,
        masked: inside("linux.maskedPaths", &linux.MaskedPaths)?,
        readonly_paths: inside("linux.readonlyPaths", &linux.ReadonlyPaths)?,
    })
}

fn mount(mount: &oci::Mount, user_namespace: bool) -> Result<MountPlan> {
    let destination = PathBuf::from(&mount.destination);
    let wrong =
        |what: &str| AgentError::invalid(format!("mounts: {:?}: {what}", mount.destination));
    let normal = |part| matches!(part, Component::Normal(_));
    if mount.destination.is_empty() || !destination.components().any(normal) {
        return Err(wrong("the destination is not below /"));
    }
    let mut options = MountOptions::parse(&mount.options).map_err(|error| {
        let line = format!("mounts: {:?}: {}", mount.destination, error.line());
        AgentError::new(error.kind(), line)
    })?;
    // "bind" is not a type of file system but the older way to ask for the option.
    options.bind |= mount.type_ == "bind";
    if options.bind && !options.remount && mount.source.is_empty() {
        return Err(wrong("a bind mount needs a source"));
    }
    if !options.bind && !options.remount && mount.type_.is_empty() {
        return Err(wrong("no type"));
    }
    if options.copy_up && (options.bind || mount.type_ != "tmpfs") {
        return Err(wrong("tmpcopyup: only a tmpfs starts with a copy"));
    }
    match options.id_map {
        Some(_) if !options.bind => return Err(wrong("idmap: only a bind mount maps ids")),
        Some(_) if !user_namespace => {
            return Err(wrong(
                "idmap: the container has no user namespace to map by",
            ));
        }
        _ => {}
    }
    Ok(MountPlan {
        destination,
        source: mount.source.clone(),
        kind: mount.type_.clone(),
        options,
    })
}

fn namespaces(wanted: &[oci::LinuxNamespace]) -> Result<(Vec<Namespace>, Joins)> {
    let mut new: Vec<Namespace> = Vec::new();
    let mut joins: Joins = Vec::new();
    for namespace in wanted {
        let kind = match namespace.Type.as_str() {
            "mount" => Namespace::Mount,
            "pid" => Namespace::Pid,
            "ipc" => Namespace::Ipc,
            "uts" => Namespace::Uts,
            "network" => Namespace::Network,
            "cgroup" => Namespace::Cgroup,
            "user" => Namespace::User,
            "time" => Namespace::Time,
            other => {
                return Err(AgentError::unsupported(format!(
                    "linux.namespaces: type {other:?} is not supported"
                )));
            }
        };
        if new.contains(&kind) || joins.iter().any(|(joined, _)| *joined == kind) {
            return Err(AgentError::invalid(format!(
                "linux.namespaces: {:?} appears twice",
                namespace.Type
            )));
        }
        if namespace.Path.is_empty() {
            new.push(kind);
        } else if kind == Namespace::Mount {
            return Err(AgentError::unsupported(
                "linux.namespaces: a mount namespace can't be joined by path",
            ));
        } else {
            joins.push((kind, PathBuf::from(&namespace.Path)));
        }
    }
    if !new.contains(&Namespace::Mount) {
        return Err(AgentError::invalid(
            "linux.namespaces: a container needs a mount namespace",
        ));
    }
    Ok((new, joins))
}

/// Fields that would change what the container is, and that this agent can't honour.
fn refuse_unsupported(spec: &oci::Spec, linux: &oci::Linux) -> Result<()> {
    let rdt = linux.IntelRdt.get_or_default();
    let refused = [
        (spec.Solaris.is_some(), "solaris"),
        (spec.Windows.is_some(), "windows"),
        (!linux.MountLabel.is_empty(), "linux.mountLabel"),
        (!rdt.L3CacheSchema.is_empty(), "linux.intelRdt"),
    ];
    match refused.iter().find(|(asked, _)| *asked) {
        Some((_, field)) => Err(AgentError::unsupported(format!("{field}: not supported"))),
        None => Ok(()),
    }
}

fn inside(field: &str, paths: &[String]) -> Result<Vec<PathBuf>> {
    paths
        .iter()
        .map(|path| {
            if path.starts_with('/') {
                Ok(PathBuf::from(path))
            } else {
                Err(AgentError::invalid(format!(
                    "{field}: {path:?} is not an absolute path"
                )))
            }
        })
        .collect()
}

fn without_nul(field: &str, texts: &[String]) -> Result<()> {
    match texts.iter().find(|text| text.contains('\0')) {
        Some(text) => Err(AgentError::invalid(format!(
            "{field}: {text:?} holds a NUL"
        ))),
        None => Ok(()),
    }
}

fn required<'a, T>(field: Option<&'a T>, name: &str) -> Result<&'a T> {
    field.ok_or_else(|| AgentError::invalid(format!("{name}: missing")))
}

#[cfg(test)]
mod tests;
