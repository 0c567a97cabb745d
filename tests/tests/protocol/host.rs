// SPDX-License-Identifier: Apache-2.0
//! The host's side: the machine, what it shares with its guest, and a look around inside.

use std::cell::{Cell, RefCell};
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    CreateContainerRequest, ExecProcessRequest, ReadStreamRequest, StartContainerRequest,
    WaitProcessRequest,
};
use protocols::agent::oci;
use tempfile::TempDir;
use tests::machine::{Cable, Machine, Program, Setup};
use tests::netlink::Interface;
use tests::sys;
use vmm::control::{ExitReason, RateLimits};

use crate::client::{Client, call};
use crate::spec;

/// Where the guest mounts the shared folder.
pub(crate) const SHARED: &str = "/run/kata-containers/shared/containers";
/// The container that looks around.
pub(crate) const PROBE: &str = "probe";
/// There it has the guest's processes,
const PROCESSES: &str = "/guest";
/// and with its init's root all that is mounted now.
pub(crate) const GUEST: &str = "/guest/1/root";

/// The guest's card, and the host's address at the other end of its wire.
pub(crate) const CARD: &str = "02:00:00:00:00:09";
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const TAP: &str = "tap0";

/// The port on which the agent serves.
const AGENT: u32 = 1024;

/// vCPUs and MiB that may come later.
pub(crate) const MOST_VCPUS: u8 = 2;
pub(crate) const MOST_MEMORY: u32 = 512;

/// A process's output and exit status.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) status: i32,
}

/// A booted guest and a client of its agent.
pub(crate) struct Host {
    pub(crate) machine: RefCell<Machine>,
    pub(crate) client: Client,
    shared: TempDir,
    looks: Cell<usize>,
}

impl Host {
    /// Boots a guest with one card, and connects to its agent.
    pub(crate) async fn boot(console: bool) -> Result<Self> {
        let shared = tempfile::tempdir()?;
        let taps = sys::open_tap(TAP, 1, libc::IFF_VNET_HDR)?;
        let tap = Interface::named(TAP)?;
        tap.up(None)?;
        tap.add_address(ADDRESS, 24)?;
        let machine = Machine::start(Setup {
            program: Program::Agent {
                shared: shared.path().to_owned(),
            },
            console,
            most_vcpus: MOST_VCPUS,
            most_memory: MOST_MEMORY,
            nets: vec![Cable {
                id: TAP.to_owned(),
                mac: MAC,
                mtu: None,
                taps,
                vhost: Vec::new(),
                receive: RateLimits::default(),
                transmit: RateLimits::default(),
            }],
            ..Setup::default()
        })?;
        let client = Client::new(machine.connect(AGENT)?)?;
        Ok(Self {
            machine: RefCell::new(machine),
            client,
            shared,
            looks: Cell::default(),
        })
    }

    /// A file or folder that both sides have: the guest below `SHARED`.
    pub(crate) fn shared(&self, name: &str) -> PathBuf {
        self.shared.path().join(name)
    }

    /// Makes a busybox root in the folder `place` of the shared one; the result is the guest's path of it.
    pub(crate) fn rootfs(&self, place: &str) -> Result<String> {
        let root = self.shared(place);
        for folder in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "guest"] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(root.join(folder))?;
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        fs::copy("/usr/bin/busybox", root.join("bin/busybox"))?;
        let list = Command::new("/usr/bin/busybox").arg("--list").output()?;
        for applet in String::from_utf8(list.stdout)?.lines() {
            if applet != "busybox" {
                symlink("busybox", root.join("bin").join(applet))?;
            }
        }
        Ok(format!("{SHARED}/{place}"))
    }

    /// Starts the container that looks around: it has the guest's network and sees all its files.
    pub(crate) async fn start_probe(&self) -> Result<()> {
        let mut spec = spec::of(
            &self.rootfs(&format!("passthrough/{PROBE}/rootfs"))?,
            &["sleep", "100000"],
        );
        spec.Mounts
            .push(spec::mount(PROCESSES, "bind", "/proc", &["bind"]));
        let linux = spec.Linux.mut_or_insert_default();
        linux.Namespaces.retain(|one| one.Type != "network");
        self.create(PROBE, spec).await?;
        self.start(PROBE).await?;
        Ok(())
    }

    /// What a script in the probe prints; it must succeed.
    pub(crate) async fn look(&self, script: &str) -> Result<String> {
        self.looks.set(self.looks.get().saturating_add(1));
        let exec_id = format!("look-{}", self.looks.get());
        let process = spec::process(&["sh", "-c", script]);
        call!(
            self.client.agent,
            exec_process,
            ExecProcessRequest {
                container_id: PROBE,
                exec_id: exec_id.clone(),
                process: MessageField::some(process),
            }
        )
        .with_context(|| script.to_owned())?;
        let outcome = self.outcome(PROBE, &exec_id).await?;
        ensure!(
            outcome.status == 0 && outcome.stderr.is_empty(),
            "{script}: {outcome:?}"
        );
        Ok(outcome.stdout.trim_end().to_owned())
    }

    pub(crate) async fn create(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<()> {
        call!(
            self.client.agent,
            create_container,
            CreateContainerRequest {
                container_id: id,
                OCI: MessageField::some(spec),
            }
        )
        .map(drop)
    }

    pub(crate) async fn start(&self, id: &str) -> ttrpc::Result<()> {
        call!(
            self.client.agent,
            start_container,
            StartContainerRequest { container_id: id }
        )
        .map(drop)
    }

    /// Reads both outputs to their ends and waits.
    pub(crate) async fn outcome(&self, id: &str, exec_id: &str) -> Result<Outcome> {
        let (stdout, stderr) = tokio::try_join!(
            self.read_all(id, exec_id, false),
            self.read_all(id, exec_id, true)
        )?;
        let waited = call!(
            self.client.agent,
            wait_process,
            WaitProcessRequest {
                container_id: id,
                exec_id: exec_id,
            }
        );
        Ok(Outcome {
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            status: waited?.status,
        })
    }

    async fn read_all(&self, id: &str, exec_id: &str, stderr: bool) -> ttrpc::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let data = self.read(id, exec_id, stderr, 32 << 10).await?;
            if data.is_empty() {
                return Ok(all);
            }
            all.extend(data);
        }
    }

    /// At most `len` bytes of an output; none are its end.
    pub(crate) async fn read(
        &self,
        id: &str,
        exec_id: &str,
        stderr: bool,
        len: u32,
    ) -> ttrpc::Result<Vec<u8>> {
        let agent = &self.client.agent;
        let response = if stderr {
            call!(
                agent,
                read_stderr,
                ReadStreamRequest {
                    container_id: id,
                    exec_id: exec_id,
                    len: len,
                }
            )
        } else {
            call!(
                agent,
                read_stdout,
                ReadStreamRequest {
                    container_id: id,
                    exec_id: exec_id,
                    len: len,
                }
            )
        };
        response.map(|response| response.data)
    }

    /// The guest must end by itself, in order.
    pub(crate) fn powers_off(&self) -> Result<()> {
        let ended = self.machine.borrow_mut().ended()?;
        ensure!(ended.reason == ExitReason::Shutdown, "{ended}");
        Ok(())
    }
}
