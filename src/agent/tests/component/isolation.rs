// SPDX-License-Identifier: Apache-2.0
//! What a container is, read from inside.

use std::fs;

use anyhow::{Context as _, Result};
use protobuf::MessageField;
use protocols::agent::oci;

use crate::rig::{Rig, mount, process, refusal, texts};

/// What `script` prints in a container whose spec is changed by `change`.
async fn inside(script: &str, change: impl FnOnce(&mut oci::Spec)) -> Result<String> {
    let rig = Rig::new().await?;
    let mut spec = rig.spec("a", &["sh", "-c", script])?;
    change(&mut spec);
    let outcome = rig.run("a", spec).await?;
    assert_eq!((outcome.stderr.as_str(), outcome.status), ("", 0));
    Ok(outcome.stdout)
}

fn process_of(spec: &mut oci::Spec) -> &mut oci::Process {
    spec.Process.as_mut().unwrap()
}

fn linux_of(spec: &mut oci::Spec) -> &mut oci::Linux {
    spec.Linux.as_mut().unwrap()
}

#[tokio::test]
async fn namespaces_are_its_own() -> Result<()> {
    let script = "echo $$; hostname; ls /proc | grep -c '^[0-9]'; ls /sys/class/net; \
                  tail -1 /proc/self/cgroup; cat /proc/1/comm; true";
    let text = inside(script, |_| {}).await?;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "1");
    assert_eq!(lines[1], "box");
    assert!(lines[2].parse::<u32>()? <= 4, "{text}");
    assert_eq!(&lines[3..], ["lo", "0::/", "sh"]);
    Ok(())
}

#[tokio::test]
async fn loopback_of_a_new_network_namespace_is_up() -> Result<()> {
    let text = inside("cat /sys/class/net/lo/flags; ip addr show lo", |_| {}).await?;
    assert!(
        text.starts_with("0x9\n") && text.contains("127.0.0.1/8"),
        "{text}"
    );
    Ok(())
}

