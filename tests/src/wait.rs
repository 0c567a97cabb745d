// SPDX-License-Identifier: Apache-2.0
//! Waiting on conditions, never on time alone.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const POLL: Duration = Duration::from_millis(20);

/// Asks `probe` until it has an answer; an error that names `what` once `limit` has passed.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if begin.elapsed() > limit {
            bail!("{what}: not within {limit:?}");
        }
        sleep(POLL);
    }
}
