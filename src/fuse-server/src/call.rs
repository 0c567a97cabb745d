// SPDX-License-Identifier: Apache-2.0
//! One request being served.

use std::fmt;

use rustix::io::Errno;

use crate::arguments::{Arguments, supplementary_groups};
use crate::buffer::{ReplyBuffer, RequestBuffer};
use crate::credentials::{Caller, Credentials};
use crate::protocol::{InHeader, OutHeader, Wire};
use crate::session::Session;

/// A request with everything that its operation needs.
pub(crate) struct Call<'a> {
    pub(crate) header: InHeader,
    pub(crate) arguments: Arguments<'a>,
    pub(crate) extensions: &'a [u8],
    pub(crate) session: Session,
    pub(crate) credentials: &'a Credentials,
    pub(crate) request: &'a dyn RequestBuffer,
    pub(crate) reply: &'a mut dyn ReplyBuffer,
    pub(crate) scratch: &'a mut Vec<u8>,
    pub(crate) host: &'a mut Vec<u8>,
}

/// The length of a reply's body; the body itself is in the reply buffer.
pub(crate) type Answer = Result<usize, Errno>;

impl Call<'_> {
    /// Answers with a structure.
    pub(crate) fn answer(&mut self, body: &impl Wire) -> Answer {
        self.scratch.clear();
        body.put(self.scratch);
        self.answer_scratch()
    }

    /// Answers with what is in `scratch`.
    pub(crate) fn answer_scratch(&mut self) -> Answer {
        self.reply.copy_from(OutHeader::SIZE, self.scratch)?;
        Ok(self.scratch.len())
    }

    /// Room for a body, in bytes.
    pub(crate) fn room(&self) -> usize {
        self.reply.length().saturating_sub(OutHeader::SIZE)
    }

    /// Whom the inode that is about to be created belongs to.
    ///
    /// # Errors
    /// `INVAL` for malformed extensions.
    pub(crate) fn caller(&self, umask: u32) -> Result<Caller, Errno> {
        Ok(Caller {
            uid: self.header.uid,
            gid: self.header.gid,
            groups: supplementary_groups(self.extensions)?,
            umask,
        })
    }
}

impl fmt::Debug for Call<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Call")
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}
