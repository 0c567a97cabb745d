// SPDX-License-Identifier: Apache-2.0
//! What a process holds open, by kind: seen before and after, the difference is a leak.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::procs::Process;
use crate::wait::until;

/// How many files of each kind are open.
#[derive(Debug, Clone)]
pub struct Descriptors(BTreeMap<String, usize>);

impl Descriptors {
    /// Looks at a process.
    pub fn of(process: &Process) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for file in process.files()? {
            let count: &mut usize = counts.entry(kind(&file.target)).or_default();
            *count = count.saturating_add(1);
        }
        Ok(Self(counts))
    }

    /// What is open now and was not `before`, a line a kind.
    #[must_use]
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (kind, count) in &self.0 {
            let more = count.saturating_sub(before.0.get(kind).copied().unwrap_or_default());
            if more > 0 {
                lines.push(format!("{more} more of {kind}"));
            }
        }
        lines
    }
}

/// Waits until each process holds no more than in `before`; an error names what it is.
pub fn expect_no_more(before: &[(Process, Descriptors)], limit: Duration) -> Result<()> {
    for (process, before) in before {
        let mut new = Vec::new();
        until("descriptors to be closed", limit, || {
            new = Descriptors::of(process)?.beyond(before);
            Ok(new.is_empty().then_some(()))
        })
        .with_context(|| format!("left open in {}: {}", process.describe(), new.join(", ")))?;
    }
    Ok(())
}

/// What a link in `/proc/PID/fd` points to, without the number of the one socket or pipe.
fn kind(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, _)) if !target.starts_with('/') && kind != "anon_inode" => kind.to_owned(),
        _ => target.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::pipe;

    use super::*;

    #[test]
    fn an_open_pipe_is_found() {
        let own = Process::read(std::process::id().cast_signed()).unwrap();
        let before = Descriptors::of(&own).unwrap();
        let _pipe = pipe().unwrap();
        let found = Descriptors::of(&own).unwrap().beyond(&before);
        let pipes = |line: &String| line.ends_with("more of pipe");
        assert!(found.iter().any(pipes), "{found:?}");
        assert_eq!(kind("anon_inode:[eventfd]"), "anon_inode:[eventfd]");
        assert_eq!(kind("/run/a:[1]"), "/run/a:[1]");
    }
}
