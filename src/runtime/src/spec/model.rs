// SPDX-License-Identifier: Apache-2.0
//! The OCI runtime specification (1.2, `config.json`), as far as it can be carried to the guest.
//!
//! The types hold what has a place in the agent's protocol, and refuse everything else: a field
//! that isn't here, of this version of the specification or a later one, is an error that names
//! it. So nothing that a user asked for is ever dropped unseen.

use std::collections::HashMap;

use serde::{Deserialize, Deserializer};

/// Reads `null` as empty: Go writes an empty list either way.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

macro_rules! model {
    ($($(#[$attribute:meta])* $name:ident { $($(#[$field_attribute:meta])* $field:ident: $type:ty),+ $(,)? })+) => {
        $($(#[$attribute])*
        #[derive(Debug, Default, Clone, PartialEq, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        pub(crate) struct $name {
            $($(#[$field_attribute])*
            #[serde(default, deserialize_with = "or_default")]
            pub(crate) $field: $type,)+
        })+
    };
}

model! {
    Spec {
        oci_version: String,
        process: Option<Process>,
        root: Option<Root>,
        hostname: String,
        domainname: String,
        mounts: Vec<Mount>,
        hooks: Hooks,
        annotations: HashMap<String, String>,
        linux: Linux,
    }
    Process {
        terminal: bool,
        console_size: Option<ConsoleSize>,
        user: User,
        args: Vec<String>,
        env: Vec<String>,
        cwd: String,
        capabilities: Option<Capabilities>,
        rlimits: Vec<Rlimit>,
        no_new_privileges: bool,
        apparmor_profile: String,
        oom_score_adj: Option<i64>,
        selinux_label: String,
    }
    ConsoleSize { height: u32, width: u32 }
    User { uid: u32, gid: u32, additional_gids: Vec<u32>, username: String }
    Capabilities {
        bounding: Vec<String>,
        effective: Vec<String>,
        inheritable: Vec<String>,
        permitted: Vec<String>,
        ambient: Vec<String>,
    }
    Rlimit { #[serde(rename = "type")] kind: String, hard: u64, soft: u64 }
    Root { path: String, readonly: bool }
    Mount {
        destination: String,
        source: String,
        #[serde(rename = "type")]
        kind: String,
        options: Vec<String>,
    }
    Hooks {
        prestart: Vec<Hook>,
        create_runtime: Vec<Hook>,
        create_container: Vec<Hook>,
        start_container: Vec<Hook>,
        poststart: Vec<Hook>,
        poststop: Vec<Hook>,
    }
    Hook { path: String, args: Vec<String>, env: Vec<String>, timeout: i64 }
    Linux {
        uid_mappings: Vec<IdMapping>,
        gid_mappings: Vec<IdMapping>,
        sysctl: HashMap<String, String>,
        resources: Option<Resources>,
        cgroups_path: String,
        namespaces: Vec<Namespace>,
        devices: Vec<Device>,
        seccomp: Option<Seccomp>,
        rootfs_propagation: String,
        masked_paths: Vec<String>,
        readonly_paths: Vec<String>,
        mount_label: String,
    }
    IdMapping {
        #[serde(rename = "containerID")]
        container_id: u32,
        #[serde(rename = "hostID")]
        host_id: u32,
        size: u32,
    }
    Namespace { #[serde(rename = "type")] kind: String, path: String }
    Device {
        path: String,
        #[serde(rename = "type")]
        kind: String,
        major: i64,
        minor: i64,
        file_mode: Option<u32>,
        uid: u32,
        gid: u32,
    }
    Resources {
        devices: Vec<DeviceRule>,
        memory: Option<Memory>,
        cpu: Option<Cpu>,
        pids: Option<Pids>,
        #[serde(rename = "blockIO")]
        block_io: Option<BlockIo>,
        hugepage_limits: Vec<HugepageLimit>,
    }
    DeviceRule {
        allow: bool,
        #[serde(rename = "type")]
        kind: String,
        major: Option<i64>,
        minor: Option<i64>,
        access: String,
    }
    Memory {
        limit: Option<i64>,
        reservation: Option<i64>,
        swap: Option<i64>,
        kernel: Option<i64>,
        #[serde(rename = "kernelTCP")]
        kernel_tcp: Option<i64>,
        swappiness: Option<u64>,
        #[serde(rename = "disableOOMKiller")]
        disable_oom_killer: bool,
    }
    Cpu {
        shares: Option<u64>,
        quota: Option<i64>,
        period: Option<u64>,
        realtime_runtime: Option<i64>,
        realtime_period: Option<u64>,
        cpus: String,
        mems: String,
    }
    Pids { limit: i64 }
    /// Weights only: the rest names devices of the host.
    BlockIo { weight: Option<u16>, leaf_weight: Option<u16> }
    HugepageLimit { page_size: String, limit: u64 }
    Seccomp {
        default_action: String,
        default_errno_ret: Option<u32>,
        architectures: Vec<String>,
        flags: Vec<String>,
        syscalls: Vec<Syscall>,
    }
    Syscall {
        names: Vec<String>,
        action: String,
        errno_ret: Option<u32>,
        args: Vec<SyscallArgument>,
    }
    SyscallArgument { index: u64, value: u64, value_two: u64, op: String }
}

impl Mount {
    /// Whether it binds a file or folder that exists.
    pub(crate) fn is_bind(&self) -> bool {
        let mut options = self.options.iter();
        self.kind == "bind" || options.any(|option| option == "bind" || option == "rbind")
    }
}
