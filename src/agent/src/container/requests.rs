// SPDX-License-Identifier: Apache-2.0
//! Calls about a container that exists.

use std::fs;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use protocols::agent::agent::{
    CloseStdinRequest, ExecProcessRequest, NetworkStats, ReadStreamRequest, SignalProcessRequest,
    StatsContainerRequest, StatsContainerResponse, TtyWinResizeRequest, UpdateContainerRequest,
    WaitProcessRequest, WriteStreamRequest,
};

use super::stdio::Output;
use super::{Container, Entry, Process, Stage};
use crate::engine;
use crate::error::{AgentError, Kind, Result};
use crate::passfd;
use crate::reaper::{ExitCode, ended};
use crate::sandbox::Sandbox;
use crate::task::blocking;

/// ExecProcess.
///
/// # Errors
///
/// An exec id that is taken, a container that does not run, or the first step that failed.
pub(crate) async fn exec(sandbox: &Sandbox, request: ExecProcessRequest) -> Result<()> {
    let container = sandbox.container(&request.container_id)?;
    let process = request
        .process
        .as_ref()
        .ok_or_else(|| AgentError::invalid("process: missing"))?;
    let plan = engine::process(process, Some(&container.plan))?;
    container.takes_execs()?;
    let place = Place::take(&container, &request.exec_id)?;
    let ports = [request.stdin_port, request.stdout_port, request.stderr_port];
    let connected = passfd::take(sandbox.arrivals.as_deref(), ports).await?;
    let cgroup = container.cgroup.of_process(container.init.pid())?;
    let launched = sandbox
        .launcher
        .exec(plan, cgroup.as_fd(), container.init.pidfd())
        .await?;
    let (process, gate) = Process::new(launched, sandbox.pipe_size, connected)?;
    gate.executed().await?;
    place.fill(process);
    Ok(())
}

/// An exec id that is taken until the process exists or could not be started.
struct Place<'a> {
    container: &'a Container,
    exec_id: String,
}

impl<'a> Place<'a> {
    fn take(container: &'a Container, exec_id: &str) -> Result<Self> {
        let exec_id = container.normal(exec_id).to_owned();
        let mut processes = container.processes();
        if processes.contains_key(&exec_id) {
            return Err(AgentError::new(
                Kind::AlreadyExists,
                format!(
                    "container {:?} has a process {exec_id:?} already",
                    container.id
                ),
            ));
        }
        processes.insert(exec_id.clone(), Entry::Starting);
        drop(processes);
        Ok(Self { container, exec_id })
    }

    fn fill(self, process: Process) {
        let entry = Entry::Live(Arc::new(process));
        self.container
            .processes()
            .insert(self.exec_id.clone(), entry);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut processes = self.container.processes();
        if matches!(processes.get(&self.exec_id), Some(Entry::Starting)) {
            processes.remove(&self.exec_id);
        }
    }
}

impl Container {
    fn takes_execs(&self) -> Result<()> {
        let state = match &*self.stage() {
            Stage::Created(_) => "is not started",
            Stage::Started if self.init.has_ended() => "has ended",
            Stage::Started if self.cgroup.is_frozen() => "is paused",
            Stage::Started => return Ok(()),
            Stage::Removed => "is removed",
        };
        Err(AgentError::precondition(format!(
            "container {:?} {state}",
            self.id
        )))
    }
}

/// SignalProcess. SIGKILL without an exec id means every process of the container. SIGTERM to a
/// first process that has no handler for it, which the kernel would drop, becomes SIGKILL.
///
/// # Errors
///
/// A process that does not exist or has ended, or a number that is no signal.
pub(crate) fn signal(sandbox: &Sandbox, request: &SignalProcessRequest) -> Result<()> {
    let container = sandbox.container(&request.container_id)?;
    let process = container.process(&request.exec_id)?;
    let signal = i32::try_from(request.signal)
        .map_err(|_| AgentError::invalid(format!("signal {} does not exist", request.signal)))?;
    if request.exec_id.is_empty() && signal == libc::SIGKILL {
        return container.cgroup.kill();
    }
    let is_init = Arc::ptr_eq(&process, &container.init);
    if is_init && signal == libc::SIGTERM && process.would_drop(signal) {
        return process.signal(libc::SIGKILL);
    }
    process.signal(signal)
}

/// WaitProcess: the exit status, once. A second wait answers NOT_FOUND.
///
/// # Errors
///
/// A process that does not exist, or whose status was taken.
pub(crate) async fn wait(sandbox: &Sandbox, request: &WaitProcessRequest) -> Result<ExitCode> {
    let container = sandbox.container(&request.container_id)?;
    let process = container.process(&request.exec_id)?;
    let exec_id = container.normal(&request.exec_id);
    if matches!(container.processes().get(exec_id), Some(Entry::Waited(_))) {
        return Err(container.no_process(&request.exec_id));
    }
    let end = ended(&process.exit).await;
    process.carried().await;
    container.waited(exec_id);
    Ok(end.code)
}

