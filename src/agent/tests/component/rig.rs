// SPDX-License-Identifier: Apache-2.0
//! An agent as PID 1 of namespaces of its own, in a root folder like the guest image's, and a
//! client that speaks the protocol to it.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    CloseStdinRequest, CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest,
    ReadStreamRequest, RemoveContainerRequest, SignalProcessRequest, StartContainerRequest,
    StatsContainerRequest, WaitProcessRequest, WriteStreamRequest,
};
use protocols::agent::agent_ttrpc::AgentServiceClient;
use protocols::agent::health_ttrpc::HealthClient;
use protocols::agent::oci;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::Client;
use ttrpc::context::{Context, with_timeout};

/// Mounts the image's folders, leaves the host's root and becomes the agent.
const SCRIPT: &str = r#"
set -e
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount --bind -o ro /usr "$ROOT/usr"
cd "$ROOT"
pivot_root . old
/usr/bin/busybox umount -l /old
export KATA_AGENT_SERVER_ADDR=unix:///share/agent.sock
exec /sbin/init
"#;

/// Far longer than anything takes on a slow machine.
const LONG: Duration = Duration::from_secs(60);

/// A running agent.
pub struct Rig {
    process: Running,
    root: TempDir,
    pub agent: AgentServiceClient,
    pub health: HealthClient,
}

/// The agent's process. Dropping it ends all that it started.
struct Running {
    process: Child,
    cgroup: PathBuf,
}

/// A process's output and exit status.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub status: i32,
}

impl Rig {
    /// Starts an agent and creates a sandbox in it.
    pub async fn new() -> Result<Self> {
        let rig = Self::bare().await?;
        let request = CreateSandboxRequest {
            hostname: "pod".to_owned(),
            ..CreateSandboxRequest::default()
        };
        rig.agent.create_sandbox(ctx(), &request).await?;
        Ok(rig)
    }

    /// Starts an agent with kernel parameters, and creates a sandbox in it.
    pub async fn with(parameters: &str) -> Result<Self> {
        let rig = Self::boot(parameters).await?;
        let request = CreateSandboxRequest::default();
        rig.agent.create_sandbox(ctx(), &request).await?;
        Ok(rig)
    }

    /// Starts an agent.
    pub async fn bare() -> Result<Self> {
        Self::boot("").await
    }

