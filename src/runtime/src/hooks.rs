// SPDX-License-Identifier: Apache-2.0
//! OCI hooks that run on the host: programs that a container's specification names, each with the
//! container's state on its standard input. nerdctl and Docker set up networks with them.
//!
//! They run in the host's mount namespace, not in the shim's. The process that the state names is
//! the machine's, which is in the network namespace whose interfaces the guest gets. A hook that
//! fails before the container exists fails the container; a later one is a warning, as the
//! specification says. Nothing waits for a hook longer than its time.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use oci_hooks::{State, TIMEOUT, Words};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use crate::error::{Context, Kind, Result, ShimError};
use crate::raw;
use crate::spec::{Hook, Spec};

/// Says in a bundle that its last hooks have run.
const DONE: &str = "hooks.done";

/// The mount namespace of the host, held open by a process that leaves it.
#[derive(Debug, Clone)]
pub(crate) struct HostMounts(Arc<OwnedFd>);

impl HostMounts {
    /// The calling thread's, as it is now.
    pub(crate) fn current() -> Result<Self> {
        let context = || "open the mount namespace".to_owned();
        let file = File::open("/proc/thread-self/ns/mnt").internal(context)?;
        Ok(Self(Arc::new(file.into())))
    }
}

/// A container's hooks.
#[derive(Debug, Clone)]
pub(crate) struct Hooks {
    create: Vec<(&'static str, Hook)>,
    poststart: Vec<(&'static str, Hook)>,
    poststop: Vec<(&'static str, Hook)>,
    state: State,
    mounts: HostMounts,
}

impl Hooks {
    pub(crate) fn new(spec: &Spec, id: &str, bundle: &Path, mounts: HostMounts) -> Self {
        let named = |name, hooks: &[Hook]| -> Vec<_> {
            hooks.iter().map(|hook| (name, hook.clone())).collect()
        };
        let mut create = named("prestart", &spec.hooks.prestart);
        create.extend(named("createRuntime", &spec.hooks.create_runtime));
        Self {
            create,
            poststart: named("poststart", &spec.hooks.poststart),
            poststop: named("poststop", &spec.hooks.poststop),
            state: State {
                version: spec.oci_version.clone(),
                id: id.to_owned(),
                bundle: bundle.to_owned(),
                annotations: spec.annotations.clone().into_iter().collect(),
            },
            mounts,
        }
    }

    /// Runs those that come before the container exists, to the first that fails.
    pub(crate) async fn create(&self, pid: u32) -> Result<()> {
        if self.create.is_empty() {
            return Ok(());
        }
        let (hooks, state) = (self.create.clone(), self.state.json("creating", pid));
        let (mounts, bundle) = (self.mounts.clone(), self.state.bundle.clone());
        spawn_blocking(move || {
            hooks
                .iter()
                .try_for_each(|(point, hook)| run(point, hook, &state, &bundle, &mounts))
        })
        .await
        .internal(|| "task".to_owned())?
    }

    /// Runs those that come after the start of the container's process.
    pub(crate) async fn poststart(&self, pid: u32) {
        self.run_later(&self.poststart, "running", pid).await;
    }

    /// Runs those that come after the container's end, once.
    pub(crate) async fn poststop(&self) {
        if self.poststop.is_empty() || self.state.bundle.join(DONE).exists() {
            return;
        }
        if let Err(error) = File::create(self.state.bundle.join(DONE)) {
            warn!(container = self.state.id, %error, "hooks may run twice");
        }
        self.run_later(&self.poststop, "stopped", 0).await;
    }

    async fn run_later(&self, hooks: &[(&'static str, Hook)], status: &str, pid: u32) {
        if hooks.is_empty() {
            return;
        }
        let (hooks, state) = (hooks.to_vec(), self.state.json(status, pid));
        let (mounts, bundle) = (self.mounts.clone(), self.state.bundle.clone());
        let id = self.state.id.clone();
        let ran = spawn_blocking(move || {
            for (point, hook) in &hooks {
                if let Err(error) = run(point, hook, &state, &bundle, &mounts) {
                    warn!(container = id, error = error.chain(), "hook failed");
                }
            }
        });
        if let Err(error) = ran.await {
            warn!(container = self.state.id, %error, "hooks");
        }
    }
}

/// Runs a hook to its end.
fn run(point: &str, hook: &Hook, state: &[u8], bundle: &Path, mounts: &HostMounts) -> Result<()> {
    let context = || format!("hook {point} {}", hook.path);
    let limit = match u64::try_from(hook.timeout) {
        Ok(0) | Err(_) => TIMEOUT,
        Ok(seconds) => Duration::from_secs(seconds),
    };
    let words = Words::new().internal(context)?;
    let command = command(hook, state, &words, bundle).internal(context)?;
    let child = spawn(command, mounts).context(Kind::InvalidArgument, context)?;
    let status = oci_hooks::wait(child, limit).internal(context)?;
    info!(point, path = hook.path, ?status, "hook ended");
    let reason = match status {
        Some(status) if status.success() => return Ok(()),
        Some(status) => status.to_string(),
        None => format!("killed after {} s", limit.as_secs()),
    };
    let words = words.last().internal(context)?;
    Err(ShimError::new(
        Kind::Internal,
        format!("{}: {reason}{words}", context()),
    ))
}

fn command(hook: &Hook, state: &[u8], words: &Words, bundle: &Path) -> io::Result<Command> {
    let environment = hook.env.iter().filter_map(|entry| entry.split_once('='));
    let mut command = oci_hooks::command(&hook.path, &hook.args, environment, state, words)?;
    command.current_dir(bundle);
    Ok(command)
}

/// Starts a program in the host's mount namespace. A process begins in the namespaces of the
/// thread that starts it, so this takes a thread that has its own root and working directory.
fn spawn(mut command: Command, mounts: &HostMounts) -> io::Result<Child> {
    thread::scope(|scope| {
        let work = || {
            raw::own_working_directory()?;
            let namespace = mounts.0.as_fd();
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?;
            command.spawn()
        };
        thread::Builder::new()
            .name("hook".to_owned())
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn hook(script: &str, timeout: i64) -> Hook {
        Hook {
            path: "/bin/sh".to_owned(),
            args: ["sh", "-c", script].map(ToOwned::to_owned).to_vec(),
            env: vec!["WORD=hello".to_owned()],
            timeout,
        }
    }

    /// Starts a program without the change of namespaces, which needs root.
    fn run_here(hook: &Hook, bundle: &Path) -> Result<()> {
        let words = Words::new().unwrap();
        let child = command(hook, b"{\"id\":\"c\"}", &words, bundle)
            .unwrap()
            .spawn()
            .unwrap();
        let limit = Duration::from_secs(hook.timeout.unsigned_abs());
        match oci_hooks::wait(child, limit).unwrap() {
            Some(status) if status.success() => Ok(()),
            status => Err(ShimError::new(
                Kind::Internal,
                format!("{status:?}{}", words.last().unwrap()),
            )),
        }
    }

    #[test]
    fn a_hook_gets_the_state_and_its_failure_has_its_words() {
        let root = tempfile::tempdir().unwrap();
        run_here(&hook("cat > state; echo $WORD > word", 60), root.path()).unwrap();
        let read = |name| std::fs::read_to_string(root.path().join(name)).unwrap();
        assert_eq!(read("state"), "{\"id\":\"c\"}");
        assert_eq!(read("word"), "hello\n");
        let failing = hook("echo no such >&2; echo bridge >&2; exit 3", 60);
        let error = run_here(&failing, root.path()).unwrap_err();
        assert!(error.chain().ends_with(": no such bridge"), "{error}");
    }

    #[test]
    fn a_hook_that_hangs_is_killed_with_its_children() {
        let root = tempfile::tempdir().unwrap();
        let hanging = hook("sleep 1000 & echo $! > child; wait", 2);
        assert!(run_here(&hanging, root.path()).is_err());
        let child = std::fs::read_to_string(root.path().join("child")).unwrap();
        // Gone in a moment, or not yet reaped by whoever takes orphans.
        let begin = Instant::now();
        while std::fs::read_to_string(format!("/proc/{}/stat", child.trim()))
            .is_ok_and(|stat| !stat.contains(") Z "))
        {
            assert!(begin.elapsed() < Duration::from_secs(10), "it lives");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn the_state_names_the_process_while_there_is_one() {
        let spec = crate::spec::read(br#"{"ociVersion": "1.0.2"}"#).unwrap();
        let mounts = HostMounts::current().unwrap();
        let hooks = Hooks::new(&spec, "c", Path::new("/b"), mounts);
        let state = |status, pid| -> serde_json::Value {
            serde_json::from_slice(&hooks.state.json(status, pid)).unwrap()
        };
        assert_eq!(state("creating", 7)["pid"], 7);
        assert_eq!(state("creating", 7)["bundle"], "/b");
        assert!(state("stopped", 0).get("pid").is_none());
    }
}
