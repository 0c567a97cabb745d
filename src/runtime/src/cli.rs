// SPDX-License-Identifier: Apache-2.0
//! The shim's command line, in the manner of Go's `flag` package, which containerd speaks:
//! `-name value`, `-name=value`, one or two dashes, flags before the action.

use std::ffi::OsString;
use std::path::PathBuf;

use tracing::Level;

use crate::error::{Context, Kind, Result, ShimError};

/// The program's name, which its processes go by although they start from `/proc/self/exe`.
pub(crate) const PROGRAM: &str = "containerd-shim-kata-v2";

/// The hidden first argument of the VMM's process.
pub(crate) const VMM_ROLE: &str = "vmm";

/// What the process is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start a shim for a bundle and print its address.
    Start,
    /// Remove what a dead shim left, and print the exit status.
    Delete,
    /// Be the shim.
    Serve,
    /// Be the virtual machine monitor of a shim.
    Vmm,
    /// Print what runtime this is, as a protobuf message.
    Info,
    /// Print the version.
    Version,
}

/// The whole command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    /// containerd's own socket.
    pub(crate) address: String,
    /// The container's id.
    pub(crate) id: String,
    /// The bundle; the working directory where absent.
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) debug: bool,
    /// What the monitor logs.
    pub(crate) log_level: Level,
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Arguments> {
    let mut parsed = Arguments {
        action: Action::Serve,
        namespace: String::new(),
        address: String::new(),
        id: String::new(),
        bundle: None,
        debug: false,
        log_level: Level::INFO,
    };
    let mut arguments = arguments
        .map(|argument| {
            argument
                .into_string()
                .map_err(|argument| invalid(format!("argument {argument:?} is not UTF-8")))
        })
        .peekable();
    if arguments
        .next_if(|first| first.as_deref().is_ok_and(|first| first == VMM_ROLE))
        .is_some()
    {
        parsed.action = Action::Vmm;
        if let Some(level) = arguments.next().transpose()? {
            parsed.log_level = level
                .parse()
                .context(Kind::InvalidArgument, || format!("log level {level:?}"))?;
        }
        return Ok(parsed);
    }
    while let Some(argument) = arguments.next().transpose()? {
        let Some(flag) = argument
            .strip_prefix("--")
            .or_else(|| argument.strip_prefix('-'))
        else {
            parsed.action = match argument.as_str() {
                "start" => Action::Start,
                "delete" => Action::Delete,
                other => return Err(invalid(format!("unknown action {other:?}"))),
            };
            continue;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        match name {
            "debug" => parsed.debug = inline.is_none_or(|value| value == "true"),
            "info" => parsed.action = Action::Info,
            "v" | "version" => parsed.action = Action::Version,
            "namespace" | "address" | "id" | "bundle" | "publish-binary" | "socket" => {
                let value = match inline {
                    Some(value) => value,
                    None => arguments
                        .next()
                        .transpose()?
                        .ok_or_else(|| invalid(format!("flag -{name} wants a value")))?,
                };
                match name {
                    "namespace" => parsed.namespace = value,
                    "address" => parsed.address = value,
                    "id" => parsed.id = value,
                    "bundle" => parsed.bundle = Some(PathBuf::from(value)),
                    // Events go over TTRPC_ADDRESS, and the socket is made by `start`.
                    _ => {}
                }
            }
            other => return Err(invalid(format!("unknown flag -{other}"))),
        }
    }
    if matches!(
        parsed.action,
        Action::Start | Action::Delete | Action::Serve
    ) {
        check_id("id", &parsed.id)?;
        check_id("namespace", &parsed.namespace)?;
    }
    Ok(parsed)
}

/// Identifiers become names of files and sockets: containerd's own rule for them, letters, digits
/// and `_.-`, 76 bytes at most, and never a path.
pub(crate) fn check_id(what: &str, id: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if id.is_empty() || id.len() > 76 || !id.bytes().all(plain) || id.starts_with('.') {
        return Err(invalid(format!("{what} {id:?} is not a valid identifier")));
    }
    Ok(())
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
    fn containerd_starts_a_shim() {
        let parsed = arguments(
            "-namespace default -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id t1 start",
        )
        .unwrap();
        assert_eq!(parsed.action, Action::Start);
        assert_eq!(parsed.id, "t1");
        assert_eq!(parsed.namespace, "default");
        assert!(!parsed.debug);
    }

    #[test]
    fn flags_take_go_s_other_forms() {
        let parsed =
            arguments("--namespace=k8s.io -debug -id=a-b_c.1 -bundle /run/b delete").unwrap();
        assert_eq!(parsed.action, Action::Delete);
        assert!(parsed.debug);
        assert_eq!(parsed.bundle, Some(PathBuf::from("/run/b")));
    }

    #[test]
    fn the_monitor_is_told_what_to_log() {
        let parsed = arguments("vmm DEBUG").unwrap();
        assert_eq!(
            (parsed.action, parsed.log_level),
            (Action::Vmm, Level::DEBUG)
        );
        assert_eq!(arguments("vmm").unwrap().log_level, Level::INFO);
        assert!(arguments("vmm loud").is_err());
    }

    #[test]
    fn no_action_means_serve() {
        assert_eq!(
            arguments("-namespace n -id a").unwrap().action,
            Action::Serve
        );
    }

    #[test]
    fn an_id_is_never_a_path() {
        for id in ["", "..", "a/b", ".hidden", "a b"] {
            assert!(check_id("id", id).is_err(), "{id:?}");
        }
        assert!(arguments("-namespace n -id ../../etc start").is_err());
    }

    #[test]
    fn unknown_words_are_refused() {
        assert!(arguments("-namespace n -id a -frobnicate start").is_err());
        assert!(arguments("-namespace n -id a stop").is_err());
        assert!(arguments("-namespace n -id").is_err());
    }
}
