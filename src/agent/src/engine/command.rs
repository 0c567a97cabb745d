// SPDX-License-Identifier: Apache-2.0
//! Finds the program to execute, with the words of error that users know from other runtimes.

use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;

use crate::error::{AgentError, Result};

/// The path of `program` for `execve(2)`: itself when it has a slash, else looked up in PATH of
/// `environment`. Runs in the container, as its user.
///
/// # Errors
///
/// `exec: "NAME": ...` when there is no such program or it can't be executed.
pub(crate) fn find(program: &str, environment: &[String]) -> Result<String> {
    let failed = |reason: &str| Err(AgentError::invalid(format!("exec: {program:?}: {reason}")));
    if program.contains('/') {
        return match check(program) {
            Ok(()) => Ok(program.to_owned()),
            Err(error) => failed(words(error)),
        };
    }
    // The last definition wins, as in a shell's environment.
    let path = environment
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut forbidden = false;
    // Relative folders would make the program depend on the current one.
    for folder in path.split(':').filter(|folder| folder.starts_with('/')) {
        let candidate = Path::new(folder).join(program);
        let Some(candidate) = candidate.to_str() else {
            continue;
        };
        match check(candidate) {
            Ok(()) => return Ok(candidate.to_owned()),
            Err(Errno::ACCESS) => forbidden = true,
            Err(_) => {}
        }
    }
    if forbidden {
        return failed(words(Errno::ACCESS));
    }
    failed("executable file not found in $PATH")
}

/// Refuses a program that is this binary itself, as `/proc/self/exe` is until the container's
/// program runs: the container would hold the agent's file open (CVE-2019-5736).
///
/// # Errors
///
/// `exec: "PATH": ...` then.
pub(crate) fn is_not(path: &str, own_file: (u64, u64)) -> Result<()> {
    match stat(path) {
        Ok(status) if (status.st_dev, status.st_ino) == own_file => Err(AgentError::invalid(
            format!("exec: {path:?}: is the agent, no program of the container"),
        )),
        _ => Ok(()),
    }
}

/// Words for a failed `execve(2)` or for a look at the program before it.
pub(crate) fn words(error: Errno) -> &'static str {
    match error {
        Errno::NOENT => "no such file or directory",
        Errno::ACCESS | Errno::PERM => "permission denied",
        Errno::ISDIR => "is a directory",
        Errno::NOTDIR => "not a directory",
        Errno::NOEXEC => "exec format error",
        Errno::LOOP => "too many levels of symbolic links",
        Errno::NAMETOOLONG => "file name too long",
        Errno::TXTBSY => "text file busy",
        Errno::TOOBIG => "argument list too long",
        Errno::NOMEM => "cannot allocate memory",
        _ => "cannot be executed",
    }
}

fn check(path: &str) -> rustix::io::Result<()> {
    let status = stat(path)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    // With the effective ids, which the process has by now.
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(path: &str) -> Vec<String> {
        vec!["PATH=/nowhere".to_owned(), format!("PATH={path}")]
    }

    #[test]
    fn looks_in_path_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = format!("relative::{}:/bin", folder.path().display());
        assert_eq!(find("sh", &environment(&path)).unwrap(), "/bin/sh");
    }

    #[test]
    fn says_what_other_runtimes_say() {
        let line = |program: &str| find(program, &environment("/bin")).unwrap_err().line();
        assert_eq!(
            line("no-such"),
            "exec: \"no-such\": executable file not found in $PATH"
        );
        assert_eq!(
            line("/no/such"),
            "exec: \"/no/such\": no such file or directory"
        );
        assert_eq!(line("/bin/"), "exec: \"/bin/\": is a directory");
        assert_eq!(
            line("/etc/passwd"),
            "exec: \"/etc/passwd\": permission denied"
        );
        assert_eq!(line(""), "exec: \"\": executable file not found in $PATH");
    }
}
