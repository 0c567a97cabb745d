// SPDX-License-Identifier: Apache-2.0
//! Limits, files and kernel parameters as Kubernetes asks for them.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use protobuf::MessageField;
use protocols::agent::agent::{
    CopyFileRequest, CreateSandboxRequest, GetMetricsRequest, GetOOMEventRequest,
    OnlineCPUMemRequest, StatsContainerRequest, Storage, UpdateContainerRequest,
    UpdateEphemeralMountsRequest, VolumeStatsRequest,
};
use protocols::agent::oci;
use tokio::time::timeout;

use crate::rig::{Rig, ctx, eventually, mount, process, refusal, texts};

const SHM: &str = "/run/kata-containers/sandbox/shm";

fn resources_of(spec: &mut oci::Spec) -> &mut oci::LinuxResources {
    spec.Linux.as_mut().unwrap().Resources.as_mut().unwrap()
}

#[tokio::test]
async fn limits_of_the_kubelet_hold() -> Result<()> {
    let rig = Rig::new().await?;
    let files = "memory.max memory.low cpu.weight cpu.max pids.max cpuset.cpus cpuset.mems";
    let script = format!("cd /sys/fs/cgroup && cat {files}; cat /proc/self/oom_score_adj");
    let mut spec = rig.spec("a", &["sh", "-c", &script])?;
    spec.Process.as_mut().unwrap().OOMScoreAdj = -997;
    let resources = resources_of(&mut spec);
    resources.Memory = MessageField::some(oci::LinuxMemory {
        Limit: 64 << 20,
        Swap: 64 << 20,
        Reservation: 32 << 20,
        ..oci::LinuxMemory::default()
    });
    resources.CPU = MessageField::some(oci::LinuxCPU {
        Shares: 1024,
        Quota: 50_000,
        Period: 100_000,
        // Numbers of a host that is larger than its guest.
        Cpus: "0,200-210".to_owned(),
        Mems: "0-7".to_owned(),
        ..oci::LinuxCPU::default()
    });
    resources.Pids = MessageField::some(oci::LinuxPids {
        Limit: 100,
        ..oci::LinuxPids::default()
    });
    resources.HugepageLimits = vec![oci::LinuxHugepageLimit {
        Pagesize: "64TB".to_owned(),
        ..oci::LinuxHugepageLimit::default()
    }];
    let outcome = rig.run("a", spec).await?;
    assert_eq!(
        outcome.stdout, "67108864\n33554432\n39\n50000 100000\n100\n0\n0\n-997\n",
        "{outcome:?}"
    );
    Ok(())
}

#[tokio::test]
async fn limits_are_changed_while_it_runs() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "1000"])?).await?;
    rig.start("a").await?;
    let update = async |cpus: &str, limit| {
        let request = UpdateContainerRequest {
            container_id: "a".to_owned(),
            resources: MessageField::some(oci::LinuxResources {
                CPU: MessageField::some(oci::LinuxCPU {
                    Cpus: cpus.to_owned(),
                    ..oci::LinuxCPU::default()
                }),
                Memory: MessageField::some(oci::LinuxMemory {
                    Limit: limit,
                    ..oci::LinuxMemory::default()
                }),
                ..oci::LinuxResources::default()
            }),
            ..UpdateContainerRequest::default()
        };
        rig.agent.update_container(ctx(), &request).await
    };
    let read = |file| fs::read_to_string(rig.cgroup("a").join(file));
    update("0", 128 << 20).await?;
    assert_eq!(
        (read("cpuset.cpus")?, read("memory.max")?),
        ("0\n".into(), "134217728\n".into())
    );
    // None of them is in the guest: any will do.
    update("300-310", -1).await?;
    let all = fs::read_to_string(rig.cgroup("cpuset.cpus.effective"))?;
    assert_eq!(
        (read("cpuset.cpus")?, read("memory.max")?),
        (all, "max\n".to_owned())
    );
    let (code, line) = refusal(update("zero", 0).await);
    assert_eq!(
        (code, line.as_str()),
        (3, "linux.resources.cpu.cpus: \"zero\"")
    );
    Ok(())
}

