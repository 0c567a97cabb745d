// SPDX-License-Identifier: Apache-2.0
//! `kata-ctl`: what the runtime would go by, whether this host has what it needs, what storage
//! drivers tell it and ask of it, and a way into a guest.

mod check;
mod environment;
mod exec;
mod show;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::{Named, Sourced};
use crate::error::{Kind, Result, ShimError};
use crate::{disk, management};

const HELP: &str = "\
usage: kata-ctl COMMAND [OPTION...]

commands:
  config   the configuration in effect as TOML, and where each value comes from
  check    whether this host can run containers in machines; says what fails
  env      versions, files and the host in TOML
  exec SANDBOX  a terminal in the guest of a sandbox that has its debug console on; the beginning
                of its identifier will do; Ctrl-] leaves
  direct-volume add     a volume's path stands for a file system on a disk, which guests mount
  direct-volume remove  it does so no longer
  direct-volume stats   what a mounted volume holds, as JSON in CSI's words
  direct-volume resize  a mounted volume takes so much of its disk, which has grown
  version  this program's version

options:
  --file FILE               of config, check, env: this configuration file
  --annotation NAME=VALUE   of config: as if a pod had it (may be repeated)
  --json                    of env: JSON
  --volume-path PATH        of direct-volume: what is bound into containers
  --mount-info JSON         of direct-volume add: device, fstype, options and so on
  --size BYTES              of direct-volume resize: the new size
";

/// The command line.
#[derive(Debug, Default, PartialEq, Eq)]
struct Arguments {
    command: String,
    file: Option<PathBuf>,
    annotations: HashMap<String, String>,
    json: bool,
    volume: Option<PathBuf>,
    mount_info: Option<String>,
    size: Option<u64>,
    sandbox: Option<String>,
}

/// Runs a command; what it prints, and whether all is well.
pub(crate) fn run(arguments: impl Iterator<Item = OsString>) -> Result<(String, bool)> {
    let arguments = parse(arguments)?;
    match arguments.command.as_str() {
        "config" => {
            let mut sourced = arguments.read()?;
            sourced.annotate(&arguments.annotations)?;
            Ok((show::toml(&sourced), true))
        }
        "check" => Ok(check::run(arguments.read())),
        "env" => environment::describe(&arguments.read()?, arguments.json).map(|it| (it, true)),
        "exec" => {
            let sandbox = arguments.sandbox.as_deref();
            let sandbox = sandbox.ok_or_else(|| missing("the sandbox's identifier"))?;
            exec::run(sandbox).map(|()| (String::new(), true))
        }
        "direct-volume add" => {
            let info = arguments.mount_info.as_deref();
            let info = info.ok_or_else(|| missing("--mount-info"))?;
            disk::add_volume(arguments.volume()?, info).map(|()| (String::new(), true))
        }
        "direct-volume remove" => {
            disk::remove_volume(arguments.volume()?).map(|()| (String::new(), true))
        }
        "direct-volume stats" => {
            management::volume_stats(arguments.volume()?).map(|stats| (format!("{stats}\n"), true))
        }
        "direct-volume resize" => {
            let size = arguments.size.ok_or_else(|| missing("--size"))?;
            management::resize_volume(arguments.volume()?, size).map(|()| (String::new(), true))
        }
        "version" => Ok((
            format!("kata-ctl (Nutshell) {}\n", env!("CARGO_PKG_VERSION")),
            true,
        )),
        _ => Ok((HELP.to_owned(), true)),
    }
}

impl Arguments {
    fn read(&self) -> Result<Sourced> {
        Sourced::read(self.file.clone().map(Named::File))
    }

    fn volume(&self) -> Result<&Path> {
        let volume = self.volume.as_deref();
        volume.ok_or_else(|| missing("--volume-path"))
    }
}

fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Arguments> {
    let mut parsed = Arguments::default();
    let mut words = arguments.map(|word| {
        word.into_string()
            .map_err(|word| invalid(format!("argument {word:?} is not UTF-8")))
    });
    parsed.command = words
        .next()
        .transpose()?
        .unwrap_or_else(|| "help".to_owned());
    if parsed.command == "direct-volume" {
        let action = words.next().transpose()?.unwrap_or_default();
        parsed.command = format!("direct-volume {action}");
    }
    if parsed.command == "exec" {
        parsed.sandbox = words.next().transpose()?;
    }
    let options: &[&str] = match parsed.command.as_str() {
        "config" => &["--file", "--annotation"],
        "check" => &["--file"],
        "env" => &["--file", "--json"],
        "direct-volume add" => &["--volume-path", "--mount-info"],
        "direct-volume remove" | "direct-volume stats" => &["--volume-path"],
        "direct-volume resize" => &["--volume-path", "--size"],
        "exec" | "version" | "--version" | "help" | "--help" | "-h" => &[],
        other => {
            return Err(invalid(format!(
                "unknown command {other:?}: there are config, check, env, exec, direct-volume add, \
                 direct-volume remove, direct-volume stats, direct-volume resize, version, help"
            )));
        }
    };
    parsed.command = parsed.command.trim_start_matches('-').to_owned();
    while let Some(word) = words.next().transpose()? {
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        if !options.contains(&name) {
            return Err(invalid(format!("{} knows no {name:?}", parsed.command)));
        }
        if name == "--json" {
            parsed.json = true;
            continue;
        }
        let value = match inline {
            Some(value) => value,
            None => words
                .next()
                .transpose()?
                .ok_or_else(|| invalid(format!("{name} wants a value")))?,
        };
        match name {
            "--file" => parsed.file = Some(value.into()),
            "--volume-path" => parsed.volume = Some(value.into()),
            "--mount-info" => parsed.mount_info = Some(value),
            "--size" => {
                let size = value.parse().ok().filter(|size| *size > 0);
                let size = size.ok_or_else(|| invalid(format!("--size {value:?}: wants bytes")))?;
                parsed.size = Some(size);
            }
            _ => {
                let (name, value) = value
                    .split_once('=')
                    .ok_or_else(|| invalid(format!("--annotation {value:?}: wants NAME=VALUE")))?;
                parsed.annotations.insert(name.to_owned(), value.to_owned());
            }
        }
    }
    Ok(parsed)
}

fn missing(option: &str) -> ShimError {
    invalid(format!("{option} is missing"))
}

fn invalid(context: String) -> ShimError {
    ShimError::new(Kind::InvalidArgument, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Result<Arguments> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn options_are_read() {
        let parsed =
            arguments("config --file /c.toml --annotation a=b=c --annotation=d=e").unwrap();
        assert_eq!(parsed.file, Some("/c.toml".into()));
        assert_eq!(parsed.annotations.get("a").map(String::as_str), Some("b=c"));
        assert_eq!(parsed.annotations.get("d").map(String::as_str), Some("e"));
        assert!(arguments("env --json").unwrap().json);
        let parsed = arguments("direct-volume add --volume-path /v --mount-info {}").unwrap();
        assert_eq!(parsed.command, "direct-volume add");
        assert_eq!(parsed.volume, Some("/v".into()));
        assert_eq!(parsed.mount_info.as_deref(), Some("{}"));
        let parsed = arguments("direct-volume resize --volume-path /v --size=4096").unwrap();
        assert_eq!(parsed.size, Some(4096));
        assert_eq!(arguments("exec a1").unwrap().sandbox.as_deref(), Some("a1"));
    }

    #[test]
    fn unknown_words_are_refused() {
        for (line, reason) in [
            ("factory", "unknown command \"factory\": there are config, "),
            ("exec a b", "exec knows no \"b\""),
            (
                "direct-volume",
                "unknown command \"direct-volume \": there are ",
            ),
            (
                "direct-volume remove --mount-info x",
                "knows no \"--mount-info\"",
            ),
            ("direct-volume stats --size 1", "knows no \"--size\""),
            (
                "direct-volume resize --size -1",
                "--size \"-1\": wants bytes",
            ),
            ("direct-volume resize --size 0", "--size \"0\": wants bytes"),
            ("check --json", "check knows no \"--json\""),
            ("config --file", "--file wants a value"),
            (
                "config --annotation a",
                "--annotation \"a\": wants NAME=VALUE",
            ),
        ] {
            let error = arguments(line).unwrap_err().chain();
            assert!(error.contains(reason), "{reason} in {error}");
        }
    }

    #[test]
    fn help_and_version_are_there() {
        let output = |line: &str| run(line.split_whitespace().map(OsString::from)).unwrap().0;
        for line in ["", "help", "--help", "-h"] {
            assert_eq!(output(line), HELP);
        }
        assert!(output("version").starts_with("kata-ctl (Nutshell) "));
        assert_eq!(output("--version"), output("version"));
    }
}
