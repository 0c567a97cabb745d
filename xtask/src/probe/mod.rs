// SPDX-License-Identifier: Apache-2.0
//! Can this machine's KVM run ordinary guests?
//!
//! The presence of `/dev/kvm` says little: a software KVM answers every call and then emulates a guest an
//! instruction at a time, thousands of times too slow for a Linux to boot. So guest code is run and timed.

mod guest;

use std::fmt;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Rounds of the guest's loop of two instructions.
const ROUNDS: u32 = 200_000;
/// How many times longer than here the loop may take in a guest. Hardware adds a fault or two to the 0.1 ms
/// of the loop; a CPU that is emulated together with its virtualization does both in 1 to 40 ms; an emulator
/// that takes each instruction of a guest apart needs a thousand times the time. A limit in milliseconds
/// would tell a slow CPU from a quick one, too.
const LIMIT: u32 = 200;
/// The best of a few runs counts: the machine may be busy.
const TRIES: usize = 3;

/// What KVM can do here.
#[derive(Debug)]
pub(crate) enum Kvm {
    /// Ordinary guests run.
    Ordinary(Times),
    /// Guests are emulated.
    Emulated(Times),
    /// There is none, and why.
    Missing(String),
}

/// What the loop took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    guest: Duration,
    here: Duration,
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        write!(
            f,
            "{} instructions in {:.1} ms, {:.2} ms outside of a guest",
            ROUNDS.saturating_mul(2),
            milliseconds(self.guest),
            milliseconds(self.here)
        )
    }
}

impl Kvm {
    /// Whether pods can run directly on this machine.
    pub(crate) fn is_ordinary(&self) -> bool {
        matches!(self, Self::Ordinary(_))
    }
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ordinary(times) => write!(f, "KVM runs ordinary guests ({times})"),
            Self::Emulated(times) => write!(f, "KVM is too slow for ordinary guests ({times})"),
            Self::Missing(reason) => write!(f, "KVM can't be used ({reason})"),
        }
    }
}

/// Runs the loop in a VM, and here.
pub(crate) fn kvm() -> Kvm {
    let mut best = Times {
        guest: Duration::MAX,
        here: Duration::MAX,
    };
    for _ in 0..TRIES {
        match guest::run_loop(ROUNDS) {
            Ok(time) => best.guest = best.guest.min(time),
            Err(error) => return Kvm::Missing(format!("{error:#}")),
        }
        best.here = best.here.min(run_loop(ROUNDS));
    }
    judge(best)
}

fn judge(times: Times) -> Kvm {
    if times.guest <= times.here.saturating_mul(LIMIT) {
        Kvm::Ordinary(times)
    } else {
        Kvm::Emulated(times)
    }
}

/// The guest's loop, as a program of this machine.
fn run_loop(rounds: u32) -> Duration {
    let begin = Instant::now();
    for round in 0..rounds {
        black_box(round);
    }
    begin.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_judged_by_the_machine_that_runs_it() {
        let judged = |guest: u64, here: u64| {
            let (guest, here) = (Duration::from_micros(guest), Duration::from_micros(here));
            judge(Times { guest, here }).is_ordinary()
        };
        // Hardware, and the dev VM at its worst.
        assert!(judged(150, 100));
        assert!(judged(40_000, 600));
        // The same emulator on a slow and on a quick machine.
        assert!(!judged(220_000, 200));
        assert!(!judged(89_900, 80));
    }
}
