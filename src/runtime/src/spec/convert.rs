// SPDX-License-Identifier: Apache-2.0
//! From the specification's types to those of the agent's protocol, field by field.

use protocols::agent::oci;

use super::model;

fn all<From, To: std::convert::From<From>>(values: Vec<From>) -> Vec<To> {
    values.into_iter().map(To::from).collect()
}

impl From<model::Spec> for oci::Spec {
    fn from(spec: model::Spec) -> Self {
        let mut linux = oci::Linux::from(spec.linux);
        if !spec.domainname.is_empty() {
            // The protocol has no field for it; the kernel has a sysctl, a UTS namespace each.
            linux
                .Sysctl
                .insert("kernel.domainname".to_owned(), spec.domainname);
        }
        Self {
            Version: spec.oci_version,
            Process: spec.process.map(Into::into).into(),
            Root: spec.root.map(Into::into).into(),
            Hostname: spec.hostname,
            Mounts: all(spec.mounts),
            Hooks: Some(spec.hooks.into()).into(),
            Annotations: spec.annotations,
            Linux: Some(linux).into(),
            ..Self::default()
        }
    }
}

impl From<model::Process> for oci::Process {
    fn from(process: model::Process) -> Self {
        Self {
            Terminal: process.terminal,
            ConsoleSize: process
                .console_size
                .map(|size| oci::Box {
                    Height: size.height,
                    Width: size.width,
                    ..Default::default()
                })
                .into(),
            User: Some(oci::User {
                UID: process.user.uid,
                GID: process.user.gid,
                AdditionalGids: process.user.additional_gids,
                Username: process.user.username,
                ..Default::default()
            })
            .into(),
            Args: process.args,
            Env: process.env,
            Cwd: process.cwd,
            Capabilities: process
                .capabilities
                .map(|sets| oci::LinuxCapabilities {
                    Bounding: sets.bounding,
                    Effective: sets.effective,
                    Inheritable: sets.inheritable,
                    Permitted: sets.permitted,
                    Ambient: sets.ambient,
                    ..Default::default()
                })
                .into(),
            Rlimits: all(process.rlimits),
            NoNewPrivileges: process.no_new_privileges,
            ApparmorProfile: process.apparmor_profile,
            OOMScoreAdj: process.oom_score_adj.unwrap_or_default(),
            SelinuxLabel: process.selinux_label,
            ..Self::default()
        }
    }
}

impl From<model::Rlimit> for oci::POSIXRlimit {
    fn from(limit: model::Rlimit) -> Self {
        Self {
            Type: limit.kind,
            Hard: limit.hard,
            Soft: limit.soft,
            ..Self::default()
        }
    }
}

impl From<model::Root> for oci::Root {
    fn from(root: model::Root) -> Self {
        Self {
            Path: root.path,
            Readonly: root.readonly,
            ..Self::default()
        }
    }
}

impl From<model::Mount> for oci::Mount {
    fn from(mount: model::Mount) -> Self {
        Self {
            destination: mount.destination,
            source: mount.source,
            type_: mount.kind,
            options: mount.options,
            ..Self::default()
        }
    }
}

impl From<model::Hooks> for oci::Hooks {
    fn from(hooks: model::Hooks) -> Self {
        Self {
            Prestart: all(hooks.prestart),
            Poststart: all(hooks.poststart),
            Poststop: all(hooks.poststop),
            CreateRuntime: all(hooks.create_runtime),
            CreateContainer: all(hooks.create_container),
            StartContainer: all(hooks.start_container),
            ..Self::default()
        }
    }
}

impl From<model::Hook> for oci::Hook {
    fn from(hook: model::Hook) -> Self {
        Self {
            Path: hook.path,
            Args: hook.args,
            Env: hook.env,
            Timeout: hook.timeout,
            ..Self::default()
        }
    }
}

impl From<model::Linux> for oci::Linux {
    fn from(linux: model::Linux) -> Self {
        Self {
            UIDMappings: all(linux.uid_mappings),
            GIDMappings: all(linux.gid_mappings),
            Sysctl: linux.sysctl,
            Resources: linux.resources.map(Into::into).into(),
            CgroupsPath: linux.cgroups_path,
            Namespaces: all(linux.namespaces),
            Devices: all(linux.devices),
            Seccomp: linux.seccomp.map(Into::into).into(),
            RootfsPropagation: linux.rootfs_propagation,
            MaskedPaths: linux.masked_paths,
            ReadonlyPaths: linux.readonly_paths,
            MountLabel: linux.mount_label,
            ..Self::default()
        }
    }
}

