// SPDX-License-Identifier: Apache-2.0
//! Every method of the protocol, driven once or more: its code, its words and its effect. A method
//! that no case drives fails the test.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;

use anyhow::Result;
use async_trait::async_trait;
use protobuf::MessageField;
use protocols::agent::agent::*;
use protocols::agent::agent_ttrpc::{AgentService, AgentServiceClient, create_agent_service};
use protocols::agent::health::CheckRequest;
use protocols::agent::health_ttrpc::{Health, HealthClient, create_health};
use protocols::agent::{oci, types};

use crate::rig::{Rig, ctx, mount, process, refusal, texts};
use crate::wire;

/// INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, UNIMPLEMENTED, INTERNAL, UNAVAILABLE.
const INVALID: i32 = 3;
const NOT_FOUND: i32 = 5;
const EXISTS: i32 = 6;
const WRONG_STATE: i32 = 9;
const UNIMPLEMENTED: i32 = 12;
const INTERNAL: i32 = 13;
const UNAVAILABLE: i32 = 14;

/// For the names of the methods only.
struct Nobody;

#[async_trait]
impl AgentService for Nobody {}

#[async_trait]
impl Health for Nobody {}

/// All methods of the services' descriptors, as `SERVICE/METHOD`.
fn described() -> BTreeSet<String> {
    let mut services = HashMap::new();
    services.extend(create_agent_service(Arc::new(Nobody)));
    services.extend(create_health(Arc::new(Nobody)));
    let methods = services.iter().flat_map(|(service, handlers)| {
        let methods = handlers.methods.keys();
        methods.map(move |method| format!("{service}/{}", method.rsplit('/').next().unwrap()))
    });
    methods.collect()
}

/// Calls a method with fields of its request.
macro_rules! call {
    ($client:expr, $method:ident, $request:ident { $($field:ident: $value:expr),* $(,)? }) => {
        $client
            .$method(ctx(), &$request { $($field: $value.into(),)* ..$request::default() })
            .await
    };
}

macro_rules! refused {
    ($code:expr, $word:expr, $result:expr) => {{
        let (code, message) = refusal($result);
        assert_eq!(code, $code, "{message}");
        assert!(message.contains($word), "{:?} is not in {message:?}", $word);
    }};
}

struct Case<'a> {
    rig: &'a Rig,
    agent: AgentServiceClient,
    health: HealthClient,
}

#[tokio::test]
async fn every_method_is_driven() -> Result<()> {
    let rig = Rig::bare().await?;
    let (client, driven) = wire::noted(&rig).await?;
    let case = Case {
        rig: &rig,
        agent: AgentServiceClient::new(client.clone()),
        health: HealthClient::new(client),
    };
    case.health().await?;
    case.sandbox().await?;
    case.guest().await?;
    case.container().await?;
    case.processes().await?;
    case.end_of_container().await?;
    case.network().await?;
    case.files().await?;
    case.refused().await;
    case.end().await?;
    let driven = driven.lock().unwrap().clone();
    let described = described();
    assert_eq!(described.len(), 44);
    let missing: Vec<_> = described.difference(&driven).collect();
    assert!(missing.is_empty(), "not driven: {missing:?}");
    Ok(())
}

