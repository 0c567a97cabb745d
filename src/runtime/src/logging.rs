// SPDX-License-Identifier: Apache-2.0
//! Logs go to standard error: containerd's pipe `log` of the bundle in the serving shim, and so
//! into containerd's own log.

use std::io;

use tracing_subscriber::EnvFilter;

/// Starts logging. Where containerd no longer reads, lines are lost rather than waited for.
pub(crate) fn start(debug: bool) {
    let level = if debug { "debug" } else { "info" };
    let _ = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("{level},ttrpc=off")))
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .log_internal_errors(false)
        .try_init();
}