impl From<model::IdMapping> for oci::LinuxIDMapping {
    fn from(mapping: model::IdMapping) -> Self {
        Self {
            HostID: mapping.host_id,
            ContainerID: mapping.container_id,
            Size: mapping.size,
            ..Self::default()
        }
    }
}

impl From<model::Namespace> for oci::LinuxNamespace {
    fn from(namespace: model::Namespace) -> Self {
        Self {
            Type: namespace.kind,
            Path: namespace.path,
            ..Self::default()
        }
    }
}

impl From<model::Device> for oci::LinuxDevice {
    fn from(device: model::Device) -> Self {
        Self {
            Path: device.path,
            Type: device.kind,
            Major: device.major,
            Minor: device.minor,
            // The specification leaves the mode to the runtime; as with runc.
            FileMode: device.file_mode.unwrap_or(0o666),
            UID: device.uid,
            GID: device.gid,
            ..Self::default()
        }
    }
}

impl From<model::Resources> for oci::LinuxResources {
    fn from(resources: model::Resources) -> Self {
        Self {
            Devices: all(resources.devices),
            Memory: resources.memory.map(Into::into).into(),
            CPU: resources.cpu.map(Into::into).into(),
            Pids: resources
                .pids
                .map(|pids| oci::LinuxPids {
                    Limit: pids.limit,
                    ..Default::default()
                })
                .into(),
            BlockIO: resources
                .block_io
                .map(|block| oci::LinuxBlockIO {
                    Weight: block.weight.unwrap_or_default().into(),
                    LeafWeight: block.leaf_weight.unwrap_or_default().into(),
                    ..Default::default()
                })
                .into(),
            HugepageLimits: resources
                .hugepage_limits
                .into_iter()
                .map(|limit| oci::LinuxHugepageLimit {
                    Pagesize: limit.page_size,
                    Limit: limit.limit,
                    ..Default::default()
                })
                .collect(),
            ..Self::default()
        }
    }
}

impl From<model::DeviceRule> for oci::LinuxDeviceCgroup {
    fn from(rule: model::DeviceRule) -> Self {
        // The protocol has no "any": -1 stands for it, as in the kernel's own tools.
        Self {
            Allow: rule.allow,
            Type: if rule.kind.is_empty() {
                "a".to_owned()
            } else {
                rule.kind
            },
            Major: rule.major.unwrap_or(-1),
            Minor: rule.minor.unwrap_or(-1),
            Access: rule.access,
            ..Self::default()
        }
    }
}

impl From<model::Memory> for oci::LinuxMemory {
    fn from(memory: model::Memory) -> Self {
        Self {
            Limit: memory.limit.unwrap_or_default(),
            Reservation: memory.reservation.unwrap_or_default(),
            Swap: memory.swap.unwrap_or_default(),
            Kernel: memory.kernel.unwrap_or_default(),
            KernelTCP: memory.kernel_tcp.unwrap_or_default(),
            Swappiness: memory.swappiness.unwrap_or_default(),
            DisableOOMKiller: memory.disable_oom_killer,
            ..Self::default()
        }
    }
}

impl From<model::Cpu> for oci::LinuxCPU {
    fn from(cpu: model::Cpu) -> Self {
        Self {
            Shares: cpu.shares.unwrap_or_default(),
            Quota: cpu.quota.unwrap_or_default(),
            Period: cpu.period.unwrap_or_default(),
            RealtimeRuntime: cpu.realtime_runtime.unwrap_or_default(),
            RealtimePeriod: cpu.realtime_period.unwrap_or_default(),
            Cpus: cpu.cpus,
            Mems: cpu.mems,
            ..Self::default()
        }
    }
}

impl From<model::Seccomp> for oci::LinuxSeccomp {
    fn from(seccomp: model::Seccomp) -> Self {
        Self {
            DefaultAction: seccomp.default_action,
            Architectures: seccomp.architectures,
            Flags: seccomp.flags,
            Syscalls: all(seccomp.syscalls),
            ..Self::default()
        }
    }
}

impl From<model::Syscall> for oci::LinuxSyscall {
    fn from(syscall: model::Syscall) -> Self {
        Self {
            Names: syscall.names,
            Action: syscall.action,
            ErrnoRet: syscall
                .errno_ret
                .map(oci::linux_syscall::ErrnoRet::Errnoret),
            Args: syscall
                .args
                .into_iter()
                .map(|argument| oci::LinuxSeccompArg {
                    Index: argument.index,
                    Value: argument.value,
                    ValueTwo: argument.value_two,
                    Op: argument.op,
                    ..Default::default()
                })
                .collect(),
            ..Self::default()
        }
    }
}
