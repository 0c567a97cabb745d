// SPDX-License-Identifier: Apache-2.0
//! The end of the guest.

use rustix::system::{RebootCommand, reboot};
use tracing::error;

/// Writes everything back and switches the machine off.
pub(crate) fn off() {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        error!(%error, "power off");
    }
}