/// What docker:dind and systemd do: no process may be in the container's own group any more.
#[tokio::test]
async fn an_exec_goes_where_the_first_process_went() -> Result<()> {
    let rig = Rig::new().await?;
    let script = "cd /sys/fs/cgroup && mkdir init && echo 1 > init/cgroup.procs && \
                  echo +pids > cgroup.subtree_control && echo moved && exec sleep 1000";
    let mut spec = rig.spec("a", &["sh", "-c", script])?;
    let mounts = spec.Mounts.iter_mut();
    for mount in mounts.filter(|mount| mount.type_ == "cgroup") {
        mount.options.retain(|option| option != "ro");
    }
    rig.create("a", spec).await?;
    rig.start("a").await?;
    assert_eq!(rig.read_once("a", "", false).await?, b"moved\n");
    let look = process(&["cat", "/proc/self/cgroup"]);
    rig.exec("a", "look", look).await?;
    assert_eq!(rig.outcome("a", "look").await?.stdout, "0::/init\n");
    Ok(())
}

#[tokio::test]
async fn a_container_that_runs_out_of_memory_is_told_of() -> Result<()> {
    let rig = Rig::new().await?;
    // tail keeps a line that never ends.
    let mut spec = rig.spec("a", &["sh", "-c", "tail /dev/zero; echo $?"])?;
    resources_of(&mut spec).Memory = MessageField::some(oci::LinuxMemory {
        Limit: 16 << 20,
        Swap: 16 << 20,
        ..oci::LinuxMemory::default()
    });
    rig.create("a", spec).await?;
    rig.start("a").await?;
    let event = rig
        .agent
        .get_oom_event(ctx(), &GetOOMEventRequest::default())
        .await?;
    assert_eq!(event.container_id, "a");
    assert!(rig.outcome("a", "").await?.stdout.contains("137"));
    Ok(())
}

#[tokio::test]
async fn shared_memory_has_the_size_of_the_sandbox() -> Result<()> {
    let rig = Rig::bare().await?;
    let storage = |size: &str| Storage {
        driver: "ephemeral".to_owned(),
        fstype: "tmpfs".to_owned(),
        source: "shm".to_owned(),
        mount_point: SHM.to_owned(),
        options: texts(&["noexec", "nosuid", "nodev", "mode=1777", size]),
        ..Storage::default()
    };
    let sandbox = CreateSandboxRequest {
        dns: texts(&["nameserver 10.96.0.10", "search a.svc.cluster.local"]),
        storages: vec![storage("size=1m")],
        ..CreateSandboxRequest::default()
    };
    rig.agent.create_sandbox(ctx(), &sandbox).await?;
    let mut spec = rig.spec("a", &["sleep", "1000"])?;
    spec.Mounts.retain(|mount| mount.destination != "/dev/shm");
    spec.Mounts
        .push(mount("/dev/shm", "bind", SHM, &["rbind", "rw"]));
    let resolv = "/run/kata-containers/sandbox/resolv.conf";
    spec.Mounts
        .push(mount("/etc/resolv.conf", "bind", resolv, &["rbind", "ro"]));
    rig.create("a", spec).await?;
    rig.start("a").await?;
    let look = async |exec: &str| -> Result<String> {
        let script = "df -k /dev/shm | tail -1 | awk '{print $2}'";
        rig.exec("a", exec, process(&["sh", "-c", script])).await?;
        Ok(rig.outcome("a", exec).await?.stdout)
    };
    assert_eq!(look("before").await?, "1024\n");
    let request = UpdateEphemeralMountsRequest {
        storages: vec![storage("size=3m")],
        ..UpdateEphemeralMountsRequest::default()
    };
    rig.agent.update_ephemeral_mounts(ctx(), &request).await?;
    assert_eq!(look("after").await?, "3072\n");
    rig.exec("a", "dns", process(&["cat", "/etc/resolv.conf"]))
        .await?;
    assert_eq!(
        rig.outcome("a", "dns").await?.stdout,
        "nameserver 10.96.0.10\nsearch a.svc.cluster.local\n"
    );

    let mut nowhere = storage("size=1m");
    nowhere.mount_point = "/share".to_owned();
    let request = UpdateEphemeralMountsRequest {
        storages: vec![nowhere],
        ..UpdateEphemeralMountsRequest::default()
    };
    let (_, line) = refusal(rig.agent.update_ephemeral_mounts(ctx(), &request).await);
    assert!(line.starts_with("remount \"/share\": "), "{line}");

    let request = VolumeStatsRequest {
        volume_guest_path: SHM.to_owned(),
        ..VolumeStatsRequest::default()
    };
    let stats = rig.agent.get_volume_stats(ctx(), &request).await?;
    assert_eq!(stats.usage[0].total, 3 << 20);
    Ok(())
}

