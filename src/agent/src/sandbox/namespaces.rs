// SPDX-License-Identifier: Apache-2.0
//! Namespaces that the containers of a pod share: IPC and UTS always, pids when the pod asks.
//! They are made when the first container wants them, and live as long as their descriptors.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::fcntl_dupfd_cloexec;

use super::{Sandbox, lock};
use crate::engine::{ContainerPlan, Namespace};
use crate::error::{AgentError, Context as _, Result};
use crate::sys::process::new_ipc_and_uts_namespaces;

#[derive(Debug, Default)]
pub(super) struct SharedNamespaces {
    /// Without CreateSandbox each container stands alone.
    enabled: AtomicBool,
    ipc_and_uts: Mutex<Option<(OwnedFd, OwnedFd)>>,
    pids: Mutex<Option<OwnedFd>>,
}

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
    pub(crate) fn share_namespaces(
        &self,
        plan: &mut ContainerPlan,
        pids: bool,
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
        if pids
            && let Some(namespace) = lock(&self.shared.pids).as_ref()
            && plan.join(Namespace::Pid)
        {
            descriptors.push(copy(namespace)?);
        }
        Ok(descriptors)
    }

    /// Keeps the pid namespace of the pod's first container for the others.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn keep_pid_namespace(&self, pid: i32, shared: bool) -> Result<()> {
        if shared {
            let path = format!("/proc/{pid}/ns/pid");
            let namespace = File::open(&path).context(|| format!("open {path:?}"))?;
            *lock(&self.shared.pids) = Some(namespace.into());
        }
        Ok(())
    }
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
