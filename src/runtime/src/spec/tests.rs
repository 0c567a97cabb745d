// SPDX-License-Identifier: Apache-2.0
use std::path::Path;

use protocols::agent::oci;

use super::*;
use crate::mount::Tree;

/// What `ctr run` of containerd 1.6 writes, shortened where a list repeats.
const CTR: &str = r#"{
  "ociVersion": "1.0.2-dev",
  "process": {
    "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
    "args": ["uname", "-r"], "env": ["PATH=/bin"], "cwd": "/",
    "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"],
                     "permitted": ["CAP_CHOWN"]},
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
    "noNewPrivileges": true, "apparmorProfile": "cri-containerd.apparmor.d"
  },
  "root": {"path": "rootfs", "readonly": true},
  "mounts": [
    {"destination": "/proc", "type": "proc", "source": "proc",
     "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ro"]}
  ],
  "annotations": {"a": "b"},
  "linux": {
    "resources": {
      "devices": [{"allow": false, "access": "rwm"},
                  {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
      "memory": {"limit": 67108864}, "cpu": {"shares": 512, "quota": 50000, "period": 100000,
      "cpus": "0-3"}, "pids": {"limit": 100}
    },
    "cgroupsPath": "/default/t1",
    "namespaces": [{"type": "pid"}, {"type": "mount"},
                   {"type": "network", "path": "/run/netns/x"}],
    "maskedPaths": ["/proc/acpi"], "readonlyPaths": ["/proc/bus"],
    "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
      "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
        "args": [{"index": 0, "value": 7, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}]}]}
  }
}"#;

fn amended(text: &str) -> Result<(oci::Spec, Vec<Bind>)> {
    let place = Place {
        rootfs: "/guest/rootfs",
        seccomp: true,
        pod: None,
    };
    let mut spec = read(text.as_bytes())?;
    let amended = amend(&mut spec, &place)?;
    assert!(!amended.shares_pids);
    Ok((spec.into(), amended.binds))
}

fn refusal(from: &str, to: &str) -> String {
    let text = CTR.replacen(from, to, 1);
    assert_ne!(text, CTR);
    let error = amended(&text).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    error.chain()
}

#[test]
fn what_ctr_writes_arrives_whole() {
    let (spec, binds) = amended(CTR).unwrap();
    let process = spec.Process.as_ref().unwrap();
    assert_eq!(process.Args, ["uname", "-r"]);
    assert_eq!(process.User.AdditionalGids, [0, 10]);
    assert_eq!(process.Capabilities.Bounding, ["CAP_CHOWN"]);
    assert_eq!(
        (process.Rlimits[0].Hard, process.Rlimits[0].Soft),
        (1024, 512)
    );
    assert!(process.NoNewPrivileges);
    assert_eq!(process.ApparmorProfile, "");
    assert_eq!(spec.Root.Path, "/guest/rootfs");
    assert!(spec.Root.Readonly);
    let resources = &spec.Linux.Resources;
    assert_eq!(resources.Memory.Limit, 64 << 20);
    assert_eq!((resources.CPU.Shares, resources.CPU.Quota), (512, 50_000));
    assert_eq!(resources.CPU.Cpus, "");
    assert_eq!(resources.Pids.Limit, 100);
    assert_eq!(
        (
            resources.Devices[0].Type.as_str(),
            resources.Devices[0].Major
        ),
        ("a", -1)
    );
    assert_eq!(resources.Devices[1].Minor, 3);
    let kinds: Vec<_> = spec
        .Linux
        .Namespaces
        .iter()
        .map(|it| it.Type.as_str())
        .collect();
    assert_eq!(kinds, ["pid", "mount"]);
    let syscall = &spec.Linux.Seccomp.Syscalls[0];
    assert_eq!(syscall.errnoret(), 38);
    assert_eq!((syscall.Args[0].Value, syscall.Args[0].ValueTwo), (7, 1));
    assert_eq!(
        binds,
        [Bind {
            mount: 1,
            source: Path::new("/srv/data").to_owned(),
            file: None,
            tree: Tree::Recursive,
            read_only: Some(Tree::Single),
            private: false,
            cached: true,
        }]
    );
}

