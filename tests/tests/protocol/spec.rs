// SPDX-License-Identifier: Apache-2.0
//! Specifications of containers, as containerd makes them by default.

use protobuf::MessageField;
use protocols::agent::oci;

pub(crate) fn texts(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

pub(crate) fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.to_owned(),
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: texts(options),
        ..oci::Mount::default()
    }
}

/// A process of root's with the rights that the suite's scripts use.
pub(crate) fn process(args: &[&str]) -> oci::Process {
    let rights = texts(&[
        "CAP_DAC_OVERRIDE",
        "CAP_KILL",
        "CAP_NET_ADMIN",
        "CAP_NET_RAW",
        "CAP_SYS_PTRACE",
    ]);
    oci::Process {
        Args: texts(args),
        Env: texts(&["PATH=/bin"]),
        Cwd: "/".to_owned(),
        User: MessageField::some(oci::User::default()),
        Capabilities: MessageField::some(oci::LinuxCapabilities {
            Bounding: rights.clone(),
            Effective: rights.clone(),
            Permitted: rights,
            ..oci::LinuxCapabilities::default()
        }),
        NoNewPrivileges: true,
        ..oci::Process::default()
    }
}

/// A container with the root `root`, a path of the guest's.
pub(crate) fn of(root: &str, args: &[&str]) -> oci::Spec {
    let namespace = |kind: &str| oci::LinuxNamespace {
        Type: kind.to_owned(),
        ..oci::LinuxNamespace::default()
    };
    let strict = ["nosuid", "noexec", "nodev"];
    oci::Spec {
        Version: "1.0.2".to_owned(),
        Process: MessageField::some(process(args)),
        Root: MessageField::some(oci::Root {
            Path: root.to_owned(),
            ..oci::Root::default()
        }),
        Hostname: "box".to_owned(),
        Mounts: vec![
            mount("/proc", "proc", "proc", &strict),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "mode=755"]),
            mount(
                "/dev/pts",
                "devpts",
                "devpts",
                &[
                    "nosuid",
                    "noexec",
                    "newinstance",
                    "ptmxmode=0666",
                    "mode=0620",
                ],
            ),
            mount(
                "/sys",
                "sysfs",
                "sysfs",
                &["nosuid", "noexec", "nodev", "ro"],
            ),
        ],
        Linux: MessageField::some(oci::Linux {
            Namespaces: ["pid", "ipc", "uts", "mount", "network", "cgroup"]
                .map(namespace)
                .to_vec(),
            Resources: MessageField::some(oci::LinuxResources {
                Devices: vec![oci::LinuxDeviceCgroup {
                    Allow: false,
                    Access: "rwm".to_owned(),
                    ..oci::LinuxDeviceCgroup::default()
                }],
                ..oci::LinuxResources::default()
            }),
            ..oci::Linux::default()
        }),
        ..oci::Spec::default()
    }
}
