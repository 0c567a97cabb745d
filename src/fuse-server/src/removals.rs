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

/// How long after a removal its room may still come.
const RECENT: Duration = Duration::from_secs(1);

/// How long one request waits for it at most, and how long between two tries.
const PATIENCE: Duration = Duration::from_millis(100);
const STEP: Duration = Duration::from_millis(5);

/// Names that were removed.
#[derive(Debug, Default)]
pub(crate) struct Removals {
    /// When there was one last.
    last: Mutex<Option<Instant>>,
    /// Held by the request that waits.
    waiting: Mutex<()>,
}

impl Removals {
    /// A name was removed, or replaced.
    pub(crate) fn note(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Does `operation`, and again for as long as only removed files may be in its way. It must be one
    /// that has no effect when it fails, and `repeats` agrees: an error that the host tells once, as
    /// for what was written before, must reach the guest.
    pub(crate) fn with_room<T>(
        &self,
        repeats: impl FnOnce() -> bool,
        mut operation: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let outcome = operation();
        if !lacks_room(&outcome) || !self.are_recent() || !repeats() {
            return outcome;
        }
        // One at a time: all others' requests are served by few threads.
        match self.waiting.try_lock() {
            Ok(_turn) => again(PATIENCE, outcome, operation),
            Err(_) => outcome,
        }
    }

    fn are_recent(&self) -> bool {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| last.elapsed() < RECENT)
    }
}

fn lacks_room<T>(outcome: &Result<T, Errno>) -> bool {
    matches!(outcome, Err(Errno::NOSPC | Errno::DQUOT))
}

/// Repeats what had this outcome until there is room, or patience is over.
fn again<T>(
    patience: Duration,
    mut outcome: Result<T, Errno>,
    mut operation: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    let begin = Instant::now();
    while lacks_room(&outcome) && begin.elapsed() < patience {
        thread::sleep(STEP);
        outcome = operation();
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Result<u8, Errno> = Err(Errno::NOSPC);

    /// Whether there was another try.
    fn tried_again(removals: &Removals, first: Result<u8, Errno>, repeats: bool) -> bool {
        let mut outcomes = [first, Ok(7)].into_iter();
        let outcome = removals.with_room(|| repeats, || outcomes.next().unwrap());
        assert_eq!(outcome, if outcomes.len() == 0 { Ok(7) } else { first });
        outcomes.len() == 0
    }

    #[test]
    fn room_is_waited_for_after_a_removal_only() {
        let removals = Removals::default();
        assert!(!tried_again(&removals, FULL, true));
        removals.note();
        assert!(tried_again(&removals, FULL, true));
        assert!(tried_again(&removals, Err(Errno::DQUOT), true));
        assert!(!tried_again(&removals, Err(Errno::IO), true));
        assert!(!tried_again(&removals, FULL, false));
        let _turn = removals.waiting.lock().unwrap();
        assert!(!tried_again(&removals, FULL, true));
    }

    #[test]
    fn room_is_not_waited_for_for_ever() {
        let mut outcomes = [FULL, FULL, Ok(7)].into_iter();
        let patience = Duration::from_secs(100);
        let outcome = again(patience, FULL, || outcomes.next().unwrap());
        assert_eq!(outcome, Ok(7));
        let begin = Instant::now();
        assert_eq!(again(PATIENCE, FULL, || FULL), FULL);
        assert!(begin.elapsed() >= PATIENCE);
    }
}
