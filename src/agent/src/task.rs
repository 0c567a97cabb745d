// SPDX-License-Identifier: Apache-2.0
//! Work that waits, away from the one thread of the event loop.

use tokio::task::spawn_blocking;

use crate::error::{AgentError, Result};

/// Runs work that may wait for the kernel or a device on a thread of its own.
///
/// # Errors
///
/// Those of the work. It goes on to its end even when nobody waits for that any more.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(AgentError::internal(format!("task: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn the_event_loop_goes_on_meanwhile() {
        let (sender, receiver) = channel();
        let work = blocking(move || {
            receiver
                .recv_timeout(Duration::from_secs(10))
                .map_err(|error| AgentError::internal(error.to_string()))
        });
        let (received, sent) = tokio::join!(work, async { sender.send(7) });
        sent.unwrap();
        assert_eq!(received.unwrap(), 7);
    }
}
