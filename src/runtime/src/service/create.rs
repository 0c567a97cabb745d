// SPDX-License-Identifier: Apache-2.0
//! `Create`: from a bundle to a container that waits for its start.
//!
//! For a sandbox's first container the machine boots while the host mounts its root file system.
//!
//! The number that is reported for a sandbox is its machine's process, for a container of a pod
//! it is the shim: nothing of the guest has a number on the host. That the two differ tells a
//! container that joins its pod's processes from one that joins another container's, which a
//! specification names by these numbers.

use std::mem;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use protobuf::MessageField;
use protocols::agent::agent::CreateContainerRequest;
use protocols::containerd::mount::Mount;
use protocols::containerd::shim::CreateTaskRequest;
use protocols::containerd::task_events::{TaskCreate, TaskIO};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::shim::Shim;
use crate::bundle::{Bundle, Membership};
use crate::cli::check_id;
use crate::config::Config;
use crate::container::io::{Stdio, StreamPorts, Streams};
use crate::container::{Actor, Command, Parts, Pause, Reservation};
use crate::disk::{self, Wanted};
use crate::error::{Context, Kind, Result, ShimError};
use crate::hooks::Hooks;
use crate::sandbox::{Booting, GUEST_SHM, InGuest, Limits, Plan, Sandbox, Share};
use crate::spec::{self, Amended, Bind, Spec};
use crate::volume::Volumes;
use crate::{logging, paths};

/// Creates a container; the number of the process that stands for it.
pub(super) async fn create(shim: Arc<Shim>, request: CreateTaskRequest) -> Result<u32> {
    check_id("container id", &request.id)?;
    if !request.checkpoint.is_empty() {
        return Err(ShimError::new(
            Kind::Unimplemented,
            "restoring a container from a checkpoint is not supported",
        ));
    }
    let reservation = shim.registry.reserve(&request.id)?;
    let bundle = Bundle::open(Some(Path::new(&request.bundle)))?;
    let spec = spec::read(&bundle.configuration()?)?;
    let membership = bundle.sandbox(&request.id)?;
    let stdio = Stdio {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let mut streams = stdio.open()?;
    let hooks = Hooks::new(&spec, &request.id, bundle.path(), shim.host.clone());
    let sandbox = match &membership {
        Membership::Sandbox(id) => pod(&shim, id, &request, &spec, &hooks).await?,
        Membership::Single(_) | Membership::Member(_) => {
            let streams = &mut streams;
            container(&shim, &membership, &request, &bundle, spec, streams, &hooks).await?
        }
    };
    let pid = match &membership {
        Membership::Single(_) | Membership::Sandbox(_) => sandbox.pid(),
        Membership::Member(_) => process::id(),
    };
    let parts = Parts {
        id: request.id.clone(),
        bundle: request.bundle.clone(),
        pid,
        stdio,
        streams,
        sandbox,
        owns_sandbox: !membership.is_member(),
        events: shim.events.clone(),
        registry: Arc::clone(&shim.registry),
        hooks,
    };
    let event = TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        }),
        pid,
        ..Default::default()
    };
    begin(&shim, reservation, &membership, parts, &event).await?;
    Ok(pid)
}

/// Begins the life of a container that was made, or undoes it if it was deleted meanwhile: a
/// client that gave up doesn't ask again.
async fn begin(
    shim: &Shim,
    reservation: Reservation,
    membership: &Membership,
    parts: Parts,
    event: &TaskCreate,
) -> Result<()> {
    let (id, sandbox, hooks) = (
        parts.id.clone(),
        Arc::clone(&parts.sandbox),
        parts.hooks.clone(),
    );
    let begun = reservation.fulfil(|| {
        info!(container = id, "created");
        shim.events.publish(event);
        match membership {
            Membership::Sandbox(_) => Pause::spawn(parts),
            Membership::Single(_) | Membership::Member(_) => Actor::spawn(parts),
        }
    });
    let Err(reservation) = begun else {
        return Ok(());
    };
    undo(shim, &sandbox, membership, &id).await;
    hooks.poststop().await;
    drop(reservation);
    Err(ShimError::new(
        Kind::FailedPrecondition,
        format!("container {id} was deleted while it was being created"),
    ))
}

