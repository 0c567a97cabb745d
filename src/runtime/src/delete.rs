// SPDX-License-Identifier: Apache-2.0
//! `delete`: removes what a dead shim left on the host, whatever the moment of its death.
//!
//! containerd runs this when a shim doesn't answer any more, and takes the exit status from what
//! it prints. The shim's mounts are gone with its mount namespace; the rest is in the journal.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use protobuf::{Message, MessageField};
use protocols::containerd::sandbox::SandboxStatusRequest;
use protocols::containerd::sandbox_ttrpc::SandboxClient;
use protocols::containerd::shim::{DeleteRequest, DeleteResponse, ShutdownRequest, StateRequest};
use protocols::containerd::shim_ttrpc::TaskClient;
use tokio::runtime::{self, Runtime};
use ttrpc::Code;

use crate::bundle::{Bundle, Membership};
use crate::cli::Arguments;
use crate::error::{Context, Result};
use crate::hooks::{Hooks, HostMounts};
use crate::paths;
use crate::process::ProcessId;
use crate::sandbox::journal::Journal;
use crate::spec;

/// Killed: what containerd itself records for a task whose shim is gone.
const EXIT_STATUS: u32 = 137;

/// How long a shim may take for an answer before it counts as dead. containerd waits five seconds
/// for all of `delete`.
const ANSWER: Duration = Duration::from_secs(2);

/// Cleans up and prints the exit status.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let bundle = Bundle::open(arguments.bundle.as_deref())?;
    // A bundle that can't be read any more must not keep its sandbox from being removed.
    let sandbox = bundle
        .sandbox(&arguments.id)
        .unwrap_or_else(|_| Membership::Single(arguments.id.clone()));
    let socket = paths::shim_socket(&arguments.address, &arguments.namespace, sandbox.id());
    if !is_done(&socket, &arguments.id, sandbox.is_member())? {
        if !sandbox.is_member() {
            kill_shim(&bundle, &arguments.id)?;
        }
        let name = paths::sandbox_name(&arguments.namespace, sandbox.id());
        if let Some(journal) = Journal::open(paths::journal(&name))? {
            journal.remove_all()?;
        }
        poststop(&bundle, &arguments.id)?;
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).internal(|| format!("remove {}", socket.display()));
            }
            _ => {}
        }
    }
    let mut response = DeleteResponse::new();
    response.exit_status = EXIT_STATUS;
    response.exited_at = MessageField::some(SystemTime::now().into());
    let bytes = response
        .write_to_bytes()
        .internal(|| "encode the answer".to_owned())?;
    let mut output = io::stdout();
    output
        .write_all(&bytes)
        .and_then(|()| output.flush())
        .internal(|| "print the answer".to_owned())
}

/// Runs the hooks that the shim did not come to.
fn poststop(bundle: &Bundle, id: &str) -> Result<()> {
    let Some(spec) = bundle
        .configuration()
        .ok()
        .and_then(|it| spec::read(&it).ok())
    else {
        // Removed already, or never readable: then no hook of it has run either.
        return Ok(());
    };
    let hooks = Hooks::new(&spec, id, bundle.path(), HostMounts::current()?);
    runtime()?.block_on(hooks.poststop());
    Ok(())
}

fn runtime() -> Result<Runtime> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .internal(|| "start the runtime".to_owned())
}

/// Whether a shim answers that sees to the rest. containerd runs `delete` after each task that it
/// has deleted, too, when it closes that task's connection: a pod's shim may have other
/// containers then, even without its sandbox's. A pod's shim also outlives a member that failed.
/// A shim that still has the container, or the sandbox that stands by itself, but was given up by
/// containerd, is not done.
fn is_done(socket: &Path, id: &str, is_member: bool) -> Result<bool> {
    if UnixStream::connect(socket).is_err() {
        return Ok(false);
    }
    Ok(runtime()?.block_on(async {
        let address = format!("unix://{}", socket.display());
        let Ok(client) = ttrpc::r#async::Client::connect(&address).await else {
            return false;
        };
        let sandboxes = SandboxClient::new(client.clone());
        let client = TaskClient::new(client);
        let state = StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        // Nobody may ask again: it goes if this was its last.
        let shutdown = ShutdownRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        match client.state(deadline(), &state).await {
            Ok(_) => return is_member,
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => {}
            Err(ttrpc::Error::RpcStatus(status))
                if is_member && status.code() == Code::FAILED_PRECONDITION =>
            {
                // It is being created, for nobody: told so, the shim undoes it.
                let delete = DeleteRequest {
                    id: id.to_owned(),
                    ..Default::default()
                };
                let _ = client.delete(deadline(), &delete).await;
                let _ = client.shutdown(deadline(), &shutdown).await;
                return true;
            }
            // The shim does not answer.
            Err(_) => return is_member,
        }
        // A sandbox that stands by itself is no task, and keeps its shim from going.
        if !is_member && !has_no_sandbox(&sandboxes, id).await {
            return false;
        }
        client.shutdown(deadline(), &shutdown).await.is_ok()
    }))
}

