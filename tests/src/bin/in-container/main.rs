// SPDX-License-Identifier: Apache-2.0
//! What the suites run in a container where an image's own programs don't do: static, and on its own.

mod database;
mod lock;
mod watch;

use std::env;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

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
    /// Locks a file in both ways that there are, says so, and keeps it until it is killed.
    Lock {
        /// The file.
        file: PathBuf,
    },
    /// Writes as a database does, into a new folder.
    Commit {
        /// The folder.
        folder: PathBuf,
        /// How often.
        commits: u64,
    },
    /// Finds what `commit` has written.
    Check {
        /// The folder.
        folder: PathBuf,
        /// How often.
        commits: u64,
    },
    /// Says of each way whether somebody else has locked a file.
    Locked {
        /// The file.
        file: PathBuf,
    },
}

fn main() -> Result<()> {
    // As `sleep`, whatever its name: busybox goes by that, and pjdfstest copies the `sleep` it finds.
    if let [_, only] = env::args().collect::<Vec<_>>().as_slice()
        && let Ok(seconds) = only.parse()
    {
        sleep(Duration::from_secs(seconds));
        return Ok(());
    }
    match Task::parse() {
        Task::Watch { folder } => watch::run(&folder),
        Task::Commit { folder, commits } => database::commit(&folder, commits),
        Task::Check { folder, commits } => database::check(&folder, commits),
        Task::Lock { file } => lock::keep(&file),
        Task::Locked { file } => lock::ask(&file),
    }
}