/// Makes a pod's sandbox. Of the container that stands for it, only the specification counts.
async fn pod(
    shim: &Arc<Shim>,
    id: &str,
    request: &CreateTaskRequest,
    spec: &Spec,
    hooks: &Hooks,
) -> Result<Arc<Sandbox>> {
    let config = Config::for_sandbox(request.options.as_ref(), &spec.annotations)?;
    let plan = Plan::pod(spec, &config)?;
    let (sandbox, _) = boot(shim, id, config, plan, Vec::new(), |_| Ok(())).await?;
    if let Err(error) = hooks.create(sandbox.pid()).await {
        shim.abandon();
        stop(&sandbox).await;
        hooks.poststop().await;
        return Err(error);
    }
    Ok(sandbox)
}

/// Makes a container in the guest: with a sandbox of its own, or in its pod's.
async fn container(
    shim: &Arc<Shim>,
    membership: &Membership,
    request: &CreateTaskRequest,
    bundle: &Bundle,
    mut spec: Spec,
    streams: &mut Streams,
    hooks: &Hooks,
) -> Result<Arc<Sandbox>> {
    let rootfs = Rootfs::new(request, bundle, &spec)?;
    let (sandbox, amended, volumes, disks) = if let Membership::Member(id) = membership {
        let sandbox = shim.sandbox(id)?;
        sandbox.config().check_member(&spec.annotations)?;
        let mut amended = amend(&mut spec, &rootfs, sandbox.config(), Some(&sandbox))?;
        let wanted = wanted(&rootfs, &mut amended, &mut spec)?;
        let volumes = volumes(&request.id, &mut amended, &spec).await?;
        let (share, binds) = (sandbox.share(), volumes.shared.clone());
        blocking(move || rootfs.mount(&share, &binds)).await?;
        let disks = sandbox.attach_disks(&request.id, wanted).await;
        (sandbox, amended, volumes, disks)
    } else {
        let config = Config::for_sandbox(request.options.as_ref(), &spec.annotations)?;
        let plan = Plan::single(&spec, &config)?;
        let mut amended = amend(&mut spec, &rootfs, &config, None)?;
        let wanted = wanted(&rootfs, &mut amended, &mut spec)?;
        let volumes = volumes(&request.id, &mut amended, &spec).await?;
        let binds = volumes.shared.clone();
        let mount = move |share: &Share| rootfs.mount(share, &binds);
        let (sandbox, disks) = boot(shim, membership.id(), config, plan, wanted, mount).await?;
        (sandbox, amended, volumes, Ok(disks))
    };
    let created = async {
        let disks = disks?;
        sandbox.assign_cpus(&request.id, &amended.cpus)?;
        sandbox.admit(&request.id, Limits::of(&spec)).await?;
        hooks.create(sandbox.pid()).await?;
        let ports = sandbox.pass(streams).await?;
        create_in_guest(&sandbox, request, spec, ports, &amended, &volumes, disks).await
    };
    let created = created.await;
    if let Err(error) = created {
        undo(shim, &sandbox, membership, &request.id).await;
        hooks.poststop().await;
        return Err(error);
    }
    Ok(sandbox)
}

/// The disks that a container wants: its root's, those it binds a file system from, and those it
/// wants as they are.
fn wanted(rootfs: &Rootfs, amended: &mut Amended, spec: &mut Spec) -> Result<Vec<Wanted>> {
    let mut all = rootfs.disks.clone();
    let mut shared = Vec::new();
    for bind in mem::take(&mut amended.binds) {
        let Some((wanted, point)) = disk::volume(&bind.source)? else {
            shared.push(bind);
            continue;
        };
        if let Some(mount) = spec.mounts.get_mut(bind.mount) {
            mount.source = point;
        }
        all.push(wanted);
    }
    amended.binds = shared;
    let devices = amended.block_devices.iter();
    all.extend(devices.map(|it| Wanted::device(&it.path, it.major, it.minor, it.read_only)));
    Ok(all)
}

/// A container's root file system.
struct Rootfs {
    container: String,
    /// Its disks, if it is on any of its own.
    disks: Vec<Wanted>,
    mounts: Vec<Mount>,
    folder: PathBuf,
}

impl Rootfs {
    fn new(request: &CreateTaskRequest, bundle: &Bundle, spec: &Spec) -> Result<Self> {
        let root = spec
            .root
            .as_ref()
            .map_or("rootfs", |root| root.path.as_str());
        Ok(Self {
            container: request.id.clone(),
            disks: disk::rootfs(&request.id, &request.rootfs)?,
            mounts: request.rootfs.clone(),
            // Relative to the bundle, as the specification says.
            folder: bundle.path().join(root),
        })
    }

