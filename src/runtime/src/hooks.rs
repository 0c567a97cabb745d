// SPDX-License-Identifier: Apache-2.0
//! OCI hooks that run on the host: programs that a container's specification names, each with the
//! container's state on its standard input. nerdctl and Docker set up networks with them.
//!
//! They run in the host's mount namespace, not in the shim's. The process that the state names is
//! the machine's, which is in the network namespace whose interfaces the guest gets. A hook that
//! fails before the container exists fails the container; a later one is a warning, as the
//! specification says. Nothing waits for a hook longer than its time.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use crate::error::{Context, Kind, Result, ShimError};
use crate::raw;
use crate::spec::{Hook, Spec};

/// How long a hook may take that doesn't say.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How much of a failed hook's last words an error holds.
const WORDS: usize = 1024;

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
    version: String,
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
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
            version: spec.oci_version.clone(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            annotations: spec.annotations.clone(),
            mounts,
        }
    }

    /// Runs those that come before the container exists, to the first that fails.
    pub(crate) async fn create(&self, pid: u32) -> Result<()> {
        if self.create.is_empty() {
            return Ok(());
        }
        let (hooks, state) = (self.create.clone(), self.state("creating", pid));
        let (mounts, bundle) = (self.mounts.clone(), self.bundle.clone());
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
        if self.poststop.is_empty() || self.bundle.join(DONE).exists() {
            return;
        }
        if let Err(error) = File::create(self.bundle.join(DONE)) {
            warn!(container = self.id, %error, "hooks may run twice");
        }
        self.run_later(&self.poststop, "stopped", 0).await;
    }

    async fn run_later(&self, hooks: &[(&'static str, Hook)], status: &str, pid: u32) {
        if hooks.is_empty() {
            return;
        }
        let (hooks, state) = (hooks.to_vec(), self.state(status, pid));
        let (mounts, bundle) = (self.mounts.clone(), self.bundle.clone());
        let id = self.id.clone();
        let ran = spawn_blocking(move || {
            for (point, hook) in &hooks {
                if let Err(error) = run(point, hook, &state, &bundle, &mounts) {
                    warn!(container = id, error = error.chain(), "hook failed");
                }
            }
        });
        if let Err(error) = ran.await {
            warn!(container = self.id, %error, "hooks");
        }
    }

    fn state(&self, status: &str, pid: u32) -> Vec<u8> {
        let mut state = json!({
            "ociVersion": self.version,
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if pid != 0
            && let Some(state) = state.as_object_mut()
        {
            state.insert("pid".to_owned(), pid.into());
        }
        state.to_string().into_bytes()
    }
}

/// Runs a hook to its end.
fn run(point: &str, hook: &Hook, state: &[u8], bundle: &Path, mounts: &HostMounts) -> Result<()> {
    let context = || format!("hook {point} {}", hook.path);
    let limit = match u64::try_from(hook.timeout) {
        Ok(0) | Err(_) => TIMEOUT,
        Ok(seconds) => Duration::from_secs(seconds),
    };
    let words = file(&[]).internal(context)?;
    let command = command(hook, state, &words, bundle).internal(context)?;
    let child = spawn(command, mounts).context(Kind::InvalidArgument, context)?;
    let status = wait(child, limit).internal(context)?;
    info!(point, path = hook.path, ?status, "hook ended");
    let reason = match status {
        Some(status) if status.success() => return Ok(()),
        Some(status) => status.to_string(),
        None => format!("killed after {} s", limit.as_secs()),
    };
    let words = last_words(words).internal(context)?;
    Err(ShimError::new(
        Kind::Internal,
        format!("{}: {reason}{words}", context()),
    ))
}

fn command(hook: &Hook, state: &[u8], words: &File, bundle: &Path) -> io::Result<Command> {
    let mut command = Command::new(&hook.path);
    // The first argument is the program's name, as with execve.
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|entry| entry.split_once('=')))
        .current_dir(bundle)
        // Files, not pipes: nothing blocks on a hook that doesn't read, or leaves a process.
        .stdin(file(state)?)
        .stdout(Stdio::null())
        .stderr(words.try_clone()?)
        .process_group(0);
    Ok(command)
}

/// A file in memory, at its beginning.
fn file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
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

/// Waits for the end; `None` for a program that had to be killed, with all that it has started.
fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("process number"))?;
    let handle = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut events = [PollFd::new(&handle, PollFlags::IN)];
    if rustix::io::retry_on_intr(|| poll(&mut events, Some(&limit)))? == 0 {
        kill_process_group(pid, Signal::KILL)?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

/// The end of what a hook wrote to its standard error, for the end of a one-line message.
fn last_words(mut file: File) -> io::Result<String> {
    let mut text = Vec::new();
    let length = file.metadata()?.len();
    let offset = length.saturating_sub(u64::try_from(WORDS).unwrap_or(0));
    file.seek(io::SeekFrom::Start(offset))?;
    file.take(u64::try_from(WORDS).unwrap_or(0))
        .read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(if line.is_empty() {
        line
    } else {
        format!(": {line}")
    })
}

#[cfg(test)]
mod tests {
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
        let words = file(&[]).unwrap();
        let child = command(hook, b"{\"id\":\"c\"}", &words, bundle)
            .unwrap()
            .spawn()
            .unwrap();
        let limit = Duration::from_secs(hook.timeout.unsigned_abs());
        match wait(child, limit).unwrap() {
            Some(status) if status.success() => Ok(()),
            status => Err(ShimError::new(
                Kind::Internal,
                format!("{status:?}{}", last_words(words).unwrap()),
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
        let hanging = hook("sleep 1000 & echo $! > child; wait", 1);
        assert!(run_here(&hanging, root.path()).is_err());
        let child = std::fs::read_to_string(root.path().join("child")).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.trim()));
        // Gone, or not yet reaped by whoever takes orphans.
        assert!(stat.is_err() || stat.unwrap().contains(") Z "));
    }

    #[test]
    fn the_state_names_the_process_while_there_is_one() {
        let spec = crate::spec::read(br#"{"ociVersion": "1.0.2"}"#).unwrap();
        let mounts = HostMounts::current().unwrap();
        let hooks = Hooks::new(&spec, "c", Path::new("/b"), mounts);
        let state = |status, pid| -> serde_json::Value {
            serde_json::from_slice(&hooks.state(status, pid)).unwrap()
        };
        assert_eq!(state("creating", 7)["pid"], 7);
        assert_eq!(state("creating", 7)["bundle"], "/b");
        assert!(state("stopped", 0).get("pid").is_none());
    }
}
