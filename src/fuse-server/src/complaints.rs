// SPDX-License-Identifier: Apache-2.0
//! How often the log hears of something that a guest can make happen again and again.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The least time between two lines.
const PAUSE: Duration = Duration::from_secs(60);

/// When there was a line last.
#[derive(Debug, Default)]
pub struct Complaints(Mutex<Option<Instant>>);

impl Complaints {
    /// Whether it is time for a line, which the caller then writes.
    pub fn are_due(&self) -> bool {
        self.are_due_at(Instant::now())
    }

    fn are_due_at(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= PAUSE);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_hears_of_it_once_a_minute() {
        let complaints = Complaints::default();
        let begin = Instant::now();
        let after = |seconds| complaints.are_due_at(begin + Duration::from_secs(seconds));
        assert!(after(0));
        assert!(!after(1));
        assert!(!after(59));
        assert!(after(60));
        assert!(!after(61));
    }
}