#[test]
fn what_cannot_be_carried_is_refused_by_name() {
    let cases = [
        (r#""ociVersion""#, r#""vm": {}, "ociVersion""#, "vm"),
        (
            r#""cgroupsPath""#,
            r#""personality": {"domain": "LINUX32"}, "cgroupsPath""#,
            "personality",
        ),
        (
            r#""memory""#,
            r#""unified": {"memory.high": "1"}, "memory""#,
            "unified",
        ),
        (
            r#""annotations""#,
            r#""hooks": {"createContainer": [{"path": "/x"}]}, "annotations""#,
            "hooks.createContainer",
        ),
        (
            r#"{"type": "pid"}"#,
            r#"{"type": "pid", "path": "/proc/1/ns/pid"}"#,
            "/proc/1/ns/pid",
        ),
        (
            r#""cgroupsPath""#,
            r#""devices": [{"path": "/dev/rtc", "type": "c", "major": 252, "minor": 0}], "cgroupsPath""#,
            "/dev/rtc",
        ),
        (r#""/srv/data""#, r#""/sys/fs/cgroup""#, "/sys/fs/cgroup"),
        (r#""proc", "source""#, r#""nfs", "source""#, "nfs"),
        (
            r#""defaultAction""#,
            r#""defaultErrnoRet": 38, "defaultAction""#,
            "defaultErrnoRet",
        ),
        (r#""uid": 0"#, r#""uid": 4294967295"#, "process.user"),
        (
            r#""defaultAction""#,
            r#""listenerPath": "/x", "defaultAction""#,
            "listenerPath",
        ),
    ];
    for (from, to, name) in cases {
        let message = refusal(from, to);
        assert!(message.contains(name), "{name}: {message}");
    }
}

#[test]
fn a_privileged_container_s_list_of_host_devices_is_not_the_guest_s() {
    let devices = r#""devices": [{"path": "/dev/rtc", "type": "c", "major": 252, "minor": 0},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}], "cgroupsPath""#;
    let rules = r#"{"allow": false, "access": "rwm"},"#;
    let text = CTR
        .replace(r#""cgroupsPath""#, devices)
        .replace(rules, "")
        .replace(
            r#"{"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}"#,
            r#"{"allow": true, "access": "rwm"}"#,
        );
    let (spec, _) = amended(&text).unwrap();
    let kept: Vec<_> = spec
        .Linux
        .Devices
        .iter()
        .map(|it| it.Path.as_str())
        .collect();
    assert_eq!(kept, ["/dev/fuse"]);
}

/// The minor numbers of the block devices that are plugged in, and whether they are read-only.
fn plugged(rules: &str) -> Vec<(u32, bool)> {
    let text = format!(
        r#"{{"devices": [{{"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3}},
                         {{"path": "/dev/loop4", "type": "b", "major": 7, "minor": 4}}],
            "resources": {{"devices": [{{"allow": false, "access": "rwm"}}, {rules}]}}}}"#
    );
    let linux: model::Linux = serde_json::from_str(&text).unwrap();
    // As if the host had the second one at that path.
    let is_listed = |device: &model::Device| device.path == "/dev/loop4";
    let kept = amend::devices(linux.devices, linux.resources.as_ref(), is_listed);
    let (_, disks) = kept.unwrap();
    disks.iter().map(|it| (it.minor, it.read_only)).collect()
}

#[test]
fn a_block_device_is_plugged_in_as_the_rules_allow() {
    let of = |minor: u32, access: &str| {
        format!(
            r#"{{"allow": true, "type": "b", "major": 7, "minor": {minor}, "access": "{access}"}}"#
        )
    };
    let both = [of(3, "r"), of(4, "rwm")].join(", ");
    assert_eq!(plugged(&both), [(3, true), (4, false)]);
    // The last rule about an access counts.
    let later = [
        of(3, "rwm"),
        of(3, "m"),
        of(4, "rw"),
        of(4, "w").replace("true", "false"),
    ];
    assert_eq!(plugged(&later.join(", ")), [(3, false), (4, true)]);
    // None of a list of all, but what has another path than it has there.
    assert_eq!(plugged(r#"{"allow": true, "access": "rwm"}"#), [(3, false)]);
}

#[test]
fn a_cgroup_of_systemd_becomes_a_path() {
    let text = CTR.replace("/default/t1", "system.slice:cri:abc");
    let (spec, _) = amended(&text).unwrap();
    assert_eq!(spec.Linux.CgroupsPath, "/system.slice/cri-abc");
}

#[test]
fn null_is_empty() {
    let text = CTR.replace(r#""maskedPaths": ["/proc/acpi"]"#, r#""maskedPaths": null"#);
    let (spec, _) = amended(&text).unwrap();
    assert!(spec.Linux.MaskedPaths.is_empty());
}

/// What containerd's CRI writes for a container of the pod `p1`, whose sandbox is process 77.
const MEMBER: &str = r#"{
  "process": {"args": ["sh"], "cwd": "/"}, "root": {"path": "rootfs"},
  "mounts": [
    {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/kubelet/hosts",
     "options": ["rbind", "rprivate", "rw"]},
    {"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/cri/sandboxes/p1/shm",
     "options": ["rbind", "rprivate", "rw"]}
  ],
  "linux": {
    "sysctl": {"net.core.somaxconn": "1"},
    "namespaces": [{"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "mount"},
      {"type": "network", "path": "/proc/77/ns/net"}, {"type": "ipc", "path": "/proc/77/ns/ipc"},
      {"type": "uts", "path": "/proc/77/ns/uts"}]
  }
}"#;

fn member(text: &str) -> Result<(oci::Spec, Amended)> {
    let sysctls = [("net.core.somaxconn", "9"), ("kernel.shm_rmid_forced", "1")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let place = Place {
        rootfs: "/guest/rootfs",
        seccomp: true,
        pod: Some(Pod {
            id: "p1",
            pid: 77,
            sysctls: &sysctls.into(),
            shm: "/guest/shm",
        }),
    };
    let mut spec = read(text.as_bytes())?;
    let amended = amend(&mut spec, &place)?;
    Ok((spec.into(), amended))
}

#[test]
fn a_pod_s_container_gets_the_pod_s_namespaces_and_shared_memory() {
    let (spec, amended) = member(MEMBER).unwrap();
    assert!(amended.shares_pids);
    let binds: Vec<_> = amended.binds.iter().map(|bind| bind.mount).collect();
    assert_eq!(binds, [0]);
    assert_eq!(spec.Mounts[1].source, "/guest/shm");
    let namespaces: Vec<_> = spec
        .Linux
        .Namespaces
        .iter()
        .map(|namespace| (namespace.Type.as_str(), namespace.Path.as_str()))
        .collect();
    assert_eq!(namespaces, [("pid", ""), ("mount", "")]);
    // What the container says itself wins.
    assert_eq!(spec.Linux.Sysctl["net.core.somaxconn"], "1");
    assert_eq!(spec.Linux.Sysctl["kernel.shm_rmid_forced"], "1");
}

#[test]
fn a_volume_at_dev_shm_is_a_volume() {
    let text = MEMBER.replace("cri/sandboxes/p1/shm", "pods/uid/volumes/shm");
    let (_, amended) = member(&text).unwrap();
    assert_eq!(amended.binds.len(), 2);
}

#[test]
fn the_processes_of_another_container_can_t_be_joined() {
    let text = MEMBER.replace("/proc/77/ns/pid", "/proc/78/ns/pid");
    let error = member(&text).unwrap_err();
    assert!(
        error.chain().contains("/proc/78/ns/pid"),
        "{}",
        error.chain()
    );
    let own = MEMBER.replace(r#", "path": "/proc/77/ns/pid""#, "");
    assert!(!member(&own).unwrap().1.shares_pids);
}

#[test]
fn hooks_of_the_container_s_own_programs_go_to_the_agent() {
    let hooks = r#""hooks": {"prestart": [{"path": "/p"}],
        "startContainer": [{"path": "/s", "timeout": 3}]}, "annotations""#;
    let (spec, _) = amended(&CTR.replacen(r#""annotations""#, hooks, 1)).unwrap();
    let (prestart, start) = (&spec.Hooks.Prestart, &spec.Hooks.StartContainer);
    assert!(prestart.is_empty());
    assert_eq!((start[0].Path.as_str(), start[0].Timeout), ("/s", 3));
}

/// The table is the agent's and ours: what the protocol has no place for, no container may ask.
#[test]
fn what_the_conformance_table_calls_absent_is_refused_by_name() {
    let table: toml::Table =
        toml::from_str(include_str!("../../../../tests/conformance/config.toml")).unwrap();
    let absent = table["absent"].as_array().unwrap();
    assert!(absent.len() > 20);
    for row in absent.iter().filter(|row| row.get("shim").is_none()) {
        let field = row["field"].as_str().unwrap();
        // Its own name, or that of an object that is refused whole.
        let names = |message: &str| {
            let mut parts = field.split('.');
            parts.any(|part| message.contains(&format!("unknown field `{part}`")))
        };
        let message = read(row["spec"].as_str().unwrap().as_bytes())
            .expect_err(field)
            .chain();
        assert!(names(&message), "{field}: {message}");
    }
}
