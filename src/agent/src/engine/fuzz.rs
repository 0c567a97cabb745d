// SPDX-License-Identifier: Apache-2.0
//! Specs of a runtime, and reports of a process that already sees its container.

#![expect(clippy::expect_used, reason = "a fuzzer that can't go on should stop")]

use std::os::fd::OwnedFd;

use protobuf::Message as _;
use protocols::agent::oci;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::channel::Channel;
use super::plan::{ContainerPlan, Job, Report};
use crate::fuzz::Input;

/// A spec that is right in all but, now and then, a field; or any bytes as a spec.
pub fn specs(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let spec = if input.rarely(4) {
        match oci::Spec::parse_from_bytes(input.rest()) {
            Ok(spec) => spec,
            Err(_) => return,
        }
    } else {
        spec(&mut input)
    };
    crate::cgroup::fuzz_rules(&spec.Linux.Resources.Devices, &spec.Linux.Devices);
    let Ok((plan, _)) = super::container(&spec) else {
        return;
    };
    let _ = plan.check_hostname();
    if let Some(profile) = &plan.process.seccomp {
        let _ = profile.compile();
    }
    // What is in a plan reaches the helper as it is.
    let sent = postcard::to_stdvec(&Job::Create(Box::new(plan))).expect("a plan can be written");
    let job: Job = postcard::from_bytes(&sent).expect("a plan can be read");
    let again = postcard::to_stdvec(&job).expect("a plan can be written");
    assert_eq!(sent, again, "a plan changes on its way");
    if let Job::Create(plan) = job {
        let process = spec.Process.get_or_default();
        let _ = super::process(process, Some(&plan.process));
    }
}

/// Any bytes from the other end of a channel.
pub fn frames(bytes: &[u8]) {
    let _ = postcard::from_bytes::<ContainerPlan>(bytes);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket pair");
    write(&theirs, bytes);
    let ours = Channel::new(ours);
    while ours.receive::<Report>().is_ok() {}
    write(&theirs, bytes);
    while ours.receive::<Job>().is_ok() {}
}

fn write(socket: &OwnedFd, bytes: &[u8]) {
    // Sometimes right: the length before the message.
    let body = bytes.get(..bytes.len().min(1 << 12)).unwrap_or_default();
    let length = u32::try_from(body.len()).unwrap_or(0);
    let _ = rustix::io::write(socket, &length.to_le_bytes());
    let _ = rustix::io::write(socket, body);
    let _ = rustix::io::write(socket, bytes);
}

fn spec(input: &mut Input<'_>) -> oci::Spec {
    let mut spec = oci::Spec {
        Process: Some(process(input)).into(),
        Root: Some(oci::Root {
            Path: input.word(&["/run/rootfs", "/rootfs"]),
            Readonly: input.rarely(2),
            ..oci::Root::default()
        })
        .into(),
        Hostname: input.word(&["", "box"]),
        Mounts: input.list(4, mount),
        Linux: Some(linux(input)).into(),
        ..oci::Spec::default()
    };
    if input.rarely(30) {
        spec.Hooks.mut_or_insert_default().Poststop = input.list(2, |input| oci::Hook {
            Path: input.text(),
            ..oci::Hook::default()
        });
    }
    spec
}

