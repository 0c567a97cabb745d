// SPDX-License-Identifier: Apache-2.0
//! The OCI runtime specification, field by field, and ways out of a container: the tables of
//! `tests/conformance`, run. What runc can run as well runs there first, so that the case itself
//! is proven.

pub mod message;
pub mod table;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use protocols::agent::oci;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::rig::{Outcome, Rig};
use message::Protocol;
use table::{Attempt, Case, json_file, merge, merge_text};

/// The log that hooks write to.
const LOG: &str = "data/log";

const HOOK: &str = r#"#!/usr/bin/busybox sh
state=$(/usr/bin/busybox cat 2>/dev/null || cat)
case $1 in
fail) echo as it was told >&2; exit 3 ;;
hang) exec /usr/bin/busybox sleep 1000 ;;
annotation) echo "$state" | /usr/bin/busybox grep -o '"org.example.word":"[a-z]*"' >> $LOG ;;
*) status=${state#*'"status":"'}; echo "$1 ${status%%'"'*}" >> $LOG ;;
esac
"#;

/// An agent, and an image with what the tables' scripts look for.
pub struct Bench {
    pub rig: Rig,
    pub protocol: Protocol,
    default: Value,
    number: std::cell::Cell<u32>,
}

impl Bench {
    pub async fn new() -> Result<Self> {
        let rig = Rig::bare().await?;
        rig.rootfs("image")?;
        let image = rig.share("image");
        for folder in ["run", "mnt", "data", "usr", "stuff/a", "made/for/it"] {
            fs::create_dir_all(image.join(folder))?;
        }
        for (name, text) in [
            ("etc/mark", "image\n"),
            ("stuff/a/file", "stuff\n"),
            ("etc/secret", "secret\n"),
        ] {
            fs::write(image.join(name), text)?;
        }
        fs::set_permissions(image.join("etc/secret"), fs::Permissions::from_mode(0o600))?;
        fs::set_permissions(image.join("stuff/a"), fs::Permissions::from_mode(0o1700))?;
        symlink("a/file", image.join("stuff/link"))?;
        for link in ["lib", "lib64"] {
            symlink(format!("usr/{link}"), image.join(link))?;
        }
        fs::copy("/usr/bin/id", image.join("bin/id-suid"))?;
        fs::set_permissions(
            image.join("bin/id-suid"),
            fs::Permissions::from_mode(0o4755),
        )?;
        fs::create_dir(rig.share("data"))?;
        fs::write(rig.share("data/file"), "file\n")?;
        // Users of a user namespace walk through here, with runc.
        fs::set_permissions(rig.share(".."), fs::Permissions::from_mode(0o755))?;
        for (place, shell) in [
            (rig.share("hook"), "/usr/bin/busybox"),
            (image.join("bin/hook"), "/bin/busybox"),
        ] {
            fs::write(&place, HOOK.replace("/usr/bin/busybox", shell))?;
            fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self {
            rig,
            protocol: Protocol::read()?,
            default: json_file("default.json")?,
            number: 0.into(),
        })
    }

    /// A file system whose owners can be mapped, which those of a test's folder may not be.
    pub fn mount_disk(&self) -> Result<()> {
        let content = tempfile::tempdir()?;
        fs::set_permissions(content.path(), fs::Permissions::from_mode(0o755))?;
        fs::write(content.path().join("owned"), "")?;
        chown(content.path().join("owned"), Some(7), Some(8))?;
        chown(content.path(), Some(0), Some(0))?;
        let image = self.rig.share("disk.ext4");
        run(Command::new("mkfs.ext4")
            .args(["-q", "-d"])
            .arg(content.path())
            .arg(&image)
            .arg("8M"))?;
        fs::create_dir(self.rig.share("disk"))?;
        run(Command::new("nsenter")
            .arg(format!("--mount=/proc/{}/ns/mnt", self.rig.pid()?))
            .args([
                "/usr/bin/mount",
                "-o",
                "loop",
                "/share/disk.ext4",
                "/share/disk",
            ]))
    }

    pub fn config(&self, patches: &[&str], script: Option<&str>) -> Result<Value> {
        let mut config = self.default.clone();
        for patch in patches {
            merge_text(&mut config, patch)?;
        }
        if let Some(script) = script {
            merge(
                &mut config,
                &json!({"process": {"args": ["sh", "-c", script]}}),
            )?;
        }
        Ok(config)
    }

    /// Tells scripts which namespaces are those of `pid`.
    fn name_namespaces(config: &mut Value, pid: &str) -> Result<()> {
        let kinds = ["mnt", "pid", "net", "ipc", "uts", "cgroup", "time", "user"];
        let names = kinds.map(|kind| {
            let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap_or_default();
            format!("GUEST_{kind}={}", link.display())
        });
        merge(config, &json!({"process": {"env+": names}}))
    }

    /// In the agent. What it refuses, at create or start, is the error.
    async fn in_agent(&self, mut config: Value) -> Result<Result<Outcome, String>> {
        Self::name_namespaces(&mut config, &self.rig.pid()?.to_string())?;
        let spec: oci::Spec = self.protocol.spec(&config)?;
        self.number.set(self.number.get() + 1);
        let id = format!("c{}", self.number.get());
        let words = |error: ttrpc::Error| match error {
            ttrpc::Error::RpcStatus(status) => Ok(status.message),
            other => bail!("{other:?}"),
        };
        if let Err(error) = self.rig.create(&id, spec).await {
            return Ok(Err(words(error)?));
        }
        let outcome = match self.rig.start(&id).await {
            Ok(()) => Ok(self.rig.outcome(&id, "").await?),
            Err(error) => Err(words(error)?),
        };
        self.rig.remove(&id).await?;
        Ok(outcome)
    }

    /// The same for a runtime on this machine: paths of the agent's root are those of its folder.
    pub fn on_host(&self, config: &Value) -> Result<String> {
        let share = format!("\"{}/", fs::canonicalize(self.rig.share("."))?.display());
        // In strings that begin with it and in a hook's environment.
        let text = config.to_string().replace("\"/share/", &share);
        Ok(text.replace("LOG=/share/", &share.replace('"', "LOG=")))
    }

    /// With runc; none where it refuses.
    fn in_runc(&self, mut config: Value) -> Result<Option<Outcome>> {
        Self::name_namespaces(&mut config, "self")?;
        let bundle = Bundle::new(&self.on_host(&config)?)?;
        let output = bundle
            .runc("run")
            .stdin(Stdio::null())
            .output()
            .context("runc")?;
        bundle.runc("delete").arg("--force").output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let outcome = Outcome {
            stdout: text(output.stdout),
            stderr: text(output.stderr),
            status: output.status.code().unwrap_or(-1),
        };
        Ok(Some(outcome).filter(|outcome| !outcome.stderr.contains("level=error")))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.rig.share(LOG)).unwrap_or_default()
    }

    fn clear_log(&self) -> Result<()> {
        fs::write(self.rig.share(LOG), "")?;
        fs::set_permissions(self.rig.share(LOG), fs::Permissions::from_mode(0o666))?;
        Ok(())
    }

    pub async fn show(&self, case: &Case) -> Result<()> {
        let config = self.config(&[&case.spec], case.script.as_deref())?;
        if case.not_runc.is_none() {
            self.clear_log()?;
            let outcome = self.in_runc(config.clone())?;
            match (&case.refused, outcome) {
                (Some(_), None) => {}
                // Of a step after the create runc tells in a way of its own.
                (Some(_), Some(outcome)) if outcome.status != 0 && outcome.stdout.is_empty() => {}
                (Some(_), Some(outcome)) => bail!("runc does not refuse it: {outcome:?}"),
                (None, None) => bail!("runc refuses it: {:?}", self.in_runc(config.clone())),
                (None, Some(outcome)) => {
                    judge(case, &outcome, &self.log()).context("runc")?;
                }
            }
        }
        self.clear_log()?;
        match (&case.refused, self.in_agent(config).await?) {
            (Some(words), Err(line)) => {
                ensure!(line.contains(words), "{line:?} lacks {words:?}");
                Ok(())
            }
            (None, Ok(outcome)) => judge(case, &outcome, &self.log()),
            (_, other) => bail!("{other:?}"),
        }
    }

    pub async fn escape(&self, attempt: &Attempt, seccomp: &Value) -> Result<()> {
        let guard = json!({"linux": {"seccomp": seccomp}}).to_string();
        // perl makes system calls for which no program is at hand.
        let tools = r#"{"mounts+": [{"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}]}"#;
        let default = attempt.default.as_deref().unwrap_or("{}");
        let script = Some(attempt.script.as_str());
        let config = self.config(&[&guard, tools, default], script)?;
        let outcome = self.in_agent(config.clone()).await?;
        match outcome {
            Ok(outcome) if !outcome.stdout.contains("OUT") => {}
            other => bail!("with the default specification: {other:?}"),
        }
        let mut without = config;
        merge_text(&mut without, &attempt.without)?;
        let more = json!(attempt.capabilities);
        let sets = json!({"bounding+": more, "effective+": more, "permitted+": more});
        merge(&mut without, &json!({"process": {"capabilities": sets}}))?;
        match self.in_agent(without).await? {
            Ok(outcome) if outcome.stdout.contains("OUT") => Ok(()),
            other => bail!("without its defences: {other:?}"),
        }
    }
}