/// Whether a shim says that it has no sandbox of this name that stands by itself.
async fn has_no_sandbox(client: &SandboxClient, id: &str) -> bool {
    let status = SandboxStatusRequest {
        sandbox_id: id.to_owned(),
        ..Default::default()
    };
    match client.sandbox_status(deadline(), &status).await {
        Err(ttrpc::Error::RpcStatus(status)) => status.code() == Code::NOT_FOUND,
        // Or it does not answer.
        _ => false,
    }
}

fn deadline() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(i64::try_from(ANSWER.as_nanos()).unwrap_or(i64::MAX))
}

/// Kills the shim of this bundle, should it still run: one that hangs, or has no sandbox yet. Its
/// number may be somebody else's by now, so what runs there must have been started for this id.
fn kill_shim(bundle: &Bundle, id: &str) -> Result<()> {
    let shim = fs::read_to_string(bundle.path().join("shim.pid"))
        .ok()
        .and_then(|pid| pid.trim().parse().ok())
        .and_then(|pid: u32| ProcessId::of(pid).ok());
    match shim {
        Some(shim) if shim.was_started_with(&["-id", id]) => shim
            .kill(Duration::from_secs(10))
            .internal(|| "kill the shim".to_owned()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener as StdListener;
    use std::sync::{Arc, Mutex};
    use std::thread;

    use async_trait::async_trait;
    use protocols::containerd::sandbox_ttrpc::create_sandbox;
    use protocols::containerd::shim::StateResponse;
    use protocols::containerd::shim_ttrpc::{Task, create_task};
    use tempfile::TempDir;
    use tokio::net::UnixListener;
    use tokio::sync::oneshot;
    use ttrpc::r#async::transport::Listener;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;
    use crate::service::{SandboxService, Shim, TaskService};

    /// What `delete` makes of a shim that serves.
    fn done_with(server: impl FnOnce() -> Server + Send + 'static, id: &str, member: bool) -> bool {
        let folder = TempDir::new().unwrap();
        let socket = folder.path().join("s");
        let listener = StdListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let serving = thread::spawn(move || {
            runtime().unwrap().block_on(async move {
                let listener = UnixListener::from_std(listener).unwrap();
                let mut server = server().add_listener(Listener::from(listener));
                server.start().await.unwrap();
                let _ = ended.await;
            });
        });
        let done = is_done(&socket, id, member).unwrap();
        drop(end);
        serving.join().unwrap();
        done
    }

    fn standing() -> Server {
        let shim = Arc::new(Shim::standing_for_test());
        Server::new()
            .register_service(create_task(Arc::new(TaskService::new(Arc::clone(&shim)))))
            .register_service(create_sandbox(Arc::new(SandboxService::new(shim))))
    }

    /// A shim that is creating what it is asked for, and notes who asks to delete it.
    struct Creating {
        deleted: Arc<Mutex<Vec<String>>>,
    }

    #[async_trait]
    impl Task for Creating {
        async fn state(&self, _: &TtrpcContext, _: StateRequest) -> ttrpc::Result<StateResponse> {
            Err(being_created())
        }

        async fn delete(
            &self,
            _: &TtrpcContext,
            request: DeleteRequest,
        ) -> ttrpc::Result<DeleteResponse> {
            self.deleted.lock().unwrap().push(request.id);
            Err(being_created())
        }
    }

    fn being_created() -> ttrpc::Error {
        let status = ttrpc::get_status(Code::FAILED_PRECONDITION, "it is being created");
        ttrpc::Error::RpcStatus(status)
    }

    #[test]
    fn a_member_that_is_being_created_is_deleted() {
        let deleted = Arc::default();
        let creating = || {
            let deleted = Arc::clone(&deleted);
            move || Server::new().register_service(create_task(Arc::new(Creating { deleted })))
        };
        // What has its shim to itself is killed with it.
        assert!(!done_with(creating(), "single", false));
        assert!(done_with(creating(), "member", true));
        assert_eq!(*deleted.lock().unwrap(), ["member"]);
    }

    #[test]
    fn a_shim_whose_sandbox_stands_by_itself_is_not_done() {
        assert!(!done_with(standing, "test", false));
        // A member that is gone is seen to, and leaves the sandbox alone.
        assert!(done_with(standing, "member", true));
        // One that has nothing of this name goes by itself.
        assert!(done_with(standing, "other", false));
    }
}
