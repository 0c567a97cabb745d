// SPDX-License-Identifier: Apache-2.0
//! What a shim holds: one sandbox, its containers, and the way to its end.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use protobuf::well_known_types::any::Any;
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::container::{Handle, Registry};
use crate::error::{Context, Kind, Result, ShimError};
use crate::events::Publisher;
use crate::hooks::HostMounts;
use crate::sandbox::Sandbox;

/// How long an idle shim waits for containerd's last word.
const LINGER: Duration = Duration::from_secs(5);

/// What a shim holds.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(super) namespace: String,
    /// The options of the runtime handler, as `start` got them.
    pub(super) options: Option<Any>,
    pub(super) registry: Arc<Registry>,
    pub(super) events: Publisher,
    /// Where hooks run.
    pub(super) host: HostMounts,
    sandbox: Mutex<Option<Arc<Sandbox>>>,
    standing: Mutex<Option<Standing>>,
    shutdown: Notify,
}

/// A sandbox that was made by the sandbox API and stands by itself, without a container.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    pub(super) handle: Handle,
    pub(super) created: SystemTime,
}

impl Shim {
    pub(crate) fn new(
        namespace: &str,
        options: Option<Any>,
        events: Publisher,
        host: HostMounts,
    ) -> Self {
        Self {
            namespace: namespace.to_owned(),
            options,
            registry: Arc::default(),
            events,
            host,
            sandbox: Mutex::default(),
            standing: Mutex::default(),
            shutdown: Notify::new(),
        }
    }

    /// One whose sandbox, `test`, stands by itself; its agent says nothing.
    #[cfg(test)]
    pub(crate) fn standing_for_test() -> Self {
        use crate::agent::Agent;
        use tokio::net::UnixStream;
        use tokio::sync::watch;

        let host = HostMounts::current().unwrap();
        let shim = Self::new("test", None, Publisher::to_nobody(), host);
        let (stream, _) = UnixStream::pair().unwrap();
        let (_, machine) = watch::channel(None);
        let agent = Agent::new(stream, Duration::from_secs(5), machine);
        let sandbox = Arc::new(Sandbox::for_test(agent));
        shim.adopt(&sandbox);
        super::sandbox::stand(&shim, "test", "/b", sandbox).unwrap();
        shim
    }

    /// The sandbox of this name, which lives.
    pub(super) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        let sandbox = self.any_sandbox(id)?;
        let how = if sandbox.was_stopped() {
            String::new()
        } else if let Some(end) = sandbox.end() {
            format!(": {}", end.describe())
        } else {
            return Ok(sandbox);
        };
        Err(ShimError::new(
            Kind::FailedPrecondition,
            format!("sandbox {id} has ended{how}"),
        ))
    }

    /// The sandbox of this name, whether it lives or has ended.
    pub(super) fn any_sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        match &*lock(&self.sandbox) {
            Some(sandbox) if sandbox.id() == id => Ok(Arc::clone(sandbox)),
            _ => Err(no_sandbox(id)),
        }
    }

    /// Takes a sandbox as this shim's.
    pub(super) fn adopt(&self, sandbox: &Arc<Sandbox>) {
        *lock(&self.sandbox) = Some(Arc::clone(sandbox));
    }

    /// Forgets a sandbox whose first container failed.
    pub(super) fn abandon(&self) {
        *lock(&self.sandbox) = None;
    }

    /// The sandbox that stands by itself.
    pub(super) fn standing(&self, id: &str) -> Result<Standing> {
        self.any_sandbox(id)?;
        let standing = lock(&self.standing).clone();
        standing.ok_or_else(|| no_sandbox(id))
    }

    /// From here on the sandbox ends when it is told to, not with a container.
    pub(super) fn let_stand(&self, handle: Handle) {
        let created = SystemTime::now();
        *lock(&self.standing) = Some(Standing { handle, created });
    }

    /// Waits until the shim's work is done.
    pub(crate) async fn finished(&self) {
        self.shutdown.notified().await;
    }

    /// Ends the sandbox, whatever runs in it.
    pub(crate) async fn stop(&self) {
        let sandbox = lock(&self.sandbox).clone();
        if let Some(sandbox) = sandbox
            && let Err(error) = sandbox.stop().await
        {
            warn!(
                sandbox = sandbox.id(),
                error = error.chain(),
                "not all removed"
            );
        }
    }

    /// Ends the sandbox and the shim.
    pub(super) async fn shut_down(&self) {
        // Answered when nothing is left: what comes next may use the same name.
        self.stop().await;
        self.shutdown.notify_one();
    }

    /// containerd is done with a task. The shim stays while it has others.
    pub(super) async fn shut_down_if_idle(self: &Arc<Self>) {
        if self.is_idle() {
            return self.shut_down().await;
        }
        debug!("no shutdown while there are containers");
        // containerd asks with a pod's sandbox container, and not again when others are deleted
        // after it.
        let shim = Arc::clone(self);
        tokio::spawn(async move {
            shim.registry.emptied().await;
            // It may ask after all, or make another container.
            sleep(LINGER).await;
            if shim.is_idle() {
                shim.shut_down().await;
            }
        });
    }

    fn is_idle(&self) -> bool {
        self.registry.is_empty() && lock(&self.standing).is_none()
    }
}

/// Does work to its end though its client may go, which drops what handles the request: half a
/// sandbox must not stay.
pub(super) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .internal(|| "task".to_owned())
        .flatten()
}

fn no_sandbox(id: &str) -> ShimError {
    ShimError::new(Kind::NotFound, format!("sandbox {id} does not exist"))
}

/// A panic elsewhere leaves plain data behind, which stays usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