impl Case<'_> {
    async fn health(&self) -> Result<()> {
        let answer = call!(self.health, check, CheckRequest {})?;
        assert_eq!(answer.status.value(), 1);
        let version = call!(self.health, version, CheckRequest {})?;
        assert_eq!(version.grpc_version, "0.0.1");
        assert!(!version.agent_version.is_empty());
        Ok(())
    }

    async fn sandbox(&self) -> Result<()> {
        let hooks = call!(
            self.agent,
            create_sandbox,
            CreateSandboxRequest {
                guest_hook_path: "/hooks"
            }
        );
        refused!(UNIMPLEMENTED, "guest_hook_path", hooks);
        let module = KernelModule {
            name: "floppy".to_owned(),
            ..KernelModule::default()
        };
        let modules = call!(
            self.agent,
            create_sandbox,
            CreateSandboxRequest {
                kernel_modules: vec![module]
            }
        );
        refused!(UNIMPLEMENTED, "floppy", modules);
        let shm = Storage {
            driver: "ephemeral".to_owned(),
            fstype: "tmpfs".to_owned(),
            source: "shm".to_owned(),
            options: texts(&["size=1m", "mode=1777"]),
            mount_point: "/run/kata-containers/sandbox/shm".to_owned(),
            ..Storage::default()
        };
        call!(
            self.agent,
            create_sandbox,
            CreateSandboxRequest {
                hostname: "pod",
                dns: texts(&["nameserver 10.0.0.1", "search example.org"]),
                storages: vec![shm.clone()],
                sandbox_id: "sandbox",
            }
        )?;
        let again = call!(
            self.agent,
            create_sandbox,
            CreateSandboxRequest { hostname: "other" }
        );
        refused!(EXISTS, "exists", again);
        let details = call!(
            self.agent,
            get_guest_details,
            GuestDetailsRequest {
                mem_block_size: true
            }
        )?;
        let details = details.agent_details.unwrap();
        assert!(details.init_daemon && details.supports_seccomp);
        for driver in [
            "virtio-fs",
            "blk",
            "mmioblk",
            "ephemeral",
            "local",
            "overlayfs",
            "watchable-bind",
            "erofs.multi-layer",
        ] {
            assert!(
                details.storage_handlers.contains(&driver.to_owned()),
                "{driver}"
            );
        }
        for (driver, place) in [("scsi", "/sys/bus/scsi/devices"), ("nvdimm", "/sys/bus/nd")] {
            let listed = details.storage_handlers.contains(&driver.to_owned());
            assert_eq!(listed, fs::exists(place)?, "{driver}");
            assert_eq!(details.device_handlers.contains(&driver.to_owned()), listed);
        }
        let larger = Storage {
            options: texts(&["size=2m"]),
            ..shm.clone()
        };
        call!(
            self.agent,
            update_ephemeral_mounts,
            UpdateEphemeralMountsRequest {
                storages: vec![larger]
            }
        )?;
        let stats = call!(
            self.agent,
            get_volume_stats,
            VolumeStatsRequest {
                volume_guest_path: shm.mount_point.clone()
            }
        )?;
        assert_eq!(
            (stats.usage[0].total, stats.usage[0].unit.value()),
            (2 << 20, 1)
        );
        assert_eq!(stats.usage[1].unit.value(), 2);
        let nowhere = call!(
            self.agent,
            get_volume_stats,
            VolumeStatsRequest {
                volume_guest_path: "/nowhere"
            }
        );
        refused!(NOT_FOUND, "/nowhere", nowhere);
        // What has no disk is as large as its options say.
        let resize = call!(
            self.agent,
            resize_volume,
            ResizeVolumeRequest {
                volume_guest_path: shm.mount_point.clone(),
                size: 1_u64 << 20
            }
        );
        refused!(UNIMPLEMENTED, "not resized", resize);
        let elsewhere = Storage {
            mount_point: "/share".to_owned(),
            ..shm
        };
        let update = call!(
            self.agent,
            update_ephemeral_mounts,
            UpdateEphemeralMountsRequest {
                storages: vec![elsewhere]
            }
        );
        refusal(update);
        Ok(())
    }

    async fn guest(&self) -> Result<()> {
        call!(
            self.agent,
            online_cpu_mem,
            OnlineCPUMemRequest {
                wait: false,
                cpu_only: true
            }
        )?;
        call!(
            self.agent,
            reseed_random_dev,
            ReseedRandomDevRequest { data: vec![7; 512] }
        )?;
        let time = call!(
            self.agent,
            set_guest_date_time,
            SetGuestDateTimeRequest {
                Sec: 1_i64,
                Usec: 1_000_000_i64
            }
        );
        refused!(INVALID, "1000000", time);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let set = SetGuestDateTimeRequest {
            Sec: now.as_secs() as i64,
            Usec: i64::from(now.subsec_micros()),
            ..SetGuestDateTimeRequest::default()
        };
        self.agent.set_guest_date_time(ctx(), &set).await?;
        let metrics = call!(self.agent, get_metrics, GetMetricsRequest {})?.metrics;
        assert!(metrics.contains("kata_agent_total_rss "), "{metrics}");
        Ok(())
    }

    /// Both layouts of the shared folder, and the form of the first process's exec id that the Go
    /// runtime uses.
    async fn container(&self) -> Result<()> {
        for (id, root) in [
            (
                "first",
                "/run/kata-containers/shared/containers/passthrough/first/rootfs",
            ),
            (
                "second",
                "/run/kata-containers/shared/containers/second/rootfs",
            ),
        ] {
            let bind = Storage {
                driver: "bind".to_owned(),
                source: self.rig.rootfs(id)?,
                mount_point: root.to_owned(),
                options: texts(&["rbind"]),
                ..Storage::default()
            };
            let script = "trap 'exit 7' TERM; while :; do sleep 0.1; done";
            let mut spec = self.rig.spec(id, &["sh", "-c", script])?;
            spec.Root.mut_or_insert_default().Path = root.to_owned();
            spec.Mounts.push(mount(
                "/dev/termination-log",
                "bind",
                "/share/last-words",
                &["rbind"],
            ));
            fs::write(self.rig.share("last-words"), "x".repeat(5000) + "why")?;
            call!(
                self.agent,
                create_container,
                CreateContainerRequest {
                    container_id: id,
                    exec_id: id,
                    storages: vec![bind],
                    OCI: Some(spec),
                }
            )?;
        }
        let spec = self.rig.spec("first", &["true"])?;
        let twice = call!(
            self.agent,
            create_container,
            CreateContainerRequest {
                container_id: "first",
                OCI: Some(spec)
            }
        );
        refused!(EXISTS, "\"first\" exists", twice);
        let early = call!(
            self.agent,
            exec_process,
            ExecProcessRequest {
                container_id: "first",
                exec_id: "e",
                process: Some(process(&["true"])),
            }
        );
        refused!(WRONG_STATE, "not started", early);
        call!(
            self.agent,
            start_container,
            StartContainerRequest {
                container_id: "first"
            }
        )?;
        call!(
            self.agent,
            start_container,
            StartContainerRequest {
                container_id: "second"
            }
        )?;
        let twice = call!(
            self.agent,
            start_container,
            StartContainerRequest {
                container_id: "first"
            }
        );
        refused!(WRONG_STATE, "started already", twice);
        let none = call!(
            self.agent,
            start_container,
            StartContainerRequest {
                container_id: "third"
            }
        );
        refused!(NOT_FOUND, "\"third\" does not exist", none);

        let stats = call!(
            self.agent,
            stats_container,
            StatsContainerRequest {
                container_id: "first"
            }
        )?;
        assert!(stats.cgroup_stats.is_some());
        let none = call!(
            self.agent,
            stats_container,
            StatsContainerRequest {
                container_id: "third"
            }
        );
        refused!(NOT_FOUND, "third", none);
        if self.rig.cgroup("first/memory.max").exists() {
            let resources = oci::LinuxResources {
                Memory: MessageField::some(oci::LinuxMemory {
                    Limit: 64 << 20,
                    ..Default::default()
                }),
                ..Default::default()
            };
            call!(
                self.agent,
                update_container,
                UpdateContainerRequest {
                    container_id: "first",
                    resources: Some(resources)
                }
            )?;
            let limit = fs::read_to_string(self.rig.cgroup("first/memory.max"))?;
            assert_eq!(limit.trim(), (64 << 20).to_string());
        }
        let none = call!(
            self.agent,
            update_container,
            UpdateContainerRequest {
                container_id: "third"
            }
        );
        refused!(NOT_FOUND, "third", none);
        call!(
            self.agent,
            pause_container,
            PauseContainerRequest {
                container_id: "first"
            }
        )?;
        let frozen = || fs::read_to_string(self.rig.cgroup("first/cgroup.events"));
        assert!(frozen()?.contains("frozen 1"));
        let paused = call!(
            self.agent,
            exec_process,
            ExecProcessRequest {
                container_id: "first",
                exec_id: "e",
                process: Some(process(&["true"])),
            }
        );
        refused!(WRONG_STATE, "paused", paused);
        call!(
            self.agent,
            resume_container,
            ResumeContainerRequest {
                container_id: "first"
            }
        )?;
        assert!(frozen()?.contains("frozen 0"));
        for result in [
            call!(
                self.agent,
                pause_container,
                PauseContainerRequest {
                    container_id: "third"
                }
            ),
            call!(
                self.agent,
                resume_container,
                ResumeContainerRequest {
                    container_id: "third"
                }
            ),
        ] {
            refused!(NOT_FOUND, "third", result);
        }
        let words = call!(
            self.agent,
            get_diagnostic_data,
            GetDiagnosticDataRequest {
                log_type: "termination_log",
                container_id: "first",
            }
        )?;
        assert_eq!(
            (words.data.len(), words.data.ends_with("xwhy")),
            (4096, true)
        );
        let other = call!(
            self.agent,
            get_diagnostic_data,
            GetDiagnosticDataRequest {
                log_type: "core",
                container_id: "first",
            }
        );
        refused!(INVALID, "core", other);
        let none = call!(
            self.agent,
            get_diagnostic_data,
            GetDiagnosticDataRequest {
                log_type: "termination_log",
                container_id: "third",
            }
        );
        refused!(NOT_FOUND, "third", none);
        Ok(())
    }

    async fn processes(&self) -> Result<()> {
        let exec = |id: &str, terminal: bool, args: &[&str]| ExecProcessRequest {
            container_id: "first".to_owned(),
            exec_id: id.to_owned(),
            process: MessageField::some(oci::Process {
                Terminal: terminal,
                ..process(args)
            }),
            ..ExecProcessRequest::default()
        };
        let cat = exec("cat", false, &["sh", "-c", "cat; echo bad >&2; exit 5"]);
        self.agent.exec_process(ctx(), &cat).await?;
        refused!(EXISTS, "cat", self.agent.exec_process(ctx(), &cat).await);
        let write = call!(
            self.agent,
            write_stdin,
            WriteStreamRequest {
                container_id: "first",
                exec_id: "cat",
                data: b"words".to_vec(),
            }
        )?;
        assert_eq!(write.len, 5);
        let resize = |exec_id: &str| TtyWinResizeRequest {
            container_id: "first".to_owned(),
            exec_id: exec_id.to_owned(),
            row: 33,
            column: 99,
            ..TtyWinResizeRequest::default()
        };
        refused!(
            UNAVAILABLE,
            "terminal",
            self.agent.tty_win_resize(ctx(), &resize("cat")).await
        );
        // No data is the end of input.
        call!(
            self.agent,
            write_stdin,
            WriteStreamRequest {
                container_id: "first",
                exec_id: "cat"
            }
        )?;
        let late = call!(
            self.agent,
            write_stdin,
            WriteStreamRequest {
                container_id: "first",
                exec_id: "cat",
                data: b"x".to_vec(),
            }
        );
        refused!(WRONG_STATE, "closed", late);
        call!(
            self.agent,
            close_stdin,
            CloseStdinRequest {
                container_id: "first",
                exec_id: "cat"
            }
        )?;
        let read = |length: u32| ReadStreamRequest {
            container_id: "first".to_owned(),
            exec_id: "cat".to_owned(),
            len: length,
            ..ReadStreamRequest::default()
        };
        assert_eq!(self.agent.read_stdout(ctx(), &read(3)).await?.data, b"wor");
        assert_eq!(self.agent.read_stdout(ctx(), &read(99)).await?.data, b"ds");
        assert_eq!(self.agent.read_stdout(ctx(), &read(99)).await?.data, b"");
        assert_eq!(
            self.agent.read_stderr(ctx(), &read(99)).await?.data,
            b"bad\n"
        );
        assert_eq!(self.agent.read_stderr(ctx(), &read(99)).await?.data, b"");
        let wait = || WaitProcessRequest {
            container_id: "first".to_owned(),
            exec_id: "cat".to_owned(),
            ..WaitProcessRequest::default()
        };
        assert_eq!(self.agent.wait_process(ctx(), &wait()).await?.status, 5);
        refused!(
            NOT_FOUND,
            "cat",
            self.agent.wait_process(ctx(), &wait()).await
        );

        let script = "sleep 0.5; stty size";
        self.agent
            .exec_process(ctx(), &exec("tty", true, &["sh", "-c", script]))
            .await?;
        self.agent.tty_win_resize(ctx(), &resize("tty")).await?;
        let outcome = self.rig.outcome("first", "tty").await?;
        assert_eq!(outcome.stdout, "33 99\r\n");
        let signal = SignalProcessRequest {
            container_id: "first".to_owned(),
            exec_id: "tty".to_owned(),
            signal: 15,
            ..SignalProcessRequest::default()
        };
        // Its entry goes with its last output, or is of a process that has ended.
        refused!(
            NOT_FOUND,
            "",
            self.agent.signal_process(ctx(), &signal).await
        );
        for exec_id in ["none", "first-none"] {
            let none = call!(
                self.agent,
                close_stdin,
                CloseStdinRequest {
                    container_id: "first",
                    exec_id: exec_id
                }
            );
            refused!(NOT_FOUND, exec_id, none);
            let none = call!(
                self.agent,
                read_stdout,
                ReadStreamRequest {
                    container_id: "first",
                    exec_id: exec_id
                }
            );
            refused!(NOT_FOUND, exec_id, none);
        }
        Ok(())
    }

    /// The first process by each of its names, and no container left.
    async fn end_of_container(&self) -> Result<()> {
        for (id, exec_id) in [("first", ""), ("second", "second")] {
            let wrong = call!(
                self.agent,
                signal_process,
                SignalProcessRequest {
                    container_id: id,
                    exec_id: exec_id,
                    signal: 1000_u32,
                }
            );
            refused!(INVALID, "1000", wrong);
            call!(
                self.agent,
                signal_process,
                SignalProcessRequest {
                    container_id: id,
                    exec_id: exec_id,
                    signal: 15_u32,
                }
            )?;
            let end = call!(
                self.agent,
                wait_process,
                WaitProcessRequest {
                    container_id: id,
                    exec_id: exec_id
                }
            )?;
            assert_eq!(end.status, 7, "{id}");
            call!(
                self.agent,
                remove_container,
                RemoveContainerRequest {
                    container_id: id,
                    timeout: 9_u32
                }
            )?;
            let gone = call!(
                self.agent,
                remove_container,
                RemoveContainerRequest { container_id: id }
            );
            refused!(NOT_FOUND, id, gone);
        }
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", self.rig.pid()?))?;
        assert!(!mounts.contains("/shared/containers/"), "{mounts}");
        call!(
            self.agent,
            remove_stale_virtiofs_share_mounts,
            RemoveStaleVirtiofsShareMountsRequest {}
        )?;
        Ok(())
    }

    async fn network(&self) -> Result<()> {
        self.rig.ip("link add card type veth peer name other")?;
        self.rig.ip("link set card address 02:00:00:00:00:09")?;
        let address = types::IPAddress {
            address: "10.9.0.2".to_owned(),
            mask: "24".to_owned(),
            ..types::IPAddress::default()
        };
        let interface = types::Interface {
            name: "eth0".to_owned(),
            hwAddr: "02:00:00:00:00:09".to_owned(),
            mtu: 1400,
            IPAddresses: vec![address.clone()],
            ..types::Interface::default()
        };
        let now = call!(
            self.agent,
            update_interface,
            UpdateInterfaceRequest {
                interface: Some(interface)
            }
        )?;
        assert_eq!((now.name.as_str(), now.mtu), ("eth0", 1400));
        let bad = types::Interface {
            name: "eth1".to_owned(),
            ..types::Interface::default()
        };
        let bad = call!(
            self.agent,
            update_interface,
            UpdateInterfaceRequest {
                interface: Some(bad)
            }
        );
        refused!(INVALID, "hwAddr", bad);
        let listed = call!(self.agent, list_interfaces, ListInterfacesRequest {})?;
        assert!(listed.Interfaces.iter().any(|one| one.name == "eth0"));
        self.rig.ip("link set other up")?;
        let route = |device: &str| types::Route {
            dest: String::new(),
            gateway: "10.9.0.1".to_owned(),
            device: device.to_owned(),
            ..types::Route::default()
        };
        let routes = |device: &str| Routes {
            Routes: vec![route(device)],
            ..Routes::default()
        };
        let set = call!(
            self.agent,
            update_routes,
            UpdateRoutesRequest {
                routes: Some(routes("eth0"))
            }
        )?;
        let has = |routes: &Routes| routes.Routes.iter().any(|one| one.gateway == "10.9.0.1");
        assert!(has(&set), "{set:?}");
        let none = call!(
            self.agent,
            update_routes,
            UpdateRoutesRequest {
                routes: Some(routes("eth7"))
            }
        );
        refused!(NOT_FOUND, "eth7", none);
        assert!(has(&call!(self.agent, list_routes, ListRoutesRequest {})?));
        let neighbour = |device: &str| ARPNeighbors {
            ARPNeighbors: vec![types::ARPNeighbor {
                toIPAddress: MessageField::some(types::IPAddress {
                    address: "10.9.0.1".to_owned(),
                    ..address.clone()
                }),
                device: device.to_owned(),
                lladdr: "02:00:00:00:00:77".to_owned(),
                ..types::ARPNeighbor::default()
            }],
            ..ARPNeighbors::default()
        };
        call!(
            self.agent,
            add_arp_neighbors,
            AddARPNeighborsRequest {
                neighbors: Some(neighbour("eth0"))
            }
        )?;
        assert!(
            self.rig
                .ip("neigh show dev eth0")?
                .contains("02:00:00:00:00:77")
        );
        let none = call!(
            self.agent,
            add_arp_neighbors,
            AddARPNeighborsRequest {
                neighbors: Some(neighbour("eth7"))
            }
        );
        refused!(NOT_FOUND, "eth7", none);

        // The host's links to its programs, which the agent's root needs too.
        let links = self.rig.path().join("etc/alternatives");
        fs::create_dir_all(&links)?;
        for entry in fs::read_dir("/etc/alternatives").into_iter().flatten() {
            let entry = entry?;
            if entry.file_name().to_string_lossy().contains("tables") {
                symlink(fs::read_link(entry.path())?, links.join(entry.file_name()))?;
            }
        }
        for is_ipv6 in [false, true] {
            let tool = if is_ipv6 {
                "/usr/sbin/ip6tables-save"
            } else {
                "/usr/sbin/iptables-save"
            };
            let get = call!(
                self.agent,
                get_ip_tables,
                GetIPTablesRequest { is_ipv6: is_ipv6 }
            );
            let set = SetIPTablesRequest {
                is_ipv6,
                data: b"*filter\n-A INPUT -p tcp --dport 99 -j DROP\nCOMMIT\n".to_vec(),
                ..SetIPTablesRequest::default()
            };
            let set = self.agent.set_ip_tables(ctx(), &set).await;
            // The program may be there for a kernel that lacks its part.
            let there = fs::exists(tool)?;
            let works = there && Command::new(tool).output()?.status.success();
            if there && !works {
                refused!(INTERNAL, "tables-save", get);
                refused!(INTERNAL, "tables-restore", set);
            } else if works {
                get?;
                set?;
                let now = call!(
                    self.agent,
                    get_ip_tables,
                    GetIPTablesRequest { is_ipv6: is_ipv6 }
                )?;
                let now = String::from_utf8(now.data)?;
                assert!(now.contains("--dport 99"), "{now}");
            } else {
                refused!(UNIMPLEMENTED, "tables-save", get);
                refused!(UNIMPLEMENTED, "tables-restore", set);
            }
        }
        Ok(())
    }

    async fn files(&self) -> Result<()> {
        let path = "/run/kata-containers/shared/containers/copied/file";
        let owner = i32::try_from(rustix::process::getuid().as_raw())?;
        let copy = |path: &str| CopyFileRequest {
            path: path.to_owned(),
            file_size: 5,
            file_mode: 0o100_644,
            dir_mode: 0o755,
            uid: owner,
            gid: owner,
            data: b"words".to_vec(),
            ..CopyFileRequest::default()
        };
        self.agent.copy_file(ctx(), &copy(path)).await?;
        let seen = format!("/proc/{}/root{path}", self.rig.pid()?);
        assert_eq!(fs::read(&seen)?, b"words");
        refused!(
            INVALID,
            "/etc/x",
            self.agent.copy_file(ctx(), &copy("/etc/x")).await
        );
        Ok(())
    }

    /// What makes no sense here is refused with the reason.
    async fn refused(&self) {
        let none = UNIMPLEMENTED;
        refused!(
            none,
            "no swap",
            call!(self.agent, add_swap, AddSwapRequest { PCIPath: vec![1] })
        );
        refused!(
            none,
            "no swap",
            call!(
                self.agent,
                add_swap_path,
                AddSwapPathRequest { path: "/dev/vdb" }
            )
        );
        refused!(
            none,
            "policy",
            call!(self.agent, set_policy, SetPolicyRequest { policy: "x" })
        );
        refused!(
            none,
            "mem-agent",
            call!(self.agent, mem_agent_memcg_set, MemAgentMemcgConfig {})
        );
        refused!(
            none,
            "mem-agent",
            call!(self.agent, mem_agent_compact_set, MemAgentCompactConfig {})
        );
        refused!(
            none,
            "probing",
            call!(
                self.agent,
                mem_hotplug_by_probe,
                MemHotplugByProbeRequest {}
            )
        );
    }

    async fn end(&self) -> Result<()> {
        // It waits for an event that does not come, and holds nobody up.
        let agent = self.agent.clone();
        let asked = tokio::spawn(async move { call!(agent, get_oom_event, GetOOMEventRequest {}) });
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        assert!(!asked.is_finished());
        call!(self.agent, destroy_sandbox, DestroySandboxRequest {})?;
        asked.abort();
        Ok(())
    }
}
