// SPDX-License-Identifier: Apache-2.0
//! What the suites run in a container where an image's own programs don't do: static, and on its own.

mod watch;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// What to do.
#[derive(Debug, Parser)]
enum Task {
    /// Prints what inotify says of a folder, a line an event, until it is killed.
    Watch {
        /// The folder.
        folder: PathBuf,
    },
}

fn main() -> Result<()> {
    match Task::parse() {
        Task::Watch { folder } => watch::run(&folder),
    }
}
