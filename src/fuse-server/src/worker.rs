// SPDX-License-Identifier: Apache-2.0
//! A thread that serves requests.

use std::fmt;
use std::marker::PhantomData;

use rustix::io::Result;
use rustix::process::fchdir;

use crate::credentials::Credentials;
use crate::proc::ProcSelfFd;

/// The longest part of a request that is copied: a header, the largest extended attribute and two
/// names. File data is not copied.
pub(crate) const MAX_ARGUMENTS: usize = 64 * 1024 + 4096;

/// What a thread needs to serve requests: its identity towards the host and its scratch memory.
///
/// A worker belongs to the thread that made it, which it has changed for good: the thread's
/// working directory is `/proc/self/fd` and its umask its own.
pub struct Worker {
    pub(crate) credentials: Credentials,
    /// The request being served, copied out once.
    pub(crate) arguments: Vec<u8>,
    /// Replies under construction.
    pub(crate) scratch: Vec<u8>,
    /// Directory entries and attribute values from the host.
    pub(crate) host: Vec<u8>,
    not_send: PhantomData<*const ()>,
}

impl Worker {
    /// Makes the calling thread a worker.
    ///
    /// # Errors
    /// The thread can't have a working directory and umask of its own.
    pub fn enter(proc: &ProcSelfFd) -> Result<Self> {
        let credentials = Credentials::enter()?;
        // Calls for extended attributes take paths only: relative ones reach any descriptor.
        fchdir(proc)?;
        Ok(Self {
            credentials,
            arguments: Vec::new(),
            scratch: Vec::new(),
            host: Vec::new(),
            not_send: PhantomData,
        })
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Worker")
            .field("credentials", &self.credentials)
            .finish_non_exhaustive()
    }
}