#[tokio::test]
async fn files_of_the_kubelet_are_where_they_belong() -> Result<()> {
    let rig = Rig::new().await?;
    let script = "cat /etc/hosts /etc/hostname /var/run/secrets/token; echo ended > /dev/log-of-end; \
                  (echo > /var/run/secrets/x) 2>&1 | grep -o 'Read-only.*'; \
                  (echo > /etc/hostname) 2>&1 | grep -o 'Read-only.*'; touch /root-is-fixed; true";
    let mut spec = rig.spec("a", &["sh", "-c", script])?;
    spec.Root.as_mut().unwrap().Readonly = true;
    // As the kubelet lays them out: the folder's files are links to a folder that is exchanged.
    let secrets = rig.share("secrets");
    fs::create_dir_all(secrets.join("..2026"))?;
    fs::write(secrets.join("..2026/token"), "token\n")?;
    std::os::unix::fs::symlink("..2026", secrets.join("..data"))?;
    std::os::unix::fs::symlink("..data/token", secrets.join("token"))?;
    for (name, text) in [
        ("hosts", "10.0.0.1 pod\n"),
        ("hostname", "pod\n"),
        ("end", ""),
    ] {
        fs::write(rig.share(name), text)?;
    }
    for (destination, source, options) in [
        ("/etc/hosts", "/share/hosts", ["rbind", "rprivate", "rw"]),
        (
            "/etc/hostname",
            "/share/hostname",
            ["rbind", "rprivate", "ro"],
        ),
        ("/dev/log-of-end", "/share/end", ["rbind", "rprivate", "rw"]),
        (
            "/var/run/secrets",
            "/share/secrets",
            ["rbind", "rprivate", "ro"],
        ),
    ] {
        spec.Mounts
            .push(mount(destination, "bind", source, &options));
    }
    let outcome = rig.run("a", spec).await?;
    assert_eq!(
        outcome.stdout,
        "10.0.0.1 pod\npod\ntoken\nRead-only file system\nRead-only file system\n"
    );
    assert!(
        outcome.stderr.contains("root-is-fixed: Read-only"),
        "{outcome:?}"
    );
    assert_eq!(fs::read_to_string(rig.share("end"))?, "ended\n");
    Ok(())
}

