// SPDX-License-Identifier: Apache-2.0
//! Can this machine's KVM run ordinary guests?
//!
//! The presence of `/dev/kvm` says little: a software KVM answers every call and then emulates a guest an
//! instruction at a time, thousands of times too slow for a Linux to boot. So guest code is run and timed.

mod guest;

use std::fmt;
use std::time::{Duration, Instant};

/// Rounds of the guest's loop of two instructions.
const ROUNDS: u32 = 200_000;
/// A CPU needs 0.1 ms for the loop, an emulated one with hardware-like virtualization 1 to 40 ms, an
/// instruction-wise emulator more than 200 ms.
const LIMIT: Duration = Duration::from_millis(100);
/// The best of a few runs counts: the machine may be busy.
const TRIES: usize = 3;

/// What KVM can do here.
#[derive(Debug)]
pub(crate) enum Kvm {
    /// Ordinary guests run; the time that the loop took.
    Ordinary(Duration),
    /// Guests are emulated; the time that the loop took.
    Emulated(Duration),
    /// There is none, and why.
    Missing(String),
}

impl Kvm {
    /// Whether pods can run directly on this machine.
    pub(crate) fn is_ordinary(&self) -> bool {
        matches!(self, Self::Ordinary(_))
    }
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let instructions = ROUNDS.saturating_mul(2);
        match self {
            Self::Ordinary(time) => {
                write!(
                    f,
                    "KVM runs ordinary guests ({instructions} instructions in {:.1} ms)",
                    milliseconds(*time)
                )
            }
            Self::Emulated(time) => write!(
                f,
                "KVM is too slow for ordinary guests ({instructions} instructions took {:.0} ms)",
                milliseconds(*time)
            ),
            Self::Missing(reason) => write!(f, "KVM can't be used ({reason})"),
        }
    }
}

/// Runs the loop in a VM.
pub(crate) fn kvm() -> Kvm {
    let mut best = Duration::MAX;
    for _ in 0..TRIES {
        let begin = Instant::now();
        match guest::run_loop(ROUNDS) {
            Ok(time) => best = best.min(time),
            Err(error) => return Kvm::Missing(format!("{error:#}")),
        }
        if best <= LIMIT || begin.elapsed() > LIMIT.saturating_mul(10) {
            break;
        }
    }
    if best <= LIMIT {
        Kvm::Ordinary(best)
    } else {
        Kvm::Emulated(best)
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
