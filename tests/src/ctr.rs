// SPDX-License-Identifier: Apache-2.0
//! containerd's own client, as its users type it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{Output, Running};
use crate::wait::until;

/// For a call that is to end by itself. The dev VM is slow, and its host may be busy.
pub const LIMIT: Duration = Duration::from_secs(60);
/// containerd's namespace of the suites.
pub const NAMESPACE: &str = "default";
/// The namespace of its CRI plugin.
pub const CRI_NAMESPACE: &str = "k8s.io";

const RUNTIME: &str = "NUTSHELL_TEST_RUNTIME";
const IMAGE: &str = "NUTSHELL_TEST_IMAGE";
/// Read by `ctr` too.
const ADDRESS: &str = "CONTAINERD_ADDRESS";

/// `ctr` with an address, a runtime and an image.
#[derive(Debug, Clone)]
pub struct Ctr {
    program: PathBuf,
    address: PathBuf,
    namespace: String,
    runtime: String,
    image: String,
}

impl Ctr {
    /// The machine's containerd; runtime and image as the environment says, ours and busybox by
    /// default.
    #[must_use]
    pub fn from_env() -> Self {
        let or = |name, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
        Self {
            program: "ctr".into(),
            address: or(ADDRESS, "/run/containerd/containerd.sock").into(),
            namespace: NAMESPACE.to_owned(),
            runtime: or(RUNTIME, "io.containerd.kata.v2"),
            image: or(IMAGE, "docker.io/library/busybox:latest"),
        }
    }

    /// The same of another containerd.
    #[must_use]
    pub fn at(&self, address: &Path) -> Self {
        Self {
            address: address.to_owned(),
            ..self.clone()
        }
    }

    /// The same with the program of a folder, if there is one.
    #[must_use]
    pub fn of(&self, programs: Option<&Path>) -> Self {
        Self {
            program: programs.map_or_else(|| self.program.clone(), |folder| folder.join("ctr")),
            ..self.clone()
        }
    }

