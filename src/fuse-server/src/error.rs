// SPDX-License-Identifier: Apache-2.0
//! Why a directory can't be served. What goes wrong in a request is the guest's to hear.

use std::path::PathBuf;

use rustix::io::Errno;
use thiserror::Error;

/// Why a server could not be made.
#[derive(Debug, Error)]
pub enum ServerError {
    /// What was to be shared is not a directory.
    #[error("the shared file is not a directory")]
    NotADirectory,
    /// `/proc/self/fd` shows another process: it was opened before a fork.
    #[error("the descriptor directory belongs to another process")]
    ForeignProc,
    /// The host refused a call on the shared directory.
    #[error("can't use the shared directory")]
    Root(#[source] Errno),
    /// A folder of `Options::cache_below` is not there.
    #[error("can't use the folder {path:?} of the shared directory")]
    Folder {
        /// As the options name it.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
}
