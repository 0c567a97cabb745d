// SPDX-License-Identifier: Apache-2.0
//! Hooks: programs of the guest, and `startContainer`'s of the container, that run at points of a
//! container's life (OCI runtime specification, "Lifecycle" and "POSIX-platform Hooks").
//!
//! Each gets the container's state on its standard input. One that fails or takes too long fails
//! the step that it belongs to; after the container's end it is a warning.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use oci_hooks::{State, TIMEOUT, Words};
use protocols::agent::oci;
use rustix::process::{Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tracing::warn;

use crate::error::{AgentError, Context as _, Result};
use crate::reaper::{Claimed, Reaper, ended};

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

    fn spawn(&self, state: &[u8], words: &Words) -> Result<Child> {
        let environment = self.environment.iter();
        let environment = environment.map(|(name, value)| (name.as_str(), value.as_str()));
        oci_hooks::command(&self.path, &self.arguments, environment, state, words)
            .and_then(|mut command| command.spawn())
            .context(|| self.context())
    }

    fn judge(&self, success: bool, how: &str, words: Words) -> Result<()> {
        if success {
            return Ok(());
        }
        let words = words.last().unwrap_or_default();
        let line = format!("{}: {how}{words}", self.context());
        Err(AgentError::precondition(line))
    }

    fn too_long(&self) -> String {
        format!("killed after {} s", self.limit.as_secs())
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
        _ => state.json(status, std::process::id()),
    };
    hooks.iter().try_for_each(|hook| {
        let words = Words::new().context(|| hook.context())?;
        let child = hook.spawn(&state, &words)?;
        let ended = oci_hooks::wait(child, hook.limit).context(|| hook.context())?;
        let how = ended.map_or_else(|| hook.too_long(), |status| status.to_string());
        hook.judge(ended.is_some_and(|status| status.success()), &how, words)
    })
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
        one_in_agent(reaper, hook, &state.json(status, pid.unsigned_abs())).await?;
    }
    Ok(())
}

/// The same for hooks whose failure changes nothing any more: all run.
pub(super) async fn run_all_in_agent(reaper: &Reaper, hooks: &[Hook], state: &State) {
    for hook in hooks {
        if let Err(error) = one_in_agent(reaper, hook, &state.json("stopped", 0)).await {
            warn!(container = state.id, error = error.line(), "hook failed");
        }
    }
}

async fn one_in_agent(reaper: &Reaper, hook: &Hook, state: &[u8]) -> Result<()> {
    let words = Words::new().context(|| hook.context())?;
    // Statuses are kept from before the process exists.
    let launch = reaper.launch();
    let child = hook.spawn(state, &words)?;
    let claimed = launch.child(&child).context(|| hook.context())?;
    let Claimed { pid, exit, .. } = claimed;
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
