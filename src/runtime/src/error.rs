// SPDX-License-Identifier: Apache-2.0
//! The runtime's error: a kind that containerd understands, what was being done, and why it failed.

use std::error::Error as StdError;

use thiserror::Error;
use ttrpc::{Code, get_status};

/// What a caller may decide by; each kind has one status code of containerd's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    NotFound,
    AlreadyExists,
    InvalidArgument,
    FailedPrecondition,
    Unimplemented,
    Unavailable,
    DeadlineExceeded,
    Internal,
}

/// A failed request.
#[derive(Debug, Error)]
#[error("{context}")]
pub(crate) struct ShimError {
    kind: Kind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

pub(crate) type Result<T, E = ShimError> = std::result::Result<T, E>;

impl ShimError {
    pub(crate) fn new(kind: Kind, context: impl Into<String>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole chain in one line: the form that reaches the user.
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// Puts a kind and a context before an error of a library.
pub(crate) trait Context<T> {
    fn context(self, kind: Kind, context: impl FnOnce() -> String) -> Result<T>;

    /// `context` for what is nobody's fault but the host's.
    fn internal(self, context: impl FnOnce() -> String) -> Result<T>
    where
        Self: Sized,
    {
        self.context(Kind::Internal, context)
    }
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context(self, kind: Kind, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| ShimError {
            kind,
            context: context(),
            source: Some(source.into()),
        })
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        let code = match error.kind {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::Unavailable => Code::UNAVAILABLE,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Internal => Code::INTERNAL,
        };
        Self::RpcStatus(get_status(code, error.chain()))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn the_chain_is_one_line_and_keeps_the_code() {
        let error = Err::<(), _>(io::Error::other("no such device"))
            .context(Kind::Unavailable, || "open /dev/kvm".to_owned())
            .unwrap_err();
        assert_eq!(error.chain(), "open /dev/kvm: no such device");
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
            panic!("not a status");
        };
        assert_eq!(status.code(), Code::UNAVAILABLE);
        assert_eq!(status.message(), "open /dev/kvm: no such device");
    }
}
