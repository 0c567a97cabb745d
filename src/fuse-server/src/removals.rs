// SPDX-License-Identifier: Apache-2.0
//! Room on the host that removed files still take.
//!
//! A guest lets go of a file that it has removed by FORGET, which it sends on its own (fuse(4)) and
//! another thread serves: only then is the file's room free. A program that removes a file to make room
//! and writes on must not meet a full file system for that.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::call::Answer;

/// How long after a removal its room may still come.
const RECENT: Duration = Duration::from_secs(1);

/// How long one request waits for it at most, and how long between two tries.
const PATIENCE: Duration = Duration::from_millis(100);
const STEP: Duration = Duration::from_millis(5);

/// When a name was removed last.
#[derive(Debug, Default)]
pub(crate) struct Removals(Mutex<Option<Instant>>);

impl Removals {
    /// A name was removed, or replaced.
    pub(crate) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Does `operation`, and again for as long as only removed files may be in its way.
    pub(crate) fn with_room(&self, mut operation: impl FnMut() -> Answer) -> Answer {
        let mut outcome = operation();
        let begin = Instant::now();
        while matches!(outcome, Err(Errno::NOSPC | Errno::DQUOT))
            && self.are_recent()
            && begin.elapsed() < PATIENCE
        {
            thread::sleep(STEP);
            outcome = operation();
        }
        outcome
    }

    fn are_recent(&self) -> bool {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| last.elapsed() < RECENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outcome, and the number of tries, of what fails with `errno` until its third try.
    fn tries(removals: &Removals, errno: Errno) -> (Answer, usize) {
        let mut outcomes = [Err(errno), Err(errno), Ok(7)].into_iter();
        let outcome = removals.with_room(|| outcomes.next().unwrap());
        (outcome, 3_usize.saturating_sub(outcomes.len()))
    }

    #[test]
    fn room_is_waited_for_after_a_removal_only() {
        let removals = Removals::default();
        assert_eq!(tries(&removals, Errno::NOSPC), (Err(Errno::NOSPC), 1));
        removals.note();
        assert_eq!(tries(&removals, Errno::NOSPC), (Ok(7), 3));
        assert_eq!(tries(&removals, Errno::DQUOT), (Ok(7), 3));
        assert_eq!(tries(&removals, Errno::IO), (Err(Errno::IO), 1));
    }

    #[test]
    fn room_is_not_waited_for_for_ever() {
        let removals = Removals::default();
        removals.note();
        let begin = Instant::now();
        let outcome = removals.with_room(|| Err(Errno::NOSPC));
        assert_eq!(outcome, Err(Errno::NOSPC));
        assert!(begin.elapsed() >= PATIENCE);
    }
}
