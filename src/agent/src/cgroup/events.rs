// SPDX-License-Identifier: Apache-2.0
//! Files that tell of a change: `cgroup.events` and `memory.events`. The kernel marks them with
//! an exceptional condition (POLLPRI), so nothing is polled by a timer.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::io::pread;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Cgroup;
use crate::error::{AgentError, Context as _, Result};
use crate::sys::watch::watch;

/// Waits until `key` of `cgroup.events` has `value`.
pub(super) async fn wait(cgroup: &Cgroup, key: &str, value: &str) -> Result<()> {
    let file = Watched::open(cgroup, "cgroup.events")?;
    while file.value(key)?.as_deref() != Some(value) {
        file.changed().await?;
    }
    Ok(())
}

/// Counts of processes that the kernel killed because the group was out of memory.
#[derive(Debug)]
pub(crate) struct OutOfMemory {
    file: Watched,
    seen: u64,
}

impl OutOfMemory {
    /// # Errors
    ///
    /// When the guest kernel has no memory controller.
    pub(crate) fn watch(cgroup: &Cgroup) -> Result<Self> {
        Ok(Self {
            file: Watched::open(cgroup, "memory.events")?,
            seen: 0,
        })
    }

    /// Waits for the next kill.
    ///
    /// # Errors
    ///
    /// When the group is gone.
    pub(crate) async fn next(&mut self) -> Result<()> {
        loop {
            let count = self.file.value("oom_kill")?;
            let count = count.and_then(|count| count.parse().ok()).unwrap_or(0);
            if count > self.seen {
                self.seen = count;
                return Ok(());
            }
            self.file.changed().await?;
        }
    }
}

#[derive(Debug)]
struct Watched(AsyncFd<OwnedFd>);

impl Watched {
    fn open(cgroup: &Cgroup, name: &str) -> Result<Self> {
        let context = || format!("watch {name} of the container's cgroup");
        let file = File::open(cgroup.file(name)).context(context)?;
        watch(OwnedFd::from(file), Interest::PRIORITY)
            .context(context)
            .map(Self)
    }

    /// Reading also arms the next notification.
    fn value(&self, key: &str) -> Result<Option<String>> {
        let mut buffer = [0; 1024];
        let length = pread(self.0.get_ref(), &mut buffer, 0)
            .context(|| "read events of the container's cgroup")?;
        let text = buffer
            .get(..length)
            .and_then(|bytes| str::from_utf8(bytes).ok())
            .ok_or_else(|| AgentError::internal("events of the container's cgroup are not text"))?;
        let value = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(found, _)| *found == key)
            .map(|(_, value)| value.to_owned());
        Ok(value)
    }

    async fn changed(&self) -> Result<()> {
        let mut ready = self
            .0
            .ready(Interest::PRIORITY)
            .await
            .context(|| "wait for events of the container's cgroup")?;
        ready.clear_ready();
        Ok(())
    }
}
