// SPDX-License-Identifier: Apache-2.0
//! CreateContainer: from the request to a first process that waits to execute.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex};

use protocols::agent::agent::CreateContainerRequest;
use protocols::agent::oci;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use super::{Container, Entry, Process, Stage};
use crate::cgroup::{Cgroup, OutOfMemory};
use crate::device;
use crate::engine::{self, ContainerPlan, Joins, Launched, Namespace};
use crate::error::{AgentError, Context as _, Result};
use crate::passfd::{self, Connected};
use crate::reaper::ended;
use crate::sandbox::{Pids, Sandbox};

/// Creates the container of `request`.
///
/// # Errors
///
/// What can't be honoured, a name that is taken, or the first step that failed; nothing is left
/// behind then.
pub(crate) async fn create(
    sandbox: &Arc<Sandbox>,
    mut request: CreateContainerRequest,
) -> Result<()> {
    check(&request)?;
    let spec = request
        .OCI
        .as_mut()
        .ok_or_else(|| AgentError::invalid("OCI: missing"))?;
    device::resolve(&request.devices, spec, sandbox.hotplug_timeout).await?;
    let (mut plan, joins) = engine::container(spec)?;
    plan.hooks.name(&request.container_id);
    let reservation = sandbox.reserve(&request.container_id)?;
    let pids = match (request.sandbox_pidns, is_pause(spec)) {
        (false, _) => Pids::Own,
        (true, true) => Pids::First,
        (true, false) => Pids::Shared,
    };
    let shared = sandbox.share_namespaces(&mut plan, pids).await?;
    plan.check_hostname()?;
    let ports = [request.stdin_port, request.stdout_port, request.stderr_port];
    let connected = passfd::take(sandbox.arrivals.as_deref(), ports).await?;

    let held = sandbox.storages.add(request.storages.clone()).await?;
    let built = build(sandbox, &request, plan, pids, joins, shared, connected).await;
    match built {
        Ok(mut container) => {
            container.held = Mutex::new(Some(held));
            debug!(container = request.container_id, "created");
            reservation.fill(container);
            Ok(())
        }
        Err(error) => {
            sandbox.storages.remove(held).await;
            Err(error)
        }
    }
}

async fn build(
    sandbox: &Arc<Sandbox>,
    request: &CreateContainerRequest,
    plan: ContainerPlan,
    pids: Pids,
    joins: Joins,
    shared: Vec<OwnedFd>,
    connected: Option<Connected>,
) -> Result<Container> {
    let linux = request.OCI.Linux.get_or_default();
    let mut namespaces = open_all(&joins)?;
    namespaces.extend(shared);
    let process_plan = plan.process.clone();
    let hooks = plan.hooks.clone();
    let own_pids = plan.new_namespaces.contains(&Namespace::Pid);
    let network = Namespace::Network;
    let own_network =
        plan.new_namespaces.contains(&network) || plan.joined_namespaces.contains(&network);
    let cgroup = Cgroup::create(linux, &request.container_id)?;
    let launched = sandbox
        .launcher
        .create(plan, cgroup.as_fd(), &namespaces)
        .await;
    let made = async {
        let launched: Launched = launched?;
        sandbox.keep_pid_namespace(launched.pid, pids).await?;
        Process::new(launched, sandbox.pipe_size, connected)
    };
    let (process, gate) = match made.await {
        Ok(made) => made,
        Err(error) => {
            let error = if cgroup.ran_out_of_memory() {
                AgentError::precondition(
                    "the container's first process ran out of memory: the memory limit is too low",
                )
            } else {
                error
            };
            if let Err(error) = cgroup.remove().await {
                warn!(
                    container = request.container_id,
                    error = error.line(),
                    "cgroup stays"
                );
            }
            return Err(error);
        }
    };
    let init = Arc::new(process);
    let mut watches = vec![watch_memory(sandbox, &request.container_id, &cgroup)];
    if !own_pids {
        watches.push(watch_init(sandbox, &request.container_id, &init));
    }
    Ok(Container {
        id: request.container_id.clone(),
        init_id: request.exec_id.clone(),
        cgroup,
        processes: Mutex::new(HashMap::from([(
            String::new(),
            Entry::Live(Arc::clone(&init)),
        )])),
        init,
        own_network,
        plan: process_plan,
        hooks,
        launcher: sandbox.launcher.clone(),
        stage: Mutex::new(Stage::Created(gate)),
        held: Mutex::default(),
        termination_log: super::diagnostics::termination_log_of(&request.OCI),
        change: Arc::default(),
        watches,
    })
}

/// Whether the container is the one that stands for its pod, in the words of containerd's CRI, of
/// CRI-O's and of Kata's runtime.
fn is_pause(spec: &oci::Spec) -> bool {
    let says = |key: &str, value: &str| spec.Annotations.get(key).is_some_and(|is| is == value);
    says("io.kubernetes.cri.container-type", "sandbox")
        || says("io.kubernetes.cri-o.ContainerType", "sandbox")
        || says("io.katacontainers.pkg.oci.container_type", "pod_sandbox")
}

pub(super) fn check(request: &CreateContainerRequest) -> Result<()> {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
    let id = &request.container_id;
    if id.is_empty() || !id.chars().all(plain) || id.starts_with('.') {
        return Err(AgentError::invalid(format!("container_id: {id:?}")));
    }
    if let Some(shared) = request.shared_mounts.first() {
        return Err(AgentError::unsupported(format!(
            "shared_mounts: {:?}: no container sees into another's root",
            shared.name
        )));
    }
    Ok(())
}

fn open_all(joins: &Joins) -> Result<Vec<OwnedFd>> {
    joins
        .iter()
        .map(|(kind, path)| {
            File::open(path)
                .map(OwnedFd::from)
                .context(|| format!("linux.namespaces: open the {kind:?} namespace {path:?}"))
        })
        .collect()
}

fn watch_memory(sandbox: &Arc<Sandbox>, id: &str, cgroup: &Cgroup) -> JoinHandle<()> {
    let watched = OutOfMemory::watch(cgroup);
    let sandbox = Arc::clone(sandbox);
    let id = id.to_owned();
    tokio::spawn(async move {
        match watched {
            Ok(mut watched) => {
                while watched.next().await.is_ok() {
                    sandbox.report_oom(&id);
                }
            }
            Err(error) => debug!(container = id, error = error.line(), "no OOM events"),
        }
    })
}

/// In a pid namespace of its own the kernel ends all processes with the first. Elsewhere the
/// agent does.
fn watch_init(sandbox: &Arc<Sandbox>, id: &str, init: &Arc<Process>) -> JoinHandle<()> {
    let sandbox = Arc::downgrade(sandbox);
    let exit = init.exit.clone();
    let id = id.to_owned();
    tokio::spawn(async move {
        ended(&exit).await;
        let container = sandbox
            .upgrade()
            .and_then(|sandbox| sandbox.container(&id).ok());
        if let Some(container) = container
            && let Err(error) = container.cgroup.kill()
        {
            warn!(container = id, error = error.line(), "kill after the end");
        }
    })
}
