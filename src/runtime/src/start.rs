// SPDX-License-Identifier: Apache-2.0
//! `start`: brings up the shim that serves a bundle, and prints its address.
//!
//! containerd runs this in the bundle's folder, takes what it prints as the shim's address, and
//! reports whatever it prints as the error when it fails. It must end at once, so the shim is
//! left behind as a process of its own. The shim's socket is listening already when the address
//! is printed; the shim receives it as its standard input, so that no path and no number passes.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use rustix::fs::{Mode, OFlags};
use rustix::process::umask;

use crate::bundle::{Bundle, OPTIONS};
use crate::cli::{Arguments, PROGRAM};
use crate::config::is_ours;
use crate::error::{Context, Kind, Result, ShimError};
use crate::paths;

/// The most that is read of the runtime handler's options.
const MOST_OPTIONS: u64 = 1 << 20;

/// Starts a shim, or finds the one of the container's pod.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let bundle = Bundle::open(arguments.bundle.as_deref())?;
    let sandbox = bundle.sandbox(&arguments.id)?;
    let socket = paths::shim_socket(&arguments.address, &arguments.namespace, sandbox.id());
    if sandbox.is_member() {
        UnixStream::connect(&socket).context(Kind::Unavailable, || {
            format!("the shim of sandbox {} does not answer", sandbox.id())
        })?;
    } else {
        keep_options(&bundle, io::stdin())?;
        let listener = listen(&socket)?;
        if let Err(error) = spawn(arguments, &bundle, listener) {
            // The socket is ours; where removing it fails too, the first error says more.
            let _ = fs::remove_file(&socket);
            return Err(error);
        }
    }
    let address = format!("unix://{}", socket.display());
    // containerd reads this file when it comes up again beside a running shim.
    bundle.write("address", address.as_bytes())?;
    let mut output = io::stdout();
    output
        .write_all(address.as_bytes())
        .and_then(|()| output.flush())
        .internal(|| "print the address".to_owned())
}

/// Keeps the runtime handler's options for the shim: containerd passes them on standard input, and
/// with the sandbox API nowhere else. They end with the bundle.
fn keep_options(bundle: &Bundle, input: impl Read + IsTerminal) -> Result<()> {
    if input.is_terminal() {
        return Ok(());
    }
    let mut bytes = Vec::new();
    input
        .take(MOST_OPTIONS)
        .read_to_end(&mut bytes)
        .internal(|| "read the options from standard input".to_owned())?;
    // containerd 2.3 writes more than the options; they come by the request as well.
    match Any::parse_from_bytes(&bytes) {
        Ok(any) if is_ours(&any) => bundle.write(OPTIONS, &bytes),
        _ => Ok(()),
    }
}

/// Makes the socket, for root only. A dead shim's socket is replaced.
fn listen(path: &Path) -> Result<UnixListener> {
    let context = || format!("listen at {}", path.display());
    if let Some(folder) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(folder)
            .internal(context)?;
    }
    // The mode of a socket is what the mask leaves when it is bound; this process has one thread.
    let mask = umask(Mode::XUSR | Mode::RWXG | Mode::RWXO);
    let mut result = UnixListener::bind(path);
    if let Err(error) = &result
        && error.kind() == io::ErrorKind::AddrInUse
    {
        if UnixStream::connect(path).is_ok() {
            return Err(ShimError::new(
                Kind::AlreadyExists,
                format!("a shim already listens at {}", path.display()),
            ));
        }
        result = fs::remove_file(path).and_then(|()| UnixListener::bind(path));
    }
    umask(mask);
    result.internal(context)
}

/// Starts the serving shim: this program again, without an action.
fn spawn(arguments: &Arguments, bundle: &Bundle, listener: UnixListener) -> Result<()> {
    let (output, errors) = log(bundle);
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(PROGRAM)
        .args(["-namespace", &arguments.namespace])
        .args(["-address", &arguments.address])
        .args(["-id", &arguments.id])
        .current_dir(bundle.path())
        .stdin(OwnedFd::from(listener))
        .stdout(output)
        .stderr(errors);
    if arguments.debug {
        command.arg("-debug");
    }
    let shim = command.spawn().internal(|| "start the shim".to_owned())?;
    bundle.write("shim.pid", shim.id().to_string().as_bytes())?;
    adjust_oom_score(shim.id());
    Ok(())
}

/// The bundle's pipe `log`, which containerd reads; nothing where it doesn't. Writing never
/// blocks: a full pipe loses lines.
fn log(bundle: &Bundle) -> (Stdio, Stdio) {
    let pipe = OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(bundle.path().join("log"))
        .and_then(|pipe| Ok((pipe.try_clone()?, pipe)));
    match pipe {
        Ok((output, errors)) => (output.into(), errors.into()),
        Err(_) => (Stdio::null(), Stdio::null()),
    }
}

/// When memory runs out, a shim shall go before containerd does, as with containerd's own shim.
fn adjust_oom_score(pid: u32) {
    let parent = rustix::process::getppid().map_or(1, |parent| parent.as_raw_nonzero().get());
    let Some(score) = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok())
    else {
        return;
    };
    let score = score.saturating_add(1).min(1000);
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_handler_s_options_are_kept_for_the_shim() {
        let root = tempfile::tempdir().unwrap();
        let bundle = Bundle::open(Some(root.path())).unwrap();
        let keep = |content: &[u8]| {
            let path = root.path().join("input");
            fs::write(&path, content).unwrap();
            keep_options(&bundle, fs::File::open(path).unwrap()).unwrap();
            bundle.options().unwrap()
        };
        assert_eq!(keep(b""), None);
        assert_eq!(keep(b"no message"), None);
        let mut any = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: b"\x12\x02/c".to_vec(),
            ..Any::default()
        };
        assert_eq!(keep(&any.write_to_bytes().unwrap()), Some(any.clone()));
        fs::remove_file(root.path().join(OPTIONS)).unwrap();
        any.type_url = "t1".to_owned();
        assert_eq!(keep(&any.write_to_bytes().unwrap()), None);
    }

    #[test]
    fn a_dead_shim_s_socket_is_replaced_and_a_live_one_s_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s/socket");
        let first = listen(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(listen(&path).unwrap_err().kind(), Kind::AlreadyExists);
        drop(first);
        listen(&path).unwrap();
    }
}