    async fn boot(parameters: &str) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "component tests need root"
        );
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = tempfile::Builder::new()
            .prefix("kata-agent-")
            .tempdir_in("/tmp")?;
        for folder in [
            "dev", "proc", "sys", "run", "tmp", "etc", "var", "sbin", "usr", "share", "old",
        ] {
            fs::create_dir(root.path().join(folder))?;
        }
        for link in ["lib", "lib64"] {
            symlink(format!("usr/{link}"), root.path().join(link))?;
        }
        fs::copy(agent(), root.path().join("sbin/init"))?;
        let cgroup = cgroup_mount()?.join(format!("kata-agent-{}-{number}", std::process::id()));
        fs::create_dir(&cgroup).context("cgroup")?;
        delegate(&cgroup)?;
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(
                "echo $$ > \"$CGROUP/cgroup.procs\"; exec setpriv --pdeathsig KILL unshare --mount --pid --net --uts --ipc \
                 --cgroup --fork --kill-child sh -c \"$SCRIPT\"",
            )
            .env("CGROUP", &cgroup)
            .env("ROOT", root.path())
            .env("SCRIPT", SCRIPT)
            .env("KATA_AGENT_PARAMETERS", parameters)
            .stdin(Stdio::null());
        if let Ok(level) = std::env::var("AGENT_LOG") {
            command.env("KATA_AGENT_LOG_LEVEL", level);
        }
        let process = Running {
            process: command.spawn()?,
            cgroup,
        };
        let socket = root.path().join("share/agent.sock");
        let address = format!("unix://{}", socket.display());
        let connect = async {
            loop {
                match Client::connect(&address).await {
                    Ok(client) => return client,
                    Err(_) => sleep(Duration::from_millis(10)).await,
                }
            }
        };
        let client = timeout(LONG, connect)
            .await
            .context("the agent does not listen")?;
        // The guest's hierarchy has no process in its root; elsewhere controllers want it so.
        let leaf = process.cgroup.join("agent");
        fs::create_dir(&leaf)?;
        for pid in fs::read_to_string(process.cgroup.join("cgroup.procs"))?.lines() {
            fs::write(leaf.join("cgroup.procs"), pid).context("move into the leaf")?;
        }
        Ok(Self {
            process,
            root,
            agent: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
        })
    }

    /// A folder that both sides see; the agent sees it as `/share/NAME`.
    pub fn share(&self, name: &str) -> PathBuf {
        self.root.path().join("share").join(name)
    }

    /// Makes a busybox root file system; the result is its path in the agent's root.
    pub fn rootfs(&self, name: &str) -> Result<String> {
        let root = self.share(name);
        for folder in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(if folder == "tmp" { 0o1777 } else { 0o755 })
                .create(root.join(folder))?;
        }
        fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        fs::copy("/usr/bin/busybox", root.join("bin/busybox"))?;
        let list = Command::new("/usr/bin/busybox").arg("--list").output()?;
        for applet in String::from_utf8(list.stdout)?.lines() {
            let _ = symlink("busybox", root.join("bin").join(applet));
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )?;
        Ok(format!("/share/{name}"))
    }

    /// A spec like containerd's default one, for `args`.
    pub fn spec(&self, name: &str, args: &[&str]) -> Result<oci::Spec> {
        Ok(default_spec(&self.rootfs(name)?, args))
    }

    /// Creates a container.
    pub async fn create(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<()> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            OCI: MessageField::some(spec),
            ..CreateContainerRequest::default()
        };
        self.agent.create_container(ctx(), &request).await.map(drop)
    }

    /// Creates a container that shares the pids of its pod.
    pub async fn create_sharing(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<()> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            OCI: MessageField::some(spec),
            sandbox_pidns: true,
            ..CreateContainerRequest::default()
        };
        self.agent.create_container(ctx(), &request).await.map(drop)
    }

    pub async fn start(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
            ..StartContainerRequest::default()
        };
        self.agent.start_container(ctx(), &request).await.map(drop)
    }

    pub async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
            ..RemoveContainerRequest::default()
        };
        self.agent.remove_container(ctx(), &request).await.map(drop)
    }

    pub async fn exec(&self, id: &str, exec_id: &str, process: oci::Process) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: MessageField::some(process),
            ..ExecProcessRequest::default()
        };
        self.agent.exec_process(ctx(), &request).await.map(drop)
    }

    pub async fn signal(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            ..SignalProcessRequest::default()
        };
        self.agent.signal_process(ctx(), &request).await.map(drop)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<i32> {
        let request = WaitProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..WaitProcessRequest::default()
        };
        self.agent
            .wait_process(ctx(), &request)
            .await
            .map(|response| response.status)
    }

    pub async fn write(&self, id: &str, exec_id: &str, data: &[u8]) -> ttrpc::Result<u32> {
        let request = WriteStreamRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            data: data.to_vec(),
            ..WriteStreamRequest::default()
        };
        self.agent
            .write_stdin(ctx(), &request)
            .await
            .map(|response| response.len)
    }

    pub async fn close_stdin(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        let request = CloseStdinRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..CloseStdinRequest::default()
        };
        self.agent.close_stdin(ctx(), &request).await.map(drop)
    }

    pub async fn read_once(&self, id: &str, exec_id: &str, stderr: bool) -> ttrpc::Result<Vec<u8>> {
        let request = ReadStreamRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            len: 32 << 10,
            ..ReadStreamRequest::default()
        };
        let response = if stderr {
            self.agent.read_stderr(ctx(), &request).await?
        } else {
            self.agent.read_stdout(ctx(), &request).await?
        };
        Ok(response.data)
    }

    pub async fn read_all(&self, id: &str, exec_id: &str, stderr: bool) -> ttrpc::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let data = self.read_once(id, exec_id, stderr).await?;
            if data.is_empty() {
                return Ok(all);
            }
            all.extend(data);
        }
    }

    /// Reads both outputs to their ends and waits.
    pub async fn outcome(&self, id: &str, exec_id: &str) -> Result<Outcome> {
        let (stdout, stderr) = tokio::try_join!(
            self.read_all(id, exec_id, false),
            self.read_all(id, exec_id, true)
        )?;
        let status = self.wait(id, exec_id).await?;
        Ok(Outcome {
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            status,
        })
    }

    /// Creates, starts, reads and removes.
    pub async fn run(&self, id: &str, spec: oci::Spec) -> Result<Outcome> {
        self.create(id, spec).await?;
        self.start(id).await?;
        let outcome = self.outcome(id, "").await?;
        self.remove(id).await?;
        Ok(outcome)
    }

    /// The processor time that a container has used, in nanoseconds.
    pub async fn processor_time(&self, id: &str) -> ttrpc::Result<u64> {
        let request = StatsContainerRequest {
            container_id: id.to_owned(),
            ..StatsContainerRequest::default()
        };
        let stats = self.agent.stats_container(ctx(), &request).await?;
        Ok(stats.cgroup_stats.cpu_stats.cpu_usage.total_usage)
    }

    /// Runs iproute2's `ip` in the agent's network namespace; the result is what it prints.
    pub fn ip(&self, words: &str) -> Result<String> {
        let output = Command::new("nsenter")
            .arg(format!("--net=/proc/{}/ns/net", self.pid()?))
            .arg("ip")
            .args(words.split_whitespace())
            .output()?;
        ensure!(output.status.success(), "ip {words}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The cgroup that is the root of the agent's hierarchy.
    pub fn cgroup(&self, name: &str) -> PathBuf {
        self.process.cgroup.join(name)
    }

    /// The agent's root folder.
    pub fn path(&self) -> &Path {
        self.root.path()
    }

    /// How many descriptors the agent has open.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()?))?.count())
    }

    /// How many children the agent has.
    pub fn children(&self) -> Result<usize> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid()?);
        Ok(fs::read_to_string(path)?.split_whitespace().count())
    }

    /// The agent's pid as the host sees it.
    pub fn pid(&self) -> Result<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.process.process.id());
        Ok(fs::read_to_string(path)?.trim().parse()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = self.process.kill();
        let _ = self.process.wait();
        for _ in 0..100 {
            if remove_tree(&self.cgroup).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove_tree(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.path().is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Passes every controller of the host on to `cgroup`.
fn delegate(cgroup: &Path) -> Result<()> {
    let root = cgroup_mount()?;
    for name in fs::read_to_string(root.join("cgroup.controllers"))?.split_whitespace() {
        // One that is bound to a v1 hierarchy or has no use here stays behind.
        let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{name}"));
    }
    ensure!(
        std::env::var_os("AGENT_ANY_CGROUP").is_some() || cgroup.join("memory.max").exists(),
        "no memory controller for {cgroup:?}"
    );
    Ok(())
}

/// The agent of this build, or the one to be measured.
fn agent() -> PathBuf {
    let named = std::env::var_os("NUTSHELL_TEST_AGENT");
    named.map_or_else(|| env!("CARGO_BIN_EXE_kata-agent").into(), Into::into)
}

fn cgroup_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .context("this host has no cgroup2")?;
    Ok(PathBuf::from(mount[1]))
}

pub fn ctx() -> Context {
    with_timeout(LONG.as_nanos() as i64)
}

/// Waits until `check` holds. The limit is for a machine that is slow beyond measure.
pub async fn eventually(what: &str, check: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let asked = async {
        while !check().await? {
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    timeout(LONG, asked)
        .await
        .with_context(|| format!("never: {what}"))?
}

pub fn texts(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The code and message of a refused call.
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (i32, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code.value(), status.message),
        other => panic!("not refused: {other:?}"),
    }
}

pub fn process(args: &[&str]) -> oci::Process {
    let capabilities = texts(&[
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ]);
    oci::Process {
        Args: texts(args),
        Env: texts(&["PATH=/usr/local/bin:/usr/bin:/bin"]),
        Cwd: "/".to_owned(),
        User: MessageField::some(oci::User::default()),
        Capabilities: MessageField::some(oci::LinuxCapabilities {
            Bounding: capabilities.clone(),
            Effective: capabilities.clone(),
            Permitted: capabilities,
            ..oci::LinuxCapabilities::default()
        }),
        Rlimits: vec![oci::POSIXRlimit {
            Type: "RLIMIT_NOFILE".to_owned(),
            Soft: 1024,
            Hard: 2048,
            ..oci::POSIXRlimit::default()
        }],
        NoNewPrivileges: true,
        ..oci::Process::default()
    }
}

pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.to_owned(),
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: texts(options),
        ..oci::Mount::default()
    }
}

pub fn default_spec(root: &str, args: &[&str]) -> oci::Spec {
    let namespace = |kind: &str| oci::LinuxNamespace {
        Type: kind.to_owned(),
        ..oci::LinuxNamespace::default()
    };
    oci::Spec {
        Version: "1.0.2".to_owned(),
        Process: MessageField::some(process(args)),
        Root: MessageField::some(oci::Root {
            Path: root.to_owned(),
            ..oci::Root::default()
        }),
        Hostname: "box".to_owned(),
        Mounts: vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount(
                "/dev",
                "tmpfs",
                "tmpfs",
                &["nosuid", "strictatime", "mode=755", "size=65536k"],
            ),
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
                    "gid=5",
                ],
            ),
            mount(
                "/dev/shm",
                "tmpfs",
                "shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            ),
            mount(
                "/dev/mqueue",
                "mqueue",
                "mqueue",
                &["nosuid", "noexec", "nodev"],
            ),
            mount(
                "/sys",
                "sysfs",
                "sysfs",
                &["nosuid", "noexec", "nodev", "ro"],
            ),
            mount(
                "/sys/fs/cgroup",
                "cgroup",
                "cgroup",
                &["nosuid", "noexec", "nodev", "relatime", "ro"],
            ),
            mount("/run", "tmpfs", "tmpfs", &["nosuid", "mode=755"]),
        ],
        Linux: MessageField::some(oci::Linux {
            CgroupsPath: String::new(),
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
            MaskedPaths: texts(&[
                "/proc/acpi",
                "/proc/kcore",
                "/proc/keys",
                "/proc/timer_list",
                "/sys/firmware",
                "/proc/scsi",
            ]),
            ReadonlyPaths: texts(&["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"]),
            ..oci::Linux::default()
        }),
        ..oci::Spec::default()
    }
}
