// SPDX-License-Identifier: Apache-2.0
//! Hooks: programs of the guest, and `startContainer`'s of the container, that run at points of a
//! container's life (OCI runtime specification, "Lifecycle" and "POSIX-platform Hooks").
//!
//! Each gets the container's state on its standard input. One that fails or takes too long fails
//! the step that it belongs to; after the container's end it is a warning.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use protocols::agent::oci;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tracing::warn;

use crate::error::{AgentError, Context as _, Result};
use crate::reaper::{Reaper, ended};

/// For a hook that does not say.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How much of a failed hook's last words an error holds.
const WORDS: u64 = 1024;

/// A container's hooks, by the places where they run.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Hooks {
    /// `prestart` and `createRuntime`: the agent's namespaces, before the container has its root.
    pub(crate) create_runtime: Vec<Hook>,
    /// The container's namespaces, but the guest's files.
    pub(crate) create_container: Vec<Hook>,
    /// In the container, before its program.
    pub(crate) start_container: Vec<Hook>,
    pub(crate) poststart: Vec<Hook>,
    pub(crate) poststop: Vec<Hook>,
    pub(crate) state: State,
}

/// One hook.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Hook {
    /// Its name in the specification.
    point: String,
    path: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    limit: Duration,
}

/// What hooks are told about the container.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct State {
    version: String,
    id: String,
    bundle: PathBuf,
    annotations: BTreeMap<String, String>,
}

impl Hooks {
    /// # Errors
    ///
    /// A path that is not absolute, or a timeout that is none.
    pub(crate) fn new(spec: &oci::Spec) -> Result<Self> {
        let hooks = spec.Hooks.get_or_default();
        let all = |point: &str, hooks: &[oci::Hook]| -> Result<Vec<Hook>> {
            hooks.iter().map(|hook| Hook::new(point, hook)).collect()
        };
        let mut create_runtime = all("prestart", &hooks.Prestart)?;
        create_runtime.extend(all("createRuntime", &hooks.CreateRuntime)?);
        Ok(Self {
            create_runtime,
            create_container: all("createContainer", &hooks.CreateContainer)?,
            start_container: all("startContainer", &hooks.StartContainer)?,
            poststart: all("poststart", &hooks.Poststart)?,
            poststop: all("poststop", &hooks.Poststop)?,
            state: State {
                version: spec.Version.clone(),
                id: String::new(),
                bundle: bundle(&spec.Root.get_or_default().Path),
                annotations: spec.Annotations.clone().into_iter().collect(),
            },
        })
    }

    /// Names the container, whose id is not part of its spec.
    pub(crate) fn name(&mut self, id: &str) {
        id.clone_into(&mut self.state.id);
    }

    /// How long the hooks may take that a create waits for.
    pub(crate) fn patience_to_create(&self) -> Duration {
        limit(&self.create_runtime).saturating_add(limit(&self.create_container))
    }

    /// How long the hooks may take that a program's start waits for.
    pub(crate) fn patience_to_start(&self) -> Duration {
        limit(&self.start_container)
    }
}

fn limit(hooks: &[Hook]) -> Duration {
    hooks
        .iter()
        .fold(Duration::ZERO, |sum, hook| sum.saturating_add(hook.limit))
}

/// The folder that the root file system is in.
fn bundle(root: &str) -> PathBuf {
    let parent = Path::new(root).parent();
    parent.unwrap_or_else(|| Path::new("/")).to_owned()
}

impl Hook {
    fn new(point: &str, hook: &oci::Hook) -> Result<Self> {
        let wrong =
            |what: &str| AgentError::invalid(format!("hooks.{point}: {:?}: {what}", hook.Path));
        if !hook.Path.starts_with('/') {
            return Err(wrong("not an absolute path"));
        }
        let limit = match u64::try_from(hook.Timeout) {
            // On the wire 0 means "not given".
            Ok(0) => TIMEOUT,
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_) => return Err(wrong("the timeout must be above zero")),
        };
        let pair = |entry: &String| {
            let pair = entry.split_once('=');
            pair.map(|(name, value)| (name.to_owned(), value.to_owned()))
                .ok_or_else(|| wrong(&format!("env: {entry:?} is not NAME=value")))
        };
        Ok(Self {
            point: point.to_owned(),
            path: PathBuf::from(&hook.Path),
            arguments: hook.Args.clone(),
            environment: hook.Env.iter().map(pair).collect::<Result<_>>()?,
            limit,
        })
    }

    fn context(&self) -> String {
        format!("hook {} {:?}", self.point, self.path)
    }

    fn spawn(&self, state: &[u8], words: &File) -> Result<Child> {
        let spawn = || {
            let mut command = Command::new(&self.path);
            // The first argument is the program's name, as with execve(2).
            if let Some((name, arguments)) = self.arguments.split_first() {
                command.arg0(name).args(arguments);
            }
            command
                .env_clear()
                .envs(self.environment.iter().map(|(name, value)| (name, value)))
                // Files, not pipes: nothing waits for a hook that does not read, or that leaves
                // a process behind.
                .stdin(file(state)?)
                .stdout(Stdio::null())
                .stderr(words.try_clone()?)
                .process_group(0)
                .spawn()
        };
        spawn().context(|| self.context())
    }

    fn judge(&self, success: bool, how: &str, words: File) -> Result<()> {
        if success {
            return Ok(());
        }
        let words = last_words(words).unwrap_or_default();
        let line = format!("{}: {how}{words}", self.context());
        Err(AgentError::precondition(line))
    }

    fn too_long(&self) -> String {
        format!("killed after {} s", self.limit.as_secs())
    }
}