    /// Where the guest finds it.
    fn in_guest(&self) -> String {
        if self.disks.is_empty() {
            Share::rootfs_in_guest(&self.container, &self.mounts)
        } else {
            disk::rootfs_in_guest(&self.container)
        }
    }

    /// Mounts all that is shared, or nothing.
    fn mount(&self, share: &Share, binds: &[Bind]) -> Result<()> {
        let rootfs = if self.disks.is_empty() {
            share.add_rootfs(&self.container, &self.mounts, &self.folder)
        } else {
            Ok(())
        };
        let mounted = rootfs.and_then(|()| {
            binds
                .iter()
                .try_for_each(|bind| share.add_volume(&self.container, bind))
        });
        if mounted.is_err()
            && let Err(error) = share.remove(&self.container)
        {
            warn!(
                container = self.container,
                error = error.chain(),
                "not all unmounted"
            );
        }
        mounted
    }
}

/// What stands behind a container's bind mounts: the host is looked at.
async fn volumes(container: &str, amended: &mut Amended, spec: &Spec) -> Result<Volumes> {
    let container = container.to_owned();
    let binds = mem::take(&mut amended.binds);
    let resources = spec.linux.resources.as_ref();
    let huge_pages = resources.map_or_else(Vec::new, |it| it.hugepage_limits.clone());
    blocking(move || Volumes::sort(&container, binds, &huge_pages)).await
}

/// Makes the sandbox while its first container's files are mounted, and with its disks.
pub(super) async fn boot(
    shim: &Arc<Shim>,
    id: &str,
    config: Config,
    plan: Plan,
    wanted: Vec<Wanted>,
    mount: impl FnOnce(&Share) -> Result<()> + Send + 'static,
) -> Result<(Arc<Sandbox>, InGuest)> {
    logging::set_level(config.log.level());
    let name = paths::sandbox_name(&shim.namespace, id);
    let container = id.to_owned();
    let id = id.to_owned();
    let booting = blocking(move || Booting::start(&id, &name, config, plan)).await?;
    let disks = match booting.attach_disks(&container, wanted).await {
        Ok(disks) => disks,
        // It says itself why.
        Err(error) if booting.has_ended() => {
            return booting.finish().await.and(Err(error));
        }
        Err(error) => {
            booting.abandon().await;
            return Err(error);
        }
    };
    let share = booting.share();
    let mounting = blocking(move || mount(&share));
    let (mounted, booted) = tokio::join!(mounting, booting.finish());
    let sandbox = Arc::new(booted?);
    if let Err(error) = mounted {
        stop(&sandbox).await;
        return Err(error);
    }
    shim.adopt(&sandbox);
    tokio::spawn(report_out_of_memory(Arc::clone(shim), Arc::clone(&sandbox)));
    tokio::spawn(Arc::clone(&sandbox).watch_network());
    tokio::spawn(Arc::clone(&sandbox).forward_ports());
    tokio::spawn(Arc::clone(&sandbox).manage());
    Ok((sandbox, disks))
}

async fn create_in_guest(
    sandbox: &Sandbox,
    request: &CreateTaskRequest,
    mut spec: Spec,
    ports: StreamPorts,
    amended: &Amended,
    volumes: &Volumes,
    disks: InGuest,
) -> Result<()> {
    for (mount, source) in &volumes.sources {
        if let Some(mount) = spec.mounts.get_mut(*mount) {
            source.clone_into(&mut mount.source);
        }
    }
    // From before the guest first looks.
    let watcher = sandbox.watcher();
    let told = watcher.add(&request.id, &volumes.watched, sandbox.agent());
    let mut storages = disks.storages;
    storages.extend(volumes.for_agent(told));
    if let Some(process) = &mut spec.process {
        process.terminal = request.terminal;
    }
    let request = CreateContainerRequest {
        container_id: request.id.clone(),
        OCI: MessageField::some(spec.into()),
        storages,
        sandbox_pidns: amended.shares_pids,
        devices: disks.devices,
        stdin_port: ports.stdin,
        stdout_port: ports.stdout,
        stderr_port: ports.stderr,
        ..Default::default()
    };
    sandbox.agent().create_container(&request).await
}