fn process(input: &mut Input<'_>) -> oci::Process {
    let capabilities = |input: &mut Input<'_>| {
        input.list(3, |input| {
            input.word(&["CAP_CHOWN", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_BPF"])
        })
    };
    oci::Process {
        Terminal: input.rarely(3),
        Args: vec![input.word(&["true", "/bin/sh"]), input.text()],
        Env: input.list(3, |input| format!("A={}", input.text())),
        Cwd: input.word(&["/", "/tmp", "/a/../b"]),
        Capabilities: Some(oci::LinuxCapabilities {
            Bounding: capabilities(input),
            Effective: capabilities(input),
            Inheritable: capabilities(input),
            Permitted: capabilities(input),
            Ambient: if input.rarely(9) {
                capabilities(input)
            } else {
                Vec::new()
            },
            ..oci::LinuxCapabilities::default()
        })
        .into(),
        Rlimits: input.list(2, |input| oci::POSIXRlimit {
            Type: input.word(&["RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_AS"]),
            Soft: input.number().unsigned_abs(),
            Hard: u64::MAX,
            ..oci::POSIXRlimit::default()
        }),
        OOMScoreAdj: i64::from(input.byte()),
        ..oci::Process::default()
    }
}

fn mount(input: &mut Input<'_>) -> oci::Mount {
    oci::Mount {
        destination: input.word(&["/proc", "/data", "/a/b", "/dev/shm"]),
        source: input.word(&["proc", "/run/x", "tmpfs"]),
        type_: input.word(&["proc", "bind", "tmpfs", "sysfs"]),
        options: input.list(4, |input| {
            input.word(&[
                "ro",
                "rbind",
                "nosuid",
                "size=1k",
                "rslave",
                "rro",
                "mode=1777",
            ])
        }),
        ..oci::Mount::default()
    }
}

fn linux(input: &mut Input<'_>) -> oci::Linux {
    let mut namespaces = vec!["mount".to_owned()];
    namespaces.extend(input.list(3, |input| input.word(&["pid", "ipc", "uts", "network"])));
    if !input.rarely(9) {
        namespaces.sort();
        namespaces.dedup();
    }
    let namespaces = namespaces.into_iter().map(|kind| oci::LinuxNamespace {
        Type: kind,
        Path: input.word(&["", "", "", "", "/proc/1/ns/ipc"]),
        ..oci::LinuxNamespace::default()
    });
    let namespaces = namespaces.collect();
    let paths = |input: &mut Input<'_>| {
        input.list(3, |input| {
            input.word(&["/proc/kcore", "/sys/firmware", "/a/../b"])
        })
    };
    let mut linux = oci::Linux {
        Namespaces: namespaces,
        MaskedPaths: paths(input),
        ReadonlyPaths: paths(input),
        RootfsPropagation: input.word(&["", "rslave", "private"]),
        CgroupsPath: input.word(&["", "/kata/x"]),
        Devices: input.list(2, |input| oci::LinuxDevice {
            Path: input.word(&["/dev/fuse", "/dev/sda"]),
            Type: input.word(&["c", "b", "p"]),
            Major: i64::from(input.byte()),
            Minor: input.number(),
            FileMode: u32::from(input.byte()),
            ..oci::LinuxDevice::default()
        }),
        ..oci::Linux::default()
    };
    for _ in 0..input.byte() % 3 {
        let name = input.word(&["net.ipv4.ip_forward", "kernel.msgmax", "fs.mqueue.msg_max"]);
        linux.Sysctl.insert(name, input.text());
    }
    linux.Resources.mut_or_insert_default().Devices =
        input.list(3, |input| oci::LinuxDeviceCgroup {
            Allow: input.rarely(2),
            Type: input.word(&["a", "b", "c", ""]),
            Major: input.number() % 300,
            Minor: i64::from(input.byte()),
            Access: input.word(&["rwm", "r", "", "m"]),
            ..oci::LinuxDeviceCgroup::default()
        });
    if input.rarely(2) {
        linux.Seccomp = Some(seccomp(input)).into();
    }
    linux
}

fn seccomp(input: &mut Input<'_>) -> oci::LinuxSeccomp {
    let actions = [
        "SCMP_ACT_ALLOW",
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_KILL",
        "SCMP_ACT_LOG",
    ];
    oci::LinuxSeccomp {
        DefaultAction: input.word(&actions),
        Architectures: input.list(2, |input| {
            input.word(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
        }),
        Syscalls: input.list(3, |input| oci::LinuxSyscall {
            Names: input.list(3, |input| input.word(&["read", "clone", "mkdir", "keyctl"])),
            Action: input.word(&actions),
            Args: input.list(2, |input| oci::LinuxSeccompArg {
                Index: u64::from(input.byte() % 7),
                Value: input.number().unsigned_abs(),
                ValueTwo: input.number().unsigned_abs(),
                Op: input.word(&["SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_GT"]),
                ..oci::LinuxSeccompArg::default()
            }),
            ..oci::LinuxSyscall::default()
        }),
        ..oci::LinuxSeccomp::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::feed;

    #[test]
    fn specs_are_mostly_right() {
        let right = std::cell::Cell::new(0);
        feed(300, |bytes| {
            if super::super::container(&spec(&mut Input::new(bytes))).is_ok() {
                right.set(right.get() + 1);
            }
        });
        // Else the targets would see the first checks only.
        assert!(right.get() > 50, "{}", right.get());
    }
}