impl State {
    /// As JSON.
    fn with(&self, status: &str, pid: i32) -> Vec<u8> {
        let mut state = serde_json::json!({
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

/// Runs hooks one after the other in the calling process, which has one thread and no other
/// children.
///
/// # Errors
///
/// The first that fails.
pub(super) fn run_here(hooks: &[Hook], state: &State, status: &str) -> Result<()> {
    let state = match hooks {
        [] => return Ok(()),
        _ => state.with(status, rustix::process::getpid().as_raw_nonzero().get()),
    };
    hooks.iter().try_for_each(|hook| {
        let words = file(&[]).context(|| hook.context())?;
        let child = hook.spawn(&state, &words)?;
        let ended = wait(child, hook.limit).context(|| hook.context())?;
        let how = ended.map_or_else(|| hook.too_long(), |status| status.to_string());
        hook.judge(ended.is_some_and(|status| status.success()), &how, words)
    })
}

/// Waits for the end; `None` for a program that had to be killed, with all that it has started.
fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = number(&child)?;
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

/// Runs hooks one after the other in the agent's own namespaces, where the reaper waits for all
/// children.
///
/// # Errors
///
/// The first that fails.
pub(super) async fn run_in_agent(
    reaper: &Reaper,
    hooks: &[Hook],
    state: &State,
    status: &str,
    pid: i32,
) -> Result<()> {
    for hook in hooks {
        one_in_agent(reaper, hook, &state.with(status, pid)).await?;
    }
    Ok(())
}

/// The same for hooks whose failure changes nothing any more: all run.
pub(super) async fn run_all_in_agent(reaper: &Reaper, hooks: &[Hook], state: &State) {
    for hook in hooks {
        if let Err(error) = one_in_agent(reaper, hook, &state.with("stopped", 0)).await {
            warn!(container = state.id, error = error.line(), "hook failed");
        }
    }
}

async fn one_in_agent(reaper: &Reaper, hook: &Hook, state: &[u8]) -> Result<()> {
    let words = file(&[]).context(|| hook.context())?;
    // Statuses are kept from before the process exists.
    let launch = reaper.launch();
    let child = hook.spawn(state, &words)?;
    let pid = number(&child).context(|| hook.context())?;
    let handle: OwnedFd = pidfd_open(pid, PidfdFlags::empty()).context(|| hook.context())?;
    let exit = launch.claim(pid.as_raw_nonzero().get(), &handle);
    match timeout(hook.limit, ended(&exit)).await {
        Ok(end) => {
            let how = format!("exit status: {}", end.code);
            hook.judge(end.code == 0, &how, words)
        }
        Err(_) => {
            let _ = kill_process_group(pid, Signal::KILL);
            hook.judge(false, &hook.too_long(), words)
        }
    }
}

fn number(child: &Child) -> io::Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("process number"))
}

/// A file in memory, at its beginning.
fn file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// The end of what a hook wrote to its standard error, for the end of a one-line message.
fn last_words(mut file: File) -> io::Result<String> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(WORDS)))?;
    let mut text = Vec::new();
    file.take(WORDS).read_to_end(&mut text)?;
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

    fn hook(script: &str, seconds: i64) -> Result<Hook> {
        Hook::new(
            "prestart",
            &oci::Hook {
                Path: "/bin/sh".to_owned(),
                Args: ["sh", "-c", script].map(str::to_owned).to_vec(),
                Env: vec!["WORD=hello".to_owned()],
                Timeout: seconds,
                ..oci::Hook::default()
            },
        )
    }

    fn run(script: &str, seconds: i64) -> Result<()> {
        let state = State {
            id: "c\"1".to_owned(),
            ..State::default()
        };
        run_here(&[hook(script, seconds)?], &state, "creating")
    }

    #[test]
    fn a_hook_gets_the_state_and_its_failure_has_its_words() {
        run(
            r#"grep -q '"id":"c\\"1".*"pid":[1-9]' && test $WORD = hello"#,
            0,
        )
        .unwrap();
        let error = run("echo no such >&2; echo bridge >&2; exit 3", 0).unwrap_err();
        let line = error.line();
        assert!(line.starts_with("hook prestart \"/bin/sh\": "), "{line}");
        assert!(line.ends_with("3: no such bridge"), "{line}");
    }

    #[test]
    fn a_hook_that_hangs_is_killed_with_its_children() {
        let error = run("sleep 1000 & wait", 1).unwrap_err();
        assert!(error.line().ends_with("killed after 1 s"));
    }

    #[test]
    fn what_no_hook_can_be_is_refused() {
        hook("true", -1).unwrap_err();
        let relative = oci::Hook {
            Path: "bin/true".to_owned(),
            ..oci::Hook::default()
        };
        Hook::new("poststop", &relative).unwrap_err();
    }

    #[test]
    fn the_bundle_is_where_the_root_is() {
        assert_eq!(bundle("/run/c1/rootfs"), Path::new("/run/c1"));
        assert_eq!(bundle("/rootfs"), Path::new("/"));
    }
}