/// Takes back what a create has made that failed, or that nobody wants any more.
async fn undo(shim: &Shim, sandbox: &Arc<Sandbox>, membership: &Membership, id: &str) {
    if !membership.is_member() {
        shim.abandon();
        return stop(sandbox).await;
    }
    match sandbox.agent().remove_container(id).await {
        // It may still use its disks.
        Err(error) if error.kind() != Kind::NotFound => warn!(
            container = id,
            error = error.chain(),
            "not removed from the guest"
        ),
        _ => sandbox.detach_disks(id).await,
    }
    sandbox.release_cpus(id);
    sandbox.watcher().remove(id);
    sandbox.dismiss(id);
    match sandbox.unshare(id).await {
        Ok(gone) => sandbox.forget(gone).await,
        Err(error) => warn!(container = id, error = error.chain(), "not all unmounted"),
    }
}

async fn stop(sandbox: &Sandbox) {
    if let Err(error) = sandbox.stop().await {
        warn!(
            sandbox = sandbox.id(),
            error = error.chain(),
            "not all removed"
        );
    }
}

fn amend(
    spec: &mut Spec,
    rootfs: &Rootfs,
    config: &Config,
    sandbox: Option<&Sandbox>,
) -> Result<Amended> {
    let plan = sandbox.and_then(|sandbox| sandbox.plan().pod.as_ref());
    if let Some(files) = plan.and_then(|plan| plan.files.as_ref()) {
        files.mount(&mut spec.mounts);
    }
    let pod = sandbox.and_then(|sandbox| {
        let plan = sandbox.plan().pod.as_ref()?;
        Some(spec::Pod {
            id: sandbox.id(),
            pid: sandbox.pid(),
            sysctls: &plan.sysctls,
            shm: GUEST_SHM,
        })
    });
    let place = spec::Place {
        rootfs: &rootfs.in_guest(),
        seccomp: config.seccomp,
        pod,
    };
    spec::amend(spec, &place)
}

/// Between two out-of-memory events of a guest.
const OOM_PAUSE: Duration = Duration::from_millis(100);

/// Hands the guest's out-of-memory events to their containers, as long as there is a guest.
async fn report_out_of_memory(shim: Arc<Shim>, sandbox: Arc<Sandbox>) {
    while let Ok(container) = sandbox.agent().out_of_memory().await {
        if let Ok(handle) = shim.registry.find(&container) {
            handle.tell(Command::OutOfMemory);
        }
        // A guest may tell of as many as it likes; containerd hears of each.
        tokio::time::sleep(OOM_PAUSE).await;
    }
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    spawn_blocking(work).await.internal(|| "task".to_owned())?
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use protocols::containerd::shim::DeleteRequest;
    use protocols::containerd::shim_ttrpc::Task;
    use tokio::net::UnixStream;
    use tokio::sync::watch;
    use ttrpc::Code;
    use ttrpc::r#async::TtrpcContext;

    use super::*;
    use crate::agent::Agent;
    use crate::events::Publisher;
    use crate::hooks::HostMounts;
    use crate::service::TaskService;

    #[tokio::test]
    async fn what_is_deleted_while_it_is_created_is_undone() {
        let host = HostMounts::current().unwrap();
        let hooks = Hooks::new(&Spec::default(), "c", Path::new("/b"), host.clone());
        let (events, mut published) = Publisher::to_test();
        let shim = Arc::new(Shim::new("test", None, events.clone(), host));
        let reservation = shim.registry.reserve("c").unwrap();
        let (stream, _) = UnixStream::pair().unwrap();
        let (_, machine) = watch::channel(None);
        let agent = Agent::new(stream, Duration::from_secs(5), machine);
        let sandbox = Arc::new(Sandbox::for_test(agent));

        let request = DeleteRequest {
            id: "c".to_owned(),
            ..Default::default()
        };
        let tasks = TaskService::new(Arc::clone(&shim));
        match tasks.delete(&TtrpcContext::default(), request).await {
            Err(ttrpc::Error::RpcStatus(status)) => {
                assert_eq!(status.code(), Code::FAILED_PRECONDITION);
            }
            other => panic!("{other:?}"),
        }

        let stdio = Stdio::default();
        let parts = Parts {
            id: "c".to_owned(),
            bundle: "/b".to_owned(),
            pid: 1,
            streams: stdio.open().unwrap(),
            stdio,
            sandbox: Arc::clone(&sandbox),
            owns_sandbox: true,
            events,
            registry: Arc::clone(&shim.registry),
            hooks,
        };
        let membership = Membership::Single("c".to_owned());
        let event = TaskCreate::default();
        let begun = begin(&shim, reservation, &membership, parts, &event).await;
        assert_eq!(begun.unwrap_err().kind(), Kind::FailedPrecondition);
        assert!(sandbox.was_stopped());
        assert!(shim.registry.is_empty());
        assert_eq!(published.topics(), [""; 0]);
    }
}
