// SPDX-License-Identifier: Apache-2.0
//! Namespaces that the containers of a pod share: IPC and UTS always, pids when the pod asks.
//! They are made when the first container wants them, and live as long as their descriptors.
//!
//! The first process of the shared pid namespace is the pod's pause container, when the runtime
//! makes one in the guest; else it is a process of the agent's. It is never an ordinary container:
//! all others would end with it.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use protocols::agent::oci::Linux;
use rustix::io::fcntl_dupfd_cloexec;
use tracing::warn;

use super::{Sandbox, lock};
use crate::cgroup::Cgroup;
use crate::engine::{ContainerPlan, Namespace};
use crate::error::{AgentError, Context as _, Result};
use crate::sys::process::new_ipc_and_uts_namespaces;

#[derive(Debug, Default)]
pub(super) struct SharedNamespaces {
    /// Without CreateSandbox each container stands alone.
    enabled: AtomicBool,
    ipc_and_uts: Mutex<Option<(OwnedFd, OwnedFd)>>,
    /// Held while it is being made.
    pids: tokio::sync::Mutex<Option<PidNamespace>>,
}

#[derive(Debug)]
struct PidNamespace {
    namespace: OwnedFd,
    /// Of the first process, when it is the agent's.
    cgroup: Option<Cgroup>,
}

/// What a container does with the pids of its pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Pids {
    /// It has its own.
    Own,
    /// It is the pause container, whose pids the others share.
    First,
    /// It shares them.
    Shared,
}

/// The cgroup of the agent's own first process.
const INIT_CGROUP: &str = "pod-init";

impl SharedNamespaces {
    pub(super) fn enable(&self) {
        self.enabled.store(true, Ordering::Relaxed);
    }
}

impl Sandbox {
    /// Lets a container join the pod's namespaces, whether it asked for new ones or for those of
    /// its host, which is the pod. The descriptors are those of the plan's last joined namespaces.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) async fn share_namespaces(
        &self,
        plan: &mut ContainerPlan,
        pids: Pids,
    ) -> Result<Vec<OwnedFd>> {
        let mut descriptors = Vec::new();
        if !self.shared.enabled.load(Ordering::Relaxed) {
            return Ok(descriptors);
        }
        for kind in [Namespace::Ipc, Namespace::Uts] {
            if plan.join(kind) {
                descriptors.push(self.shared.ipc_or_uts(kind)?);
            }
        }
        match pids {
            Pids::Shared if plan.join(Namespace::Pid) => {
                descriptors.push(self.shared_pids().await?);
            }
            Pids::Shared => {}
            // Runtimes leave it out of the specification, Kata's always: the agent's own pids are
            // no container's.
            Pids::Own | Pids::First => plan.isolate(Namespace::Pid),
        }
        Ok(descriptors)
    }

    /// Keeps the pid namespace of the pause container for the others.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) async fn keep_pid_namespace(&self, pid: i32, pids: Pids) -> Result<()> {
        if pids == Pids::First {
            let kept = PidNamespace {
                namespace: of_process(pid)?,
                cgroup: None,
            };
            *self.shared.pids.lock().await = Some(kept);
        }
        Ok(())
    }

    async fn shared_pids(&self) -> Result<OwnedFd> {
        let mut pids = self.shared.pids.lock().await;
        let made = match &mut *pids {
            Some(made) => made,
            none => none.insert(self.make_pid_namespace().await?),
        };
        copy(&made.namespace)
    }

    async fn make_pid_namespace(&self) -> Result<PidNamespace> {
        let named = |error: AgentError| {
            let line = format!("pid namespace of the pod: {}", error.line());
            AgentError::new(error.kind(), line)
        };
        let cgroup = Cgroup::create(&Linux::default(), INIT_CGROUP).map_err(named)?;
        let made = self.launcher.pid_namespace(cgroup.as_fd()).await;
        match made.and_then(of_process) {
            Ok(namespace) => Ok(PidNamespace {
                namespace,
                cgroup: Some(cgroup),
            }),
            Err(error) => {
                remove(&cgroup).await;
                Err(named(error))
            }
        }
    }

    /// Ends the agent's own first process.
    pub(super) async fn end_pid_namespace(&self) {
        let made = self.shared.pids.lock().await.take();
        if let Some(cgroup) = made.and_then(|made| made.cgroup) {
            remove(&cgroup).await;
        }
    }
}

async fn remove(cgroup: &Cgroup) {
    if let Err(error) = cgroup.remove().await {
        warn!(error = error.line(), "cgroup stays");
    }
}

fn of_process(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/pid");
    let namespace = File::open(&path).context(|| format!("open {path:?}"))?;
    Ok(namespace.into())
}

impl SharedNamespaces {
    fn ipc_or_uts(&self, kind: Namespace) -> Result<OwnedFd> {
        let mut made = lock(&self.ipc_and_uts);
        if made.is_none() {
            *made = Some(make()?);
        }
        match (&*made, kind) {
            (Some((ipc, _)), Namespace::Ipc) => copy(ipc),
            (Some((_, uts)), _) => copy(uts),
            (None, _) => Err(AgentError::internal("shared namespaces are missing")),
        }
    }
}

fn copy(namespace: &OwnedFd) -> Result<OwnedFd> {
    fcntl_dupfd_cloexec(namespace, 0).context(|| "copy a namespace's descriptor")
}

/// Namespaces belong to threads: one that ends leaves them to their descriptors. The new UTS
/// namespace starts with the guest's host name.
fn make() -> Result<(OwnedFd, OwnedFd)> {
    let thread = thread::Builder::new().stack_size(64 << 10).spawn(|| {
        new_ipc_and_uts_namespaces().context(|| "make shared namespaces")?;
        let open = |kind| {
            let path = format!("/proc/thread-self/ns/{kind}");
            File::open(&path)
                .map(OwnedFd::from)
                .context(|| format!("open {path:?}"))
        };
        Ok((open("ipc")?, open("uts")?))
    });
    thread
        .context(|| "make shared namespaces")?
        .join()
        .unwrap_or_else(|_| Err(AgentError::internal("shared namespaces: thread panicked")))
}
