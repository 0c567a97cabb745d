// SPDX-License-Identifier: Apache-2.0
//! A pod's cgroup on the host (cgroup v2): its machine is in it, so that what the pod uses is
//! counted, and limited, where its runtime looks for it: in the cgroup above, which is the pod's.
//!
//! The cgroup has no limits of its own. Those of the containers are set in the guest.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::debug;

use super::journal::{Journal, Object};
use crate::error::{Context, Kind, Result, ShimError};

const ROOT: &str = "/sys/fs/cgroup";

/// How long the kernel may take to see that a cgroup's last process has ended.
const BUSY: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);

/// A cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// How many of the cgroups above it were made with it.
    above: usize,
}

impl Cgroup {
    /// Makes the cgroup that a specification names; none on a host without cgroup v2.
    pub(super) fn create(name: &str, journal: &mut Journal) -> Result<Option<Self>> {
        if name.is_empty() || !Path::new(ROOT).join("cgroup.controllers").exists() {
            return Ok(None);
        }
        Self::create_in(Path::new(ROOT), name, journal).map(Some)
    }

    fn create_in(root: &Path, name: &str, journal: &mut Journal) -> Result<Self> {
        let path = root.join(relative(name)?);
        let missing = path.ancestors().take_while(|path| !path.exists()).count();
        let cgroup = Self {
            path,
            above: missing.saturating_sub(1),
        };
        journal.record(Object::Cgroup(cgroup.clone()))?;
        fs::create_dir_all(&cgroup.path).context(Kind::FailedPrecondition, || {
            format!("make the cgroup {}", cgroup.path.display())
        })?;
        Ok(cgroup)
    }

    /// Moves a process in.
    pub(super) fn take(&self, pid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .internal(|| format!("move process {pid} to the cgroup {}", self.path.display()))
    }

    /// Removes it. Those above may be others' by now, and stay then.
    pub(super) fn remove(&self) -> io::Result<()> {
        let begin = Instant::now();
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) if begin.elapsed() > BUSY => return Err(error),
                Err(_) => sleep(PAUSE),
            }
        }
        for above in self.path.ancestors().skip(1).take(self.above) {
            if let Err(error) = fs::remove_dir(above) {
                debug!(cgroup = %above.display(), %error, "stays");
                break;
            }
        }
        Ok(())
    }
}

/// A cgroup's path below the root. In systemd's words, `slice:prefix:name`, a slice is in those
/// that its name begins with: `a-b.slice` in `a.slice`.
fn relative(name: &str) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    if let [slice, prefix, name] = *name.split(':').collect::<Vec<_>>().as_slice() {
        let stem = slice.strip_suffix(".slice").unwrap_or(slice);
        for (end, _) in stem.match_indices('-') {
            path.push(format!("{}.slice", stem.get(..end).unwrap_or_default()));
        }
        path.push(format!("{stem}.slice"));
        path.push(format!("{prefix}-{name}.scope"));
    } else {
        path.push(name.trim_start_matches('/'));
    }
    let mut parts = path.components();
    if parts.all(|part| matches!(part, Component::Normal(_))) {
        return Ok(path);
    }
    Err(ShimError::new(
        Kind::InvalidArgument,
        format!("config.json: linux.cgroupsPath: {name:?} is not below the cgroups' root"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_or_systemd_s() {
        let path = |name| relative(name).unwrap().display().to_string();
        assert_eq!(path("/kubepods/pod1/id"), "kubepods/pod1/id");
        assert_eq!(
            path("kubepods-besteffort-pod1.slice:cri-containerd:id"),
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/\
             cri-containerd-id.scope"
        );
        assert!(relative("/a/../../etc").is_err());
    }

    #[test]
    fn what_was_made_goes_and_what_was_there_stays() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("pods")).unwrap();
        let mut journal = Journal::create(root.path().join("journal/j")).unwrap();
        let mut make = |name| Cgroup::create_in(root.path(), name, &mut journal).unwrap();
        let first = make("/pods/p1/a");
        let second = make("/pods/p1/b");
        first.remove().unwrap();
        assert!(root.path().join("pods/p1/b").exists());
        second.remove().unwrap();
        first.remove().unwrap();
        assert!(root.path().join("pods").exists());
    }
}
