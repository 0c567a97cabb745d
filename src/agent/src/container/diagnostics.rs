// SPDX-License-Identifier: Apache-2.0
//! GetDiagnosticData: what a container left to say why it ended.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use protocols::agent::agent::GetDiagnosticDataRequest;
use protocols::agent::oci;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::Errno;

use crate::error::{AgentError, Context as _, Kind, Result};
use crate::sandbox::Sandbox;

/// The one kind of data.
const TERMINATION_LOG: &str = "termination_log";
/// Kubernetes' annotation about the file's path in the container, and its usual value.
const ANNOTATION: &str = "io.kubernetes.container.terminationMessagePath";
const USUAL: &str = "/dev/termination-log";
/// As much of its end is told.
const MOST: u64 = 4096;

/// Where the guest has the file that the container sees as its termination log.
pub(super) fn termination_log_of(spec: &oci::Spec) -> Option<PathBuf> {
    let inside = spec
        .Annotations
        .get(ANNOTATION)
        .map_or(USUAL, String::as_str);
    let mount = spec
        .Mounts
        .iter()
        .find(|mount| mount.destination == inside)?;
    Some(PathBuf::from(&mount.source)).filter(|path| path.is_absolute())
}

/// The end of the container's termination log.
///
/// # Errors
///
/// Another kind of data; a container without such a file.
pub(crate) fn termination_log(
    sandbox: &Sandbox,
    request: &GetDiagnosticDataRequest,
) -> Result<String> {
    if request.log_type != TERMINATION_LOG {
        return Err(AgentError::invalid(format!(
            "log_type {:?}: there is only {TERMINATION_LOG:?}",
            request.log_type
        )));
    }
    let container = sandbox.container(&request.container_id)?;
    let none = || {
        AgentError::not_found(format!(
            "container {:?} has no termination log",
            container.id
        ))
    };
    let path = container.termination_log.as_ref().ok_or_else(none)?;
    let context = || format!("termination log {path:?}");
    // The container writes there, and may put what it likes in its place.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOENT => none(),
        error => AgentError::io(context(), error),
    })?;
    let status = fstat(&file).context(context)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        let line = format!("{}: not a regular file", context());
        return Err(AgentError::new(Kind::FailedPrecondition, line));
    }
    let length = u64::try_from(status.st_size).unwrap_or(0);
    let mut file = File::from(file);
    file.seek(SeekFrom::Start(length.saturating_sub(MOST)))
        .context(context)?;
    let mut data = Vec::new();
    file.take(MOST).read_to_end(&mut data).context(context)?;
    Ok(String::from_utf8_lossy(&data).into_owned())
}
