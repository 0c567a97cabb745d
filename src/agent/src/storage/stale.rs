// SPDX-License-Identifier: Apache-2.0
//! RemoveStaleVirtiofsShareMounts: mounts of a shared folder whose server on the host has gone.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;
use rustix::io::Errno;

use crate::error::{Context as _, Result};
use crate::mount;

const MOUNTS: &str = "/proc/self/mountinfo";

/// Takes away what nobody serves any more, what is mounted last first.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn remove() -> Result<()> {
    let text = fs::read_to_string(MOUNTS).context(|| format!("read {MOUNTS}"))?;
    for point in shares(&text).into_iter().rev() {
        if is_stale(&point) {
            mount::detach(&point)?;
        }
    }
    Ok(())
}

/// The mount points of shared folders (proc_pid_mountinfo(5)), in the order of mounting.
fn shares(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let (mount, source) = line.split_once(" - ")?;
            let point = mount.split(' ').nth(4)?;
            source.starts_with("virtiofs ").then(|| plain(point))
        })
        .collect()
}

/// Without the octal escapes of blanks.
fn plain(point: &str) -> PathBuf {
    let spelled = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    let path = spelled
        .iter()
        .fold(point.to_owned(), |path, (escape, letter)| {
            path.replace(escape, letter)
        });
    PathBuf::from(path)
}

#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) {
    let _ = shares(text);
}

fn is_stale(point: &Path) -> bool {
    matches!(
        statfs(point),
        Err(Errno::NOTCONN | Errno::CONNABORTED | Errno::STALE)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_shared_folders_only() {
        let text = "22 1 0:20 / /proc rw - proc proc rw\n\
                    30 1 0:31 / /run/kata-containers/shared\\040x rw,nodev shared:1 - virtiofs kataShared rw\n\
                    31 1 0:32 / /tmp rw - tmpfs virtiofs rw\n";
        assert_eq!(
            shares(text),
            [PathBuf::from("/run/kata-containers/shared x")]
        );
    }

    #[test]
    fn what_answers_is_not_stale() {
        assert!(!is_stale(Path::new("/")));
        assert!(!is_stale(Path::new("/no/such/place")));
        remove().unwrap();
    }
}