#[tokio::test]
async fn containers_share_the_network_of_the_guest() -> Result<()> {
    let rig = Rig::new().await?;
    rig.ip("link add eth0 type veth peer name far")?;
    rig.ip("link set eth0 up")?;
    let path = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
    let script = format!("echo $(ls /sys/class/net) $(cat {path}); sleep 1000");
    let mut spec = rig.spec("a", &["sh", "-c", &script])?;
    let linux = spec.Linux.as_mut().unwrap();
    linux
        .Namespaces
        .retain(|namespace| namespace.Type != "network");
    linux.Sysctl.insert(
        "net.ipv4.ip_unprivileged_port_start".to_owned(),
        "81".to_owned(),
    );
    rig.create("a", spec).await?;
    rig.start("a").await?;
    assert_eq!(rig.read_once("a", "", false).await?, b"eth0 far lo 81\n");
    let request = StatsContainerRequest {
        container_id: "a".to_owned(),
        ..StatsContainerRequest::default()
    };
    let names = async || -> Result<Vec<String>> {
        let stats = rig.agent.stats_container(ctx(), &request).await?;
        let mut names: Vec<String> = stats
            .network_stats
            .iter()
            .map(|stats| stats.name.clone())
            .collect();
        names.sort();
        Ok(names)
    };
    assert_eq!(names().await?, ["eth0", "far"]);
    // The network is the pod's: it outlives the container's process.
    rig.signal("a", "", 9).await?;
    rig.wait("a", "").await?;
    assert_eq!(names().await?, ["eth0", "far"]);
    Ok(())
}

#[tokio::test]
async fn a_create_that_waits_holds_nobody_up() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "1000"])?).await?;
    rig.start("a").await?;
    // Whatever is started in there stands still.
    let frozen = rig.cgroup("frozen");
    fs::create_dir(&frozen)?;
    fs::write(frozen.join("cgroup.freeze"), "1")?;
    let mut spec = rig.spec("b", &["true"])?;
    spec.Linux.as_mut().unwrap().CgroupsPath = "/frozen/b".to_owned();
    let create = rig.create("b", spec);
    let others = async {
        eventually("b is being created", async || {
            Ok(refusal(rig.start("b").await).1.contains("is being created"))
        })
        .await?;
        let rest = async {
            rig.exec("a", "e", process(&["echo", "quick"])).await?;
            assert_eq!(rig.outcome("a", "e").await?.stdout, "quick\n");
            rig.processor_time("a").await?;
            rig.signal("a", "", 9).await?;
            assert_eq!(rig.wait("a", "").await?, 137);
            rig.remove("a").await?;
            anyhow::Ok(())
        };
        // The create gives up after 30 s at the earliest.
        timeout(Duration::from_secs(25), rest).await??;
        let (code, line) = refusal(rig.start("b").await);
        assert_eq!(
            (code, line.as_str()),
            (9, "container \"b\" is being created")
        );
        fs::write(frozen.join("cgroup.freeze"), "0")?;
        anyhow::Ok(())
    };
    let (created, others) = tokio::join!(create, others);
    others?;
    created?;
    rig.start("b").await?;
    assert_eq!(rig.wait("b", "").await?, 0);
    Ok(())
}

#[tokio::test]
async fn calls_about_the_guest() -> Result<()> {
    let rig = Rig::new().await?;
    let metrics = rig
        .agent
        .get_metrics(ctx(), &GetMetricsRequest::default())
        .await?;
    assert!(
        metrics
            .metrics
            .contains("\nkata_guest_meminfo{item=\"mem_total\"} ")
    );
    rig.agent
        .online_cpu_mem(ctx(), &OnlineCPUMemRequest::default())
        .await?;

    let copy = async |path: &str| {
        let request = CopyFileRequest {
            path: path.to_owned(),
            file_size: 5,
            file_mode: 0o644,
            dir_mode: 0o755,
            data: b"text\n".to_vec(),
            ..CopyFileRequest::default()
        };
        rig.agent.copy_file(ctx(), &request).await
    };
    let path = "/run/kata-containers/shared/containers/file";
    copy(path).await?;
    let (code, line) = refusal(copy("/etc/passwd").await);
    assert_eq!(
        (code, line.as_str()),
        (
            3,
            "copy \"/etc/passwd\": the path is not below \"/run/kata-containers\""
        )
    );
    let mut spec = rig.spec("a", &["cat", "/file"])?;
    spec.Mounts
        .push(mount("/file", "bind", path, &["bind", "ro"]));
    assert_eq!(rig.run("a", spec).await?.stdout, "text\n");
    Ok(())
}
