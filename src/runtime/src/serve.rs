// SPDX-License-Identifier: Apache-2.0
//! The serving shim: one a sandbox, from `start` until containerd shuts it down.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, io};

use futures_util::stream;
use protobuf::well_known_types::any::Any;
use protocols::containerd::sandbox_ttrpc::create_sandbox;
use protocols::containerd::shim_ttrpc::create_task;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tracing::{Level, info, warn};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::bundle::Bundle;
use crate::cli::Arguments;
use crate::error::{Context, Result};
use crate::events::Publisher;
use crate::hooks::HostMounts;
use crate::service::{SandboxService, Shim, TaskService};
use crate::{logging, raw};

/// The names under which the service is asked for: by containerd 1.x, and from 2.0 on. The
/// messages are the same.
const TASK_SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// How long to wait after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long the answer to `Shutdown` has to reach the socket.
const LAST_ANSWER: Duration = Duration::from_millis(50);
/// How long the last answers and events may take to be delivered.
const FAREWELL: Duration = Duration::from_secs(3);

/// Serves until the shim's work is done.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    logging::start(if arguments.debug {
        Level::DEBUG
    } else {
        Level::INFO
    });
    let listener = own_listener()?;
    let host = HostMounts::current()?;
    let options = Bundle::open(None)?.options()?;
    detach()?;
    // One thread: the shim moves messages; what blocks goes to threads that end when idle.
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .internal(|| "start the runtime".to_owned())?;
    runtime.block_on(serve(arguments, listener, options, host))
}

/// The listening socket that `start` passed as standard input, which becomes `/dev/null`.
fn own_listener() -> Result<StdListener> {
    let context = || "take the socket from standard input".to_owned();
    let socket = io::stdin().as_fd().try_clone_to_owned().internal(context)?;
    let null = OwnedFd::from(fs::File::open("/dev/null").internal(context)?);
    rustix::stdio::dup2_stdin(&null).internal(context)?;
    let listener = StdListener::from(socket);
    listener.set_nonblocking(true).internal(context)?;
    // Fails for anything but a socket.
    listener.local_addr().internal(context)?;
    Ok(listener)
}

/// Leaves containerd's session, and its mounts: what the host mounts from here on is seen, what
/// the shim mounts is not, and is gone with the shim. Threads inherit the namespace, so this
/// comes before any.
fn detach() -> Result<()> {
    rustix::process::setsid().internal(|| "start a session".to_owned())?;
    raw::own_mount_namespace().internal(|| "unshare the mount namespace".to_owned())?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).internal(|| "detach from the host's mounts".to_owned())?;
    env::set_current_dir("/").internal(|| "change to /".to_owned())
}

async fn serve(
    arguments: &Arguments,
    listener: StdListener,
    options: Option<Any>,
    host: HostMounts,
) -> Result<()> {
    let listener = UnixListener::from_std(listener).internal(|| "listen".to_owned())?;
    let path = listener
        .local_addr()
        .ok()
        .and_then(|it| it.as_pathname().map(ToOwned::to_owned));
    let events = Publisher::start(&arguments.namespace, env::var("TTRPC_ADDRESS").ok());
    let shim = Arc::new(Shim::new(
        &arguments.namespace,
        options,
        events.clone(),
        host,
    ));
    let tasks = Arc::new(TaskService::new(Arc::clone(&shim)));
    let sandboxes = Arc::new(SandboxService::new(Arc::clone(&shim)));
    let mut server = Server::new()
        .add_listener(checked(listener))
        .register_service(create_sandbox(sandboxes));
    for name in TASK_SERVICES {
        let methods = create_task(tasks.clone());
        let renamed = methods
            .into_values()
            .map(|methods| (name.to_owned(), methods))
            .collect();
        server = server.register_service(renamed);
    }
    server.start().await.internal(|| "serve".to_owned())?;
    info!(
        id = arguments.id,
        namespace = arguments.namespace,
        "serving"
    );

    let context = || "watch signals".to_owned();
    let mut terminate = signal(SignalKind::terminate()).internal(context)?;
    let mut interrupt = signal(SignalKind::interrupt()).internal(context)?;
    tokio::select! {
        () = shim.finished() => {}
        _ = terminate.recv() => info!("told to terminate"),
        _ = interrupt.recv() => info!("interrupted"),
    }
    shim.stop().await;
    events.flush(FAREWELL).await;
    if let Some(path) = path
        && let Err(error) = fs::remove_file(&path)
    {
        warn!(%error, path = %path.display(), "socket not removed");
    }
    // Lets the answer to `Shutdown` out: the server's own end waits for calls, not for their answers
    // to be written.
    sleep(LAST_ANSWER).await;
    let _ = timeout(FAREWELL, server.shutdown()).await;
    info!("finished");
    Ok(())
}

/// Accepts connections of this process's own user only. The socket's mode says the same; this
/// holds even where somebody changes it.
fn checked(listener: UnixListener) -> Listener {
    let own = geteuid();
    Listener::new(stream::unfold(listener, move |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) if is_of(&stream, own) => return Some((Ok(stream), listener)),
                Ok(_) => warn!("a connection of another user was refused"),
                Err(error) => {
                    // Most likely no descriptor is left: the same error would come at once.
                    sleep(ACCEPT_PAUSE).await;
                    return Some((Err(error), listener));
                }
            }
        }
    }))
}

fn is_of(stream: &UnixStream, user: rustix::process::Uid) -> bool {
    socket_peercred(stream).is_ok_and(|peer| peer.uid == user || peer.uid.is_root())
}
