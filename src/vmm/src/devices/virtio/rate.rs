// SPDX-License-Identifier: Apache-2.0
//! Rate limits: how much a device may move in a second.
//!
//! What is done is paid for afterwards: each piece of work moves the moment at which the next may
//! begin by the time that it takes at the limit's rate. A device that was idle has saved up no more
//! than `BURST` of it.

use std::io;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::errno;
use vmm_sys_util::timerfd::TimerFd;

use super::DeviceFault;

/// What an idle device may do at once.
const BURST: Duration = Duration::from_millis(100);

/// The limits of one device, whose queues share them.
#[derive(Debug)]
pub(super) struct RateLimiter {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bytes: Option<Meter>,
    operations: Option<Meter>,
}

#[derive(Debug)]
struct Meter {
    per_second: NonZeroU64,
    /// When the next piece of work may begin.
    free: Instant,
}

/// A worker's view of a limit, with the timer that ends its waits.
#[derive(Debug)]
pub(super) struct Limit {
    limiter: Arc<RateLimiter>,
    timer: TimerFd,
}

impl Limit {
    /// Of `limiter`, if there is one; other workers may share it.
    pub(super) fn of(limiter: Option<&Arc<RateLimiter>>) -> io::Result<Option<Self>> {
        let Some(limiter) = limiter else {
            return Ok(None);
        };
        Ok(Some(Self {
            limiter: Arc::clone(limiter),
            timer: TimerFd::new()?,
        }))
    }

    pub(super) fn limiter(&self) -> &RateLimiter {
        &self.limiter
    }

    /// Readable when a wait is over.
    pub(super) fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// Takes note that the timer has told of its end.
    pub(super) fn awake(&mut self) -> Result<(), DeviceFault> {
        // Not `wait`: it blocks if what came along has set the timer again.
        self.timer.clear().map_err(fault)
    }

    /// Has the timer tell when the next operation may begin.
    pub(super) fn sleep(&mut self) -> Result<(), DeviceFault> {
        // The wait may be over by now.
        let wait = self.limiter.wait().unwrap_or(Duration::from_nanos(1));
        self.timer.reset(wait, None).map_err(fault)
    }
}

fn fault(error: errno::Error) -> DeviceFault {
    DeviceFault::Host {
        what: "can't wait for a device's limit",
        source: error.into(),
    }
}

impl RateLimiter {
    /// None where nothing is limited. 0 is no limit.
    pub(super) fn new(bytes_per_second: u64, operations_per_second: u64) -> Option<Self> {
        let now = Instant::now();
        let meter = |rate| {
            let per_second = NonZeroU64::new(rate)?;
            Some(Meter {
                per_second,
                free: now,
            })
        };
        let (bytes, operations) = (meter(bytes_per_second), meter(operations_per_second));
        (bytes.is_some() || operations.is_some()).then(|| Self {
            state: Mutex::new(State { bytes, operations }),
        })
    }

    /// How long the next operation has to wait; none if it may begin.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.wait_at(Instant::now())
    }

    /// Pays for an operation that has moved as many bytes.
    pub(super) fn pay(&self, bytes: u64) {
        self.pay_at(Instant::now(), bytes);
    }

    /// Pays for further bytes of the same operation.
    pub(super) fn pay_more(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(meter) = state.bytes.as_mut().filter(|_| bytes > 0) {
            meter.pay(Instant::now(), bytes);
        }
    }

    fn wait_at(&self, now: Instant) -> Option<Duration> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let meters = state.bytes.iter().chain(&state.operations);
        let waits = meters.map(|meter| meter.free.saturating_duration_since(now));
        waits.max().filter(|wait| !wait.is_zero())
    }

    fn pay_at(&self, now: Instant, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(meter) = &mut state.bytes {
            meter.pay(now, bytes);
        }
        if let Some(meter) = &mut state.operations {
            meter.pay(now, 1);
        }
    }
}

impl Meter {
    fn pay(&mut self, now: Instant, amount: u64) {
        let begin = now.checked_sub(BURST).unwrap_or(now).max(self.free);
        let nanoseconds = u128::from(amount)
            .saturating_mul(1_000_000_000)
            .checked_div(self.per_second.get().into())
            .unwrap_or_default();
        let cost = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        // Past the end of time there is nothing to wait for.
        self.free = begin.checked_add(cost).unwrap_or(begin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How many operations of so many bytes begin within ten seconds from `begin` on.
    fn done(limiter: &RateLimiter, begin: Instant, bytes: u64) -> u64 {
        let (mut now, mut count) = (begin, 0);
        while now < begin + 10 * SECOND {
            match limiter.wait_at(now) {
                Some(wait) => now += wait,
                None => {
                    limiter.pay_at(now, bytes);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn a_device_does_as_much_as_it_may() {
        assert!(RateLimiter::new(0, 0).is_none());
        let now = Instant::now();
        let bytes = RateLimiter::new(1 << 20, 0).unwrap();
        let count = done(&bytes, now, 4096);
        assert!((2560..2600).contains(&count), "{count}");
        let operations = RateLimiter::new(0, 100).unwrap();
        let count = done(&operations, now, 1 << 30);
        assert!((1000..1020).contains(&count), "{count}");
        // Of two limits the narrower holds.
        let both = RateLimiter::new(1 << 20, 100).unwrap();
        assert!((1000..1020).contains(&done(&both, now, 512)));
        let both = RateLimiter::new(1 << 20, 100).unwrap();
        assert!((160..170).contains(&done(&both, now, 1 << 16)));
    }

    #[test]
    fn little_is_saved_up_and_what_is_large_is_paid_later() {
        let limiter = RateLimiter::new(1000, 0).unwrap();
        let now = Instant::now() + 100 * SECOND;
        limiter.pay_at(now, 100);
        assert_eq!(limiter.wait_at(now), None);
        limiter.pay_at(now, 5000);
        assert_eq!(limiter.wait_at(now), Some(5 * SECOND));
        assert_eq!(limiter.wait_at(now + 5 * SECOND), None);
        limiter.pay_at(now, u64::MAX);
        assert!(limiter.wait_at(now).is_some());
    }
}