    /// The same in another namespace.
    #[must_use]
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            ..self.clone()
        }
    }

    /// The same with another runtime.
    #[must_use]
    pub fn with_runtime(&self, runtime: &str) -> Self {
        Self {
            runtime: runtime.to_owned(),
            ..self.clone()
        }
    }

    /// containerd's socket.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// The runtime's name.
    #[must_use]
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// The image of the containers.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Whether containers of this runtime have a machine of their own.
    #[must_use]
    pub fn has_vm(&self) -> bool {
        self.runtime != "io.containerd.runc.v2"
    }

    /// A `ctr` command.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--address")
            .arg(&self.address)
            .args(["--namespace", &self.namespace]);
        command.args(arguments);
        command
    }

    /// Starts a `ctr` command.
    pub fn start(&self, arguments: &[&str]) -> Result<Running> {
        Running::start(&mut self.command(arguments))
    }

    /// Runs a `ctr` command to its end, with empty standard input.
    pub fn call(&self, arguments: &[&str]) -> Result<Output> {
        let mut running = self.start(arguments)?;
        running.close_stdin();
        running.finish(LIMIT)
    }

    /// The `ctr run` command of a container.
    #[must_use]
    pub fn run_command(&self, flags: &[&str], id: &str, argv: &[&str]) -> Command {
        let mut command = self.command(&["run", "--runtime", &self.runtime]);
        command.args(flags).args([&self.image, id]).args(argv);
        command
    }

    /// Starts `ctr run --rm`.
    pub fn start_run(&self, flags: &[&str], id: &str, argv: &[&str]) -> Result<Running> {
        let flags = [&["--rm"], flags].concat();
        Running::start(&mut self.run_command(&flags, id, argv))
    }

    /// `ctr run --rm`, with empty standard input.
    pub fn run(&self, flags: &[&str], id: &str, argv: &[&str]) -> Result<Output> {
        let mut running = self.start_run(flags, id, argv)?;
        running.close_stdin();
        running.finish(LIMIT)
    }

    /// `ctr run --rm` of a shell's script.
    pub fn run_script(&self, flags: &[&str], id: &str, script: &str) -> Result<Output> {
        self.run(flags, id, &["sh", "-c", script])
    }

    /// Starts `ctr run --rm` of a bundle's specification and root filesystem.
    pub fn start_config(&self, config: &Path, id: &str) -> Result<Running> {
        let config = config.to_str().context("not UTF-8")?;
        self.start(&[
            "run",
            "--rm",
            "--runtime",
            &self.runtime,
            "--config",
            config,
            id,
        ])
    }

    /// The same to its end, with empty standard input.
    pub fn run_config(&self, config: &Path, id: &str) -> Result<Output> {
        let mut running = self.start_config(config, id)?;
        running.close_stdin();
        running.finish(LIMIT)
    }

    /// `ctr run -d`: the container goes on by itself.
    pub fn run_detached(&self, flags: &[&str], id: &str, argv: &[&str]) -> Result<()> {
        let flags = [&["-d"], flags].concat();
        let mut running = Running::start(&mut self.run_command(&flags, id, argv))?;
        running.close_stdin();
        running.finish(LIMIT)?.quietly().map(|_| ())
    }

    /// `ctr task exec` with an exec id of its own.
    pub fn exec(&self, flags: &[&str], id: &str, exec: &str, argv: &[&str]) -> Result<Output> {
        let mut running = self.start_exec(flags, id, exec, argv)?;
        running.close_stdin();
        running.finish(LIMIT)
    }

    /// Starts `ctr task exec`.
    pub fn start_exec(
        &self,
        flags: &[&str],
        id: &str,
        exec: &str,
        argv: &[&str],
    ) -> Result<Running> {
        Running::start(&mut self.exec_command(flags, id, exec, argv))
    }

    /// The `ctr task exec` command.
    #[must_use]
    pub fn exec_command(&self, flags: &[&str], id: &str, exec: &str, argv: &[&str]) -> Command {
        let mut command = self.command(&["task", "exec", "--exec-id", exec]);
        command.args(flags).arg(id).args(argv);
        command
    }

    /// `ctr task kill`.
    pub fn kill(&self, id: &str, signal: &str) -> Result<()> {
        self.call(&["task", "kill", "--signal", signal, id])?
            .quietly()
            .map(|_| ())
    }

    /// What `ctr task ls` says of a task: its process and its status.
    pub fn task(&self, id: &str) -> Result<Option<Task>> {
        let output = self.call(&["task", "ls"])?.exits(0)?;
        Ok(output.text().lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let (name, pid, status) = (words.next()?, words.next()?, words.next()?);
            (name == id).then(|| Task {
                pid: pid.parse().unwrap_or(0),
                status: status.to_owned(),
            })
        }))
    }

    /// Waits for a status of a task.
    pub fn wait_for_status(&self, id: &str, status: &str, limit: Duration) -> Result<()> {
        let mut last = None;
        until(&format!("task {id} {status}"), limit, || {
            last = self.task(id)?;
            Ok(last
                .as_ref()
                .is_some_and(|task| task.status == status)
                .then_some(()))
        })
        .with_context(|| format!("last seen: {last:?}"))
    }

    /// `ctr task delete` and `ctr container delete`; answers the task's exit code, which the
    /// former logs where it isn't 0.
    pub fn delete(&self, id: &str) -> Result<i32> {
        let task = self.call(&["task", "delete", id])?.exits(0)?;
        self.call(&["container", "delete", id])?.quietly()?;
        let words = String::from_utf8_lossy(&task.stderr);
        let code = words
            .trim_end()
            .rsplit_once("exit code ")
            .map(|(_, code)| code);
        code.map_or(Ok(0), |code| {
            code.trim_end_matches('"')
                .parse()
                .with_context(|| task.to_string())
        })
    }

    /// Names of the containers.
    pub fn containers(&self) -> Result<Vec<String>> {
        let output = self.call(&["container", "ls", "--quiet"])?.exits(0)?;
        Ok(output.text().lines().map(str::to_owned).collect())
    }

    /// Removes every container, by force; answers which there were.
    pub fn sweep(&self) -> Result<Vec<String>> {
        let left = self.containers()?;
        for id in &left {
            // Either may be gone already.
            self.call(&["task", "delete", "--force", id])?;
            self.call(&["container", "delete", id])?;
        }
        Ok(left)
    }
}

/// A line of `ctr task ls`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Process id that the runtime reports.
    pub pid: u32,
    /// `CREATED`, `RUNNING`, `PAUSED`, `STOPPED` or `UNKNOWN`.
    pub status: String,
}