fn judge(case: &Case, outcome: &Outcome, log: &str) -> Result<()> {
    let expected = Outcome {
        stdout: case.prints.clone(),
        stderr: case.says.clone(),
        status: 0,
    };
    // Most scripts end with the status of what they look for.
    let seen = Outcome {
        status: 0,
        stdout: outcome.stdout.clone(),
        stderr: outcome.stderr.clone(),
    };
    ensure!(seen == expected, "{outcome:?} is not {expected:?}");
    if let Some(leaves) = &case.leaves {
        ensure!(log == leaves, "leaves {log:?}, not {leaves:?}");
    }
    Ok(())
}

/// A folder for runc.
pub struct Bundle(TempDir);

impl Bundle {
    pub fn new(config: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("config.json"), config)?;
        Ok(Self(folder))
    }

    pub fn runc(&self, verb: &str) -> Command {
        let mut command = Command::new("runc");
        let name = self.0.path().file_name().unwrap_or_default();
        let id = format!("conformance{}", name.to_string_lossy().replace('.', "-"));
        command
            .arg("--root")
            .arg(self.0.path().join("state"))
            .arg(verb);
        if matches!(verb, "run" | "create") {
            command.arg("--bundle").arg(self.0.path());
        }
        command.arg(id);
        command
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(())
}