#[tokio::test]
async fn user_groups_and_capabilities_are_the_specs() -> Result<()> {
    let script = "id -u; id -g; id -G; grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; \
                  echo $HOME; umask; pwd";
    let text = inside(script, |spec| {
        let process = process_of(spec);
        process.User = MessageField::some(oci::User {
            UID: 1000,
            GID: 1001,
            AdditionalGids: vec![5, 6],
            ..oci::User::default()
        });
        process.Capabilities = MessageField::some(oci::LinuxCapabilities {
            Bounding: texts(&["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]),
            Effective: texts(&["CAP_KILL"]),
            Permitted: texts(&["CAP_KILL", "CAP_CHOWN"]),
            Inheritable: texts(&["CAP_KILL"]),
            Ambient: texts(&["CAP_KILL"]),
            ..oci::LinuxCapabilities::default()
        });
        process.Cwd = "/made/for/it".to_owned();
    })
    .await?;
    assert_eq!(
        text,
        "1000\n1001\n1001 5 6\nCapInh:\t0000000000000020\nCapPrm:\t0000000000000020\n\
         CapEff:\t0000000000000020\nCapBnd:\t0000000000002021\nCapAmb:\t0000000000000020\n\
         NoNewPrivs:\t1\nSeccomp:\t0\n/home/user\n0022\n/made/for/it\n"
    );
    Ok(())
}

#[tokio::test]
async fn nothing_leaks_into_the_program() -> Result<()> {
    // 3 is the folder that ls reads.
    let script = "ls /proc/self/fd | tr '\\n' ' '; cat /proc/self/environ | tr '\\0' ' '; \
                  grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status; cat /proc/1/oom_score_adj";
    let text = inside(&format!("exec sh -c \"{script}\""), |spec| {
        process_of(spec).OOMScoreAdj = 77;
    })
    .await?;
    assert!(text.starts_with("0 1 2 3 "), "{text}");
    assert!(text.contains("PATH=/usr/local/bin:/usr/bin:/bin"), "{text}");
    assert!(!text.contains("KATA"), "{text}");
    assert!(text.contains("SigIgn:\t0000000000000000"), "{text}");
    assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
    assert!(text.ends_with("77\n"), "{text}");
    Ok(())
}

#[tokio::test]
async fn limits_of_resources_are_the_specs() -> Result<()> {
    let text = inside("ulimit -n; ulimit -Hn; ulimit -c", |spec| {
        process_of(spec).Rlimits.push(oci::POSIXRlimit {
            Type: "RLIMIT_CORE".to_owned(),
            Soft: 0,
            Hard: u64::MAX,
            ..oci::POSIXRlimit::default()
        });
    })
    .await?;
    assert_eq!(text, "1024\n2048\n0\n");
    Ok(())
}

#[tokio::test]
async fn masked_and_read_only_paths_hold() -> Result<()> {
    let script = "cat /proc/keys | wc -c; ls /sys/firmware | wc -l; \
                  (echo 1 > /proc/sys/kernel/domainname) 2>&1 | grep -o 'Read-only.*'; \
                  (touch /sys/x) 2>&1 | grep -o 'Read-only.*'; \
                  grep -c ' /proc/sys proc ro,' /proc/mounts";
    let text = inside(script, |_| {}).await?;
    assert_eq!(
        text,
        "0\n0\nRead-only file system\nRead-only file system\n1\n"
    );
    Ok(())
}

#[tokio::test]
async fn a_read_only_root_is_read_only_and_its_mounts_are_not() -> Result<()> {
    let script = "(touch /x) 2>&1 | grep -o 'Read-only.*'; touch /run/x /data/y && echo ok; \
                  (touch /fixed/z) 2>&1 | grep -o 'Read-only.*'";
    let rig = Rig::new().await?;
    let mut spec = rig.spec("a", &["sh", "-c", script])?;
    spec.Root.as_mut().unwrap().Readonly = true;
    fs::create_dir(rig.share("data"))?;
    spec.Mounts
        .push(mount("/data", "bind", "/share/data", &["rbind", "rw"]));
    spec.Mounts
        .push(mount("/fixed", "bind", "/share/data", &["bind", "ro"]));
    let outcome = rig.run("a", spec).await?;
    assert_eq!(
        outcome.stdout,
        "Read-only file system\nok\nRead-only file system\n"
    );
    assert!(rig.share("data/y").exists());
    Ok(())
}

#[tokio::test]
async fn devices_are_there_and_others_are_out_of_reach() -> Result<()> {
    let script = "ls -l /dev/null /dev/fuse | awk '{print $1, $5, $6}'; readlink /dev/ptmx; \
                  head -c 3 /dev/zero | wc -c; mknod /tmp/disk b 254 0 && \
                  (head -c 1 /tmp/disk) 2>&1 | grep -o 'Operation.*'; \
                  mknod /tmp/kmsg c 1 11 && (head -c 1 /tmp/kmsg) 2>&1 | grep -o 'Operation.*'";
    let text = inside(script, |spec| {
        linux_of(spec).Devices.push(oci::LinuxDevice {
            Path: "/dev/fuse".to_owned(),
            Type: "c".to_owned(),
            Major: 10,
            Minor: 229,
            FileMode: 0o640,
            GID: 7,
            ..oci::LinuxDevice::default()
        });
    })
    .await?;
    assert_eq!(
        text,
        "crw-r----- 10, 229\ncrw-rw-rw- 1, 3\npts/ptmx\n3\nOperation not permitted\n\
         Operation not permitted\n"
    );
    Ok(())
}

#[tokio::test]
async fn links_of_the_image_do_not_lead_out() -> Result<()> {
    let rig = Rig::new().await?;
    let mut spec = rig.spec("a", &["ls", "/inside/data"])?;
    std::os::unix::fs::symlink("/../../../share/outside", rig.share("a/escape"))?;
    std::os::unix::fs::symlink("/inside", rig.share("a/jump"))?;
    fs::create_dir_all(rig.share("a/inside"))?;
    fs::create_dir(rig.share("data"))?;
    fs::write(rig.share("data/file"), "")?;
    spec.Mounts
        .push(mount("/jump/data", "bind", "/share/data", &["rbind"]));
    let outcome = rig.run("a", spec).await?;
    assert_eq!(outcome.stdout, "file\n");

    // What a link to nothing points to is made, inside the root.
    let mut spec = rig.spec("b", &["ls", "/share/outside/x"])?;
    std::os::unix::fs::symlink("/../../../share/outside", rig.share("b/escape"))?;
    spec.Mounts
        .push(mount("/escape/x", "bind", "/share/data", &["rbind"]));
    let outcome = rig.run("b", spec).await?;
    assert_eq!(outcome.stdout, "file\n");
    assert!(!rig.share("outside").exists());

    // /proc behind a link would slip from under its masks.
    let spec = rig.spec("c", &["true"])?;
    fs::remove_dir(rig.share("c/proc"))?;
    std::os::unix::fs::symlink("/tmp", rig.share("c/proc"))?;
    let (_, line) = refusal(rig.create("c", spec).await);
    assert!(line.contains("behind a link"), "{line}");
    Ok(())
}

#[tokio::test]
async fn a_seccomp_profile_decides() -> Result<()> {
    for no_new_privileges in [true, false] {
        let script = "mkdir /tmp/a 2>&1 | grep -o 'Operation.*'; touch /tmp/b && echo ok; \
                      grep ^Seccomp: /proc/self/status; grep ^CapEff /proc/self/status";
        let text = inside(script, |spec| {
            process_of(spec).NoNewPrivileges = no_new_privileges;
            linux_of(spec).Seccomp = MessageField::some(oci::LinuxSeccomp {
                DefaultAction: "SCMP_ACT_ALLOW".to_owned(),
                Architectures: texts(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
                Syscalls: vec![oci::LinuxSyscall {
                    Names: texts(&["mkdir", "mkdirat", "no_such_call"]),
                    Action: "SCMP_ACT_ERRNO".to_owned(),
                    ..oci::LinuxSyscall::default()
                }],
                ..oci::LinuxSeccomp::default()
            });
        })
        .await?;
        assert_eq!(
            text,
            "Operation not permitted\nok\nSeccomp:\t2\nCapEff:\t00000000a80425fb\n"
        );
    }
    Ok(())
}

#[tokio::test]
async fn sysctls_are_set_in_the_containers_namespaces() -> Result<()> {
    let script = "cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_forward";
    let text = inside(script, |spec| {
        linux_of(spec).Sysctl.extend([
            ("kernel.shmmni".to_owned(), "1234".to_owned()),
            ("net/ipv4/ip_forward".to_owned(), "1".to_owned()),
        ]);
    })
    .await?;
    assert_eq!(text, "1234\n1\n");
    Ok(())
}

#[tokio::test]
async fn containers_of_a_sandbox_share_ipc_and_host_name() -> Result<()> {
    let rig = Rig::new().await?;
    // Both live at once: the number of a namespace that is gone is given again.
    let script = "echo $(for n in ipc uts net; do readlink /proc/self/ns/$n; done); sleep 1000";
    let namespaces = async |name: &str| -> Result<Vec<String>> {
        rig.create(name, rig.spec(name, &["sh", "-c", script])?)
            .await?;
        rig.start(name).await?;
        let text = String::from_utf8(rig.read_once(name, "", false).await?)?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    };
    let (first, second) = (namespaces("a").await?, namespaces("b").await?);
    assert_eq!(first[..2], second[..2]);
    assert_ne!(first[2], second[2]);
    Ok(())
}

#[tokio::test]
async fn failures_name_what_failed() -> Result<()> {
    type Change = fn(&mut oci::Spec);
    let cases: [(&str, Change); 9] = [
        ("exec: \"/etc\": is a directory", |s| {
            process_of(s).Args = texts(&["/etc"]);
        }),
        ("exec: \"/etc/passwd\": permission denied", |s| {
            process_of(s).Args = texts(&["/etc/passwd"]);
        }),
        ("chdir to cwd (\"/etc/passwd\"): not a directory", |s| {
            process_of(s).Cwd = "/etc/passwd".to_owned();
        }),
        (
            "mount \"/no/such\" on \"/x\": source \"/no/such\": no such file",
            |s| {
                s.Mounts.push(mount("/x", "bind", "/no/such", &["bind"]));
            },
        ),
        ("file system type \"floppyfs\"", |s| {
            s.Mounts.push(mount("/x", "floppyfs", "x", &[]));
        }),
        ("option \"colour\"", |s| {
            s.Mounts.push(mount("/x", "tmpfs", "x", &["colour=red"]));
        }),
        ("rootfs: source \"/share/none\": no such file", |s| {
            s.Root.as_mut().unwrap().Path = "/share/none".to_owned();
        }),
        ("set sysctl \"kernel/no_such\"", |s| {
            let sysctl = &mut linux_of(s).Sysctl;
            sysctl.insert("kernel.no_such".to_owned(), "1".to_owned());
        }),
        ("hooks.prestart: \"\": not an absolute path", |s| {
            s.Hooks.mut_or_insert_default().Prestart = vec![oci::Hook::default()];
        }),
    ];
    let rig = Rig::new().await?;
    for (expected, change) in cases {
        let mut spec = rig.spec("a", &["true"])?;
        change(&mut spec);
        let (_, line) = refusal(rig.create("a", spec).await);
        assert!(line.contains(expected), "{line:?} lacks {expected:?}");
        fs::remove_dir_all(rig.share("a"))?;
    }
    Ok(())
}

#[tokio::test]
async fn an_exec_is_in_the_same_container() -> Result<()> {
    let rig = Rig::new().await?;
    let script = "for n in pid mnt net ipc uts cgroup; do readlink /proc/$1/ns/$n; done; \
                  cat /proc/$1/cgroup; echo done";
    rig.create("a", rig.spec("a", &["sleep", "100"])?).await?;
    rig.start("a").await?;
    let read = async |pid: &str, exec: &str| -> Result<String> {
        let mut process = process(&["sh", "-c", script, "x", pid]);
        // To look at another process's namespaces.
        let capabilities = process.Capabilities.as_mut().unwrap();
        for set in [
            &mut capabilities.Bounding,
            &mut capabilities.Effective,
            &mut capabilities.Permitted,
        ] {
            set.push("CAP_SYS_PTRACE".to_owned());
        }
        rig.exec("a", exec, process).await?;
        let outcome = rig.outcome("a", exec).await?;
        assert_eq!(outcome.stderr, "");
        Ok(outcome.stdout)
    };
    assert_eq!(read("1", "e1").await?, read("self", "e2").await?);
    Ok(())
}

/// A pod's containers share the machine's network and the pod's names, which the user namespace of
/// one of them does not own. Nor does it own the cgroup namespace, if the container has none.
#[tokio::test]
async fn a_user_namespace_in_a_pod() -> Result<()> {
    for shared in [&["network"][..], &["network", "cgroup"]] {
        user_namespace_with(shared)
            .await
            .with_context(|| format!("shared: {shared:?}"))?;
    }
    Ok(())
}

async fn user_namespace_with(shared: &[&str]) -> Result<()> {
    let rig = Rig::new().await?;
    let script = "id -u; hostname; ls /sys/class/net; grep -c mqueue /proc/mounts; \
                  grep -c ' cgroup2 ' /proc/mounts; cat /proc/self/uid_map | tr -s ' '; sleep 1000";
    let mut spec = rig.spec("a", &["sh", "-c", script])?;
    fs::create_dir(rig.share("a/run"))?;
    let linux = linux_of(&mut spec);
    linux
        .Namespaces
        .retain(|it| !shared.contains(&it.Type.as_str()));
    linux.Namespaces.push(oci::LinuxNamespace {
        Type: "user".to_owned(),
        ..oci::LinuxNamespace::default()
    });
    let mapping = vec![oci::LinuxIDMapping {
        HostID: 300_000,
        Size: 65536,
        ..oci::LinuxIDMapping::default()
    }];
    linux.UIDMappings = mapping.clone();
    linux.GIDMappings = mapping;
    rig.create("a", spec).await?;
    rig.start("a").await?;
    let mut text = String::new();
    while !text.ends_with("65536\n") {
        text.push_str(&String::from_utf8(rig.read_once("a", "", false).await?)?);
    }
    assert_eq!(text, "0\nbox\nlo\n1\n1\n 0 300000 65536\n");

    let own = fs::read_link("/proc/self/ns/user")?;
    // An exec is in the same namespace, whoever its user is.
    for (uid, terminal) in [(0, false), (1000, false), (1000, true)] {
        let script = "id -u; echo out > /dev/stdout; readlink /proc/self/ns/user; \
                      grep realtime.priority /proc/self/limits";
        let mut exec = process(&["sh", "-c", script]);
        exec.Terminal = terminal;
        exec.User.mut_or_insert_default().UID = uid;
        // Above the agent's own: nobody in a user namespace may raise it.
        exec.Rlimits.push(oci::POSIXRlimit {
            Type: "RLIMIT_RTPRIO".to_owned(),
            Soft: 7,
            Hard: 77,
            ..oci::POSIXRlimit::default()
        });
        let name = format!("e{uid}{terminal}");
        rig.exec("a", &name, exec).await?;
        let outcome = rig.outcome("a", &name).await?;
        let seen = outcome.stdout.replace('\r', "");
        assert_eq!(outcome.stderr, "");
        assert!(seen.starts_with(&format!("{uid}\nout\nuser:[")), "{seen}");
        assert!(!seen.contains(&*own.to_string_lossy()), "{seen}");
        let limits: Vec<_> = seen.split_whitespace().rev().take(2).collect();
        assert_eq!(limits, ["77", "7"], "{seen}");
    }
    Ok(())
}
