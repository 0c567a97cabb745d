// SPDX-License-Identifier: Apache-2.0
//! The session between xtask on the host and xtask in the dev VM: frames on one virtio-serial port.
//!
//! One port for everything keeps output, errors and the exit status in order. A frame is a kind (1 byte),
//! a length (4 bytes, little endian) and the payload.

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Name of the virtio-serial port.
pub(crate) const PORT: &str = "nutshell.session";
/// Largest payload of a frame, in bytes.
pub(crate) const MAX_PAYLOAD: usize = 64 << 10;
/// How often the guest says that it gets on.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(5);

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Guest to host: the VM is up.
    Ready,
    /// Host to guest: a [`Setup`].
    Setup,
    /// Guest to host: the set-up is done; the payload is empty, or why it failed.
    SetupDone,
    /// Host to guest: an [`Exec`].
    Exec,
    /// Host to guest: input bytes; none means end of input.
    Stdin,
    /// Host to guest: a [`Size`].
    Resize,
    /// Guest to host: output bytes.
    Stdout,
    /// Guest to host: error output bytes.
    Stderr,
    /// Guest to host: an [`Exit`].
    Exit,
    /// Guest to host, every [`HEARTBEAT`]: the VM gets on.
    Alive,
    /// Host to guest: the command takes too long; say on its error output what hangs, and kill it.
    Overdue,
}

const KINDS: [Kind; 11] = [
    Kind::Ready,
    Kind::Setup,
    Kind::SetupDone,
    Kind::Exec,
    Kind::Stdin,
    Kind::Resize,
    Kind::Stdout,
    Kind::Stderr,
    Kind::Exit,
    Kind::Alive,
    Kind::Overdue,
];

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Size {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// A command to run in the VM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Exec {
    pub(crate) argv: Vec<String>,
    pub(crate) cwd: PathBuf,
    pub(crate) env: Vec<(String, String)>,
    /// With a terminal of this size, else with pipes.
    pub(crate) terminal: Option<Size>,
}

/// What to bring up in the VM before the first command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// Files to place: from a path of the host's tree to a path in the VM.
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    /// OCI archives to import into containerd, which is started for them.
    pub(crate) images: Vec<PathBuf>,
}

/// How a command ended.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Exit {
    /// Exit status as a shell shows it: 128 and more for signals.
    pub(crate) code: u8,
}

/// A received frame.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// The payload as the message that belongs to the kind.
    pub(crate) fn message<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.payload)
            .with_context(|| format!("decoding a {:?} frame", self.kind))
    }
}

/// Writes one frame in one call, so that frames of several threads behind a lock never mix.
pub(crate) fn write(out: &mut impl Write, kind: Kind, payload: &[u8]) -> Result<()> {
    debug_assert!(payload.len() <= MAX_PAYLOAD, "payload too long");
    let code = KINDS
        .iter()
        .position(|k| *k == kind)
        .and_then(|n| u8::try_from(n).ok())
        .unwrap_or(u8::MAX);
    let mut frame = Vec::with_capacity(payload.len().saturating_add(5));
    frame.push(code);
    frame.extend(
        u32::try_from(payload.len())
            .context("frame too long")?
            .to_le_bytes(),
    );
    frame.extend(payload);
    out.write_all(&frame)
        .with_context(|| format!("sending a {kind:?} frame"))
}

/// Writes one frame with a message.
pub(crate) fn write_message(
    out: &mut impl Write,
    kind: Kind,
    message: &impl Serialize,
) -> Result<()> {
    write(out, kind, &serde_json::to_vec(message)?)
}

/// Reads one frame; `None` when the other end is gone.
pub(crate) fn read(input: &mut impl Read) -> Result<Option<Frame>> {
    let mut code = [0];
    if input.read(&mut code).context("receiving a frame")? == 0 {
        return Ok(None);
    }
    let [code] = code;
    let Some(kind) = KINDS.get(usize::from(code)).copied() else {
        bail!("unknown frame kind {code}");
    };
    let mut length = [0; 4];
    input.read_exact(&mut length).context("receiving a frame")?;
    let length = usize::try_from(u32::from_le_bytes(length))?;
    if length > MAX_PAYLOAD {
        bail!("frame of {length} bytes");
    }
    let mut payload = vec![0; length];
    input
        .read_exact(&mut payload)
        .context("receiving a frame")?;
    Ok(Some(Frame { kind, payload }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_in_order() {
        let mut wire = Vec::new();
        write(&mut wire, Kind::Stdout, b"abc").unwrap();
        write(&mut wire, Kind::Stdin, b"").unwrap();
        write_message(&mut wire, Kind::Exit, &Exit { code: 137 }).unwrap();

        let mut input = wire.as_slice();
        let first = read(&mut input).unwrap().unwrap();
        assert_eq!(
            (first.kind, first.payload.as_slice()),
            (Kind::Stdout, b"abc".as_slice())
        );
        assert_eq!(read(&mut input).unwrap().unwrap().kind, Kind::Stdin);
        assert_eq!(
            read(&mut input)
                .unwrap()
                .unwrap()
                .message::<Exit>()
                .unwrap()
                .code,
            137
        );
        assert!(read(&mut input).unwrap().is_none());
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert!(read(&mut [200_u8, 0, 0, 0, 0].as_slice()).is_err());
        assert!(read(&mut [0_u8, 255, 255, 255, 255].as_slice()).is_err());
    }
}
