// SPDX-License-Identifier: Apache-2.0
//! What the OCI specification asks, read from inside.

use std::fs;

use anyhow::ensure;
use serde_json::json;
use tests::bundle::Bundle;
use tests::ctr::LIMIT;
use tests::scenario::{Outcome, scenario};

/// Capabilities 0, 5 and 10 (capability.h): chown, kill, net_bind_service.
const CAPABILITIES: [&str; 3] = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
const CAPABILITY_BITS: u64 = 1 << 0 | 1 << 5 | 1 << 10;

#[test]
fn flags_of_ctr_run_are_applied() -> Outcome {
    scenario(|ctr| {
        let script = r#"
            echo "UID=$(id -u)"; echo "GID=$(id -g)"
            echo "CWD=$PWD"; echo "MARK=$MARK"; echo "OTHER=$OTHER"
            (: > /probe) 2>/dev/null && echo ROOT=rw || echo ROOT=ro
            (: > /run/probe) 2>/dev/null && echo RUN=rw || echo RUN=ro
            echo "ROOTFS=$(grep -c ' / .* ro[, ]' /proc/mounts)"
            status() { echo "$1=$(sed -n "s/^$1:[^0-9a-f]*//p" /proc/self/status)"; }
            status CapEff; status CapBnd; status NoNewPrivs
            echo "PID=$$"; echo "PROCESSES=$(ls -d /proc/[0-9]* | wc -l)"
            echo "LINKS=$(ls /sys/class/net | tr '\n' ' ')"
            echo "KCORE=$(head -c 1 /proc/kcore | wc -c)"
            (echo 1 > /proc/sys/kernel/panic) 2>/dev/null && echo SYSCTL=rw || echo SYSCTL=ro"#;
        let flags = [
            ["--cwd", "/tmp"],
            ["--env", "MARK=one two"],
            ["--env", "OTHER=3"],
            ["--cap-add", "CAP_SYS_PTRACE"],
            ["--cap-drop", "CAP_CHOWN"],
        ]
        .concat();
        let output = ctr.run_script(&[&flags, &["--read-only"][..]].concat(), "flags", script)?;
        let output = output.exits(0)?;
        for (key, expected) in [
            ("UID", "0"),
            ("GID", "0"),
            ("CWD", "/tmp"),
            ("MARK", "one two"),
            ("OTHER", "3"),
            ("ROOT", "ro"),
            ("RUN", "rw"),
            ("ROOTFS", "1"),
            ("NoNewPrivs", "1"),
            ("PID", "1"),
            ("LINKS", "lo"),
            ("KCORE", "0"),
            ("SYSCTL", "ro"),
        ] {
            let value = output.value(key)?;
            ensure!(
                value == expected,
                "{output}\n{key} is {value:?}, expected {expected:?}"
            );
        }
        for key in ["CapEff", "CapBnd"] {
            let bits = u64::from_str_radix(&output.value(key)?, 16)?;
            // The default set has capability 27 (mknod) and not 21 (sys_admin).
            let kept = bits & (1 << 27 | 1 << 19) == 1 << 27 | 1 << 19;
            ensure!(
                kept && bits & (1 << 21 | 1 << 0) == 0,
                "{output}\n{key} is {bits:#x}"
            );
        }
        // The shell, and those that the pipe and the substitution started.
        ensure!(
            output.value("PROCESSES")?.parse::<u32>()? <= 4,
            "{output}\nother processes"
        );
        Ok(())
    })
}

#[test]
fn user_capabilities_limits_and_hostname_are_the_specification_s() -> Outcome {
    scenario(|ctr| {
        let script = r#"
            echo "UID=$(id -u)"; echo "GID=$(id -g)"; echo "GROUPS=$(id -G)"
            echo "CWD=$PWD"; echo "MARK=$MARK"; echo "HOSTNAME=$(hostname)"
            echo "NOFILE=$(ulimit -Sn) $(ulimit -Hn)"; echo "CORE=$(ulimit -Sc) $(ulimit -Hc)"
            status() { echo "$1=$(sed -n "s/^$1:[^0-9a-f]*//p" /proc/self/status)"; }
            status CapInh; status CapPrm; status CapEff; status CapBnd; status CapAmb
            status NoNewPrivs
            cgroup() { cat "/sys/fs/cgroup/$1" 2>/dev/null || cat "/sys/fs/cgroup/$2"; }
            echo "MEMORY=$(cgroup memory.max memory/memory.limit_in_bytes)"
            echo "PIDS=$(cgroup pids.max pids/pids.max)"
            echo "CPU=$(cgroup cpu.max cpu/cpu.cfs_quota_us)"
            echo "SYSCTL=$(cat /proc/sys/net/ipv4/ip_default_ttl)"
            (: > /masked/file) 2>/dev/null && echo READONLY=rw || echo READONLY=ro
            echo "MASKED=$(cat /secret)"
            ls -l /dev/probe | awk '{ print "DEVICE=" $1 " " $3 " " $5 $6 }'"#;
        let namespaces =
            ["pid", "ipc", "uts", "mount", "network", "cgroup"].map(|kind| json!({ "type": kind }));
        let bundle = Bundle::new(ctr, script)?.with(json!({
            "hostname": "spec-host",
            "process": {
                "user": { "uid": 1000, "gid": 1001, "additionalGids": [10, 2000] },
                "cwd": "/tmp",
                "env": ["PATH=/bin", "MARK=spec"],
                "capabilities": {
                    "bounding": CAPABILITIES, "permitted": CAPABILITIES,
                    "effective": CAPABILITIES, "inheritable": CAPABILITIES,
                    "ambient": CAPABILITIES,
                },
                "rlimits": [
                    { "type": "RLIMIT_NOFILE", "soft": 512, "hard": 768 },
                    { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
                ],
                "noNewPrivileges": true,
            },
            "linux": {
                "cgroupsPath": "/default/spec",
                "namespaces": namespaces,
                "resources": {
                    "memory": { "limit": 64 << 20 },
                    "pids": { "limit": 64 },
                    "cpu": { "quota": 50_000, "period": 100_000 },
                },
                "sysctl": { "net.ipv4.ip_default_ttl": "42" },
                "readonlyPaths": ["/masked"],
                "maskedPaths": ["/secret"],
                "devices": [{
                    "path": "/dev/probe", "type": "c", "major": 1, "minor": 3,
                    "fileMode": 0o640, "uid": 1000, "gid": 1001,
                }],
            },
        }));
        let bundle = with_cgroup(bundle);
        fs::create_dir(bundle.root().join("masked"))?;
        fs::write(bundle.root().join("secret"), "secret")?;
        let output = ctr.run_config(&bundle.write()?, "spec")?.exits(0)?;
        for (key, expected) in [
            ("UID", "1000"),
            ("GID", "1001"),
            ("GROUPS", "1001 10 2000"),
            ("CWD", "/tmp"),
            ("MARK", "spec"),
            ("HOSTNAME", "spec-host"),
            ("NOFILE", "512 768"),
            ("CORE", "0 0"),
            ("NoNewPrivs", "1"),
            ("MEMORY", "67108864"),
            ("PIDS", "64"),
            ("SYSCTL", "42"),
            ("READONLY", "ro"),
            ("MASKED", ""),
            ("DEVICE", "crw-r----- 1000 1,3"),
        ] {
            let value = output.value(key)?;
            ensure!(
                value == expected,
                "{output}\n{key} is {value:?}, expected {expected:?}"
            );
        }
        ensure!(
            output.value("CPU")?.starts_with("50000"),
            "{output}\nCPU quota"
        );
        for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let bits = u64::from_str_radix(&output.value(key)?, 16)?;
            ensure!(bits == CAPABILITY_BITS, "{output}\n{key} is {bits:#x}");
        }
        Ok(())
    })
}

#[test]
fn the_memory_limit_holds() -> Outcome {
    scenario(|ctr| {
        let script = "tail /dev/zero; echo STATUS=$?";
        let flags = ["--memory-limit", "33554432"];
        let output = ctr.run_script(&flags, "memory", script)?.exits(0)?;
        ensure!(
            output.value("STATUS")? == "137",
            "{output}\nexpected an out-of-memory kill"
        );
        Ok(())
    })
}

#[test]
fn the_limit_of_processes_holds() -> Outcome {
    scenario(|ctr| {
        let script = "n=0; while sleep 1000 & do n=$((n+1)); echo FORKED $n; done";
        let bundle = Bundle::new(ctr, script)?.with(json!({
            "linux": { "cgroupsPath": "/default/pids", "resources": { "pids": { "limit": 16 } } },
        }));
        let output = ctr.run_config(&bundle.write()?, "pids")?;
        ensure!(output.code != Some(0), "{output}\nexpected a fork to fail");
        let forked = output.text().lines().count();
        ensure!(
            (8..16).contains(&forked),
            "{output}\n{forked} processes under a limit of 16"
        );
        Ok(())
    })
}

#[test]
fn a_seccomp_profile_is_applied() -> Outcome {
    scenario(|ctr| {
        let script = r#"
            echo "MODE=$(sed -n 's/^Seccomp:[^0-9]*//p' /proc/self/status)"
            mkdir /tmp/new 2>/dev/null && echo MKDIR=done || echo MKDIR=refused
            touch /tmp/new-file && echo TOUCH=done"#;
        let bundle = Bundle::new(ctr, script)?.with(json!({
            "linux": {
                "cgroupsPath": "/default/seccomp",
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }],
                },
            },
        }));
        let output = ctr.run_config(&bundle.write()?, "seccomp")?.exits(0)?;
        for (key, expected) in [("MODE", "2"), ("MKDIR", "refused"), ("TOUCH", "done")] {
            ensure!(
                output.value(key)? == expected,
                "{output}\nexpected {key}={expected}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_container_may_have_every_right_inside() -> Outcome {
    scenario(|ctr| {
        let script = r#"
            echo "EFF=$(sed -n 's/^CapEff:[^0-9a-f]*//p' /proc/self/status)"
            mkdir -p /mnt/new && mount -t tmpfs none /mnt/new && echo MOUNT=done
            (cat /proc/sys/kernel/printk > /proc/sys/kernel/printk) && echo SYSCTL=rw"#;
        let bundle = Bundle::new(ctr, script)?
            .privileged(&["CAP_SYS_ADMIN", "CAP_NET_ADMIN"])
            .with(json!({ "linux": { "cgroupsPath": "/default/privileged" } }));
        let output = ctr.run_config(&bundle.write()?, "privileged")?.exits(0)?;
        // Capabilities 12 and 21.
        let bits = u64::from_str_radix(&output.value("EFF")?, 16)?;
        ensure!(bits == 1 << 12 | 1 << 21, "{output}\n{bits:#x}");
        ensure!(output.value("MOUNT")? == "done", "{output}");
        ensure!(output.value("SYSCTL")? == "rw", "{output}");
        Ok(())
    })
}

#[test]
fn what_the_host_changes_in_a_root_folder_is_seen() -> Outcome {
    scenario(|ctr| {
        // That there is nothing must not be remembered.
        let script = "cat /told 2>/dev/null; ls / >/dev/null; echo looked; \
                      until [ -e /told ]; do sleep 0.1; done; cat /told; ls /";
        let bundle = Bundle::new(ctr, script)?;
        let mut running = ctr.start_config(&bundle.write()?, "root-folder")?;
        running.close_stdin();
        running.wait_for_stdout("looked", LIMIT)?;
        fs::write(bundle.root().join("told"), "words\n")?;
        let output = running.finish(LIMIT)?.exits(0)?;
        let text = output.text();
        let lines: Vec<_> = text.lines().collect();
        ensure!(
            lines.contains(&"words") && lines.contains(&"told"),
            "{output}"
        );
        Ok(())
    })
}

fn with_cgroup(bundle: Bundle) -> Bundle {
    bundle.with_mount(json!({
        "destination": "/sys/fs/cgroup",
        "type": "cgroup",
        "source": "cgroup",
        "options": ["ro", "nosuid", "noexec", "nodev"],
    }))
}