/// UpdateContainer.
///
/// # Errors
///
/// A limit that can't be applied.
pub(crate) async fn update(sandbox: &Sandbox, request: UpdateContainerRequest) -> Result<()> {
    let container = sandbox.container(&request.container_id)?;
    let change = Arc::clone(&container.change).lock_owned().await;
    // Below what is in use, a new memory limit has the writer wait until enough is reclaimed.
    blocking(move || {
        let _change = change;
        container.cgroup.update(request.resources.get_or_default())
    })
    .await
}

/// PauseContainer and ResumeContainer.
///
/// # Errors
///
/// Processes that can't be stopped.
pub(crate) async fn freeze(sandbox: &Sandbox, id: &str, frozen: bool) -> Result<()> {
    let container = sandbox.container(id)?;
    let _change = container.change.lock().await;
    container.cgroup.freeze(frozen).await
}

/// StatsContainer.
///
/// # Errors
///
/// A container that does not exist.
pub(crate) fn stats(
    sandbox: &Sandbox,
    request: &StatsContainerRequest,
) -> Result<StatsContainerResponse> {
    let container = sandbox.container(&request.container_id)?;
    let interfaces = match container.own_network {
        true => fs::read_to_string(format!("/proc/{}/net/dev", container.init.pid())),
        false => fs::read_to_string("/proc/self/net/dev"),
    };
    Ok(StatsContainerResponse {
        cgroup_stats: Some(container.cgroup.stats()).into(),
        network_stats: network(&interfaces.unwrap_or_default()),
        ..StatsContainerResponse::default()
    })
}

/// Lines such as `  eth0: 10 1 0 0 0 0 0 0 20 2 0 0 0 0 0 0`; loopback is nobody's traffic.
pub(super) fn network(text: &str) -> Vec<NetworkStats> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim() != "lo")
        .filter_map(|(name, counters)| {
            let counters: Vec<u64> = counters
                .split_whitespace()
                .map(str::parse)
                .collect::<std::result::Result<_, _>>()
                .ok()?;
            let counter = |index: usize| counters.get(index).copied();
            Some(NetworkStats {
                name: name.trim().to_owned(),
                rx_bytes: counter(0)?,
                rx_packets: counter(1)?,
                rx_errors: counter(2)?,
                rx_dropped: counter(3)?,
                tx_bytes: counter(8)?,
                tx_packets: counter(9)?,
                tx_errors: counter(10)?,
                tx_dropped: counter(11)?,
                ..NetworkStats::default()
            })
        })
        .collect()
}

/// WriteStdin; no data means the end of input. The answer is the length.
///
/// # Errors
///
/// Standard input that is closed, by either side.
pub(crate) async fn write_stdin(sandbox: &Sandbox, request: &WriteStreamRequest) -> Result<u32> {
    let process = sandbox
        .container(&request.container_id)?
        .process(&request.exec_id)?;
    if request.data.is_empty() {
        process.stdio.close_stdin().await;
        return Ok(0);
    }
    process.stdio.write(&request.data, &process.exit).await?;
    Ok(u32::try_from(request.data.len()).unwrap_or(u32::MAX))
}

/// ReadStdout and ReadStderr; no data means the end of output.
///
/// # Errors
///
/// A process that does not exist, or whose output was read to its end after its exit.
pub(crate) async fn read(
    sandbox: &Sandbox,
    request: &ReadStreamRequest,
    output: Output,
) -> Result<Vec<u8>> {
    let process = sandbox
        .container(&request.container_id)?
        .process(&request.exec_id)?;
    process.stdio.read(output, request.len, &process.exit).await
}

/// CloseStdin.
///
/// # Errors
///
/// A process that does not exist.
pub(crate) async fn close_stdin(sandbox: &Sandbox, request: &CloseStdinRequest) -> Result<()> {
    let process = sandbox
        .container(&request.container_id)?
        .process(&request.exec_id)?;
    process.stdio.close_stdin().await;
    Ok(())
}

/// TtyWinResize.
///
/// # Errors
///
/// UNAVAILABLE for a process without a terminal.
pub(crate) fn resize(sandbox: &Sandbox, request: &TtyWinResizeRequest) -> Result<()> {
    let process = sandbox
        .container(&request.container_id)?
        .process(&request.exec_id)?;
    engine::resize_terminal(process.stdio.terminal()?, request.row, request.column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_interface_counters() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 \
                    0 0 0 0 0 0\n  eth0: 10 1 2 3 0 0 0 0 20 2 4 5 0 0 0 0\n";
        let stats = network(text);
        assert_eq!(stats.len(), 1);
        let eth0 = &stats[0];
        assert_eq!(
            (
                eth0.name.as_str(),
                eth0.rx_bytes,
                eth0.tx_bytes,
                eth0.tx_dropped
            ),
            ("eth0", 10, 20, 5)
        );
    }
}
