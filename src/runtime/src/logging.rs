// SPDX-License-Identifier: Apache-2.0
//! Logs go to standard error: containerd's pipe `log` of the bundle in the serving shim, and so
//! into containerd's own log.

use std::io;
use std::sync::OnceLock;

use tracing::Level;
use tracing_subscriber::EnvFilter;

/// Target of what a guest's agent logs. It has a level of its own, which it keeps to by itself.
pub(crate) const GUEST: &str = "guest";

/// Changes the level of the log that was started.
static RELOAD: OnceLock<Box<dyn Fn(Level) + Send + Sync>> = OnceLock::new();

/// Starts logging. Where containerd no longer reads, lines are lost rather than waited for.
pub(crate) fn start(level: Level) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .log_internal_errors(false)
        .with_filter_reloading();
    let handle = builder.reload_handle();
    if builder.try_init().is_ok() {
        let _ = RELOAD.set(Box::new(move |configured| {
            // containerd's own flag for details stays in force.
            let debug = Some(Level::DEBUG).filter(|debug| level >= *debug);
            let _ = handle.reload(filter(debug.map_or(configured, |it| it.max(configured))));
        }));
    }
}

/// Logs from this level on: the configuration is known only when the first request comes.
pub(crate) fn set_level(level: Level) {
    if let Some(reload) = RELOAD.get() {
        reload(level);
    }
}

fn filter(level: Level) -> EnvFilter {
    EnvFilter::new(format!("{level},ttrpc=off,{GUEST}=trace"))
}
