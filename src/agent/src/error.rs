// SPDX-License-Identifier: Apache-2.0
//! The agent's one error: a kind that decides the ttrpc status, local context, and a cause.

use std::fmt::Display;
use std::io;

use serde::{Deserialize, Serialize};
use ttrpc::Code;

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) enum Kind {
    /// The request contradicts itself or names something impossible.
    InvalidArgument,
    /// The container or process that the request names does not exist.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The object exists but is in the wrong state.
    FailedPrecondition,
    /// A part of the protocol or of the OCI spec that this agent does not honour.
    Unsupported,
    /// The object lacks the feature, such as a terminal.
    Unavailable,
    /// Everything else: a system call failed.
    Internal,
}

/// A failed operation.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub(crate) struct AgentError {
    kind: Kind,
    context: String,
    #[source]
    source: Option<io::Error>,
}

/// Results of the agent's own functions.
pub(crate) type Result<T> = std::result::Result<T, AgentError>;

/// An error on its way between two processes of the agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Failure {
    kind: Kind,
    text: String,
}

impl AgentError {
    pub(crate) fn new(kind: Kind, context: impl Into<String>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    pub(crate) fn invalid(context: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, context)
    }

    pub(crate) fn not_found(context: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, context)
    }

    pub(crate) fn precondition(context: impl Into<String>) -> Self {
        Self::new(Kind::FailedPrecondition, context)
    }

    pub(crate) fn unsupported(context: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, context)
    }

    pub(crate) fn internal(context: impl Into<String>) -> Self {
        Self::new(Kind::Internal, context)
    }

    pub(crate) fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            kind: Kind::Internal,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// The same error, seen as one of `kind`.
    pub(crate) fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Context and cause in one line, in the form that container users know:
    /// `mount "proc" on "/proc": operation not permitted`.
    pub(crate) fn line(&self) -> String {
        match &self.source {
            Some(source) => format!("{}: {}", self.context, reason(source)),
            None => self.context.clone(),
        }
    }
}

/// Adds what was being done to a failed system call.
pub(crate) trait Context<T> {
    /// `what` is only evaluated on failure.
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| AgentError::io(what().to_string(), error))
    }
}

/// The operating system's text without its "(os error N)", starting in lower case.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let text = match (error.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(end)) => text.get(..end).unwrap_or(&text).to_owned(),
        _ => text,
    };
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => text,
    }
}

impl From<&AgentError> for Failure {
    fn from(error: &AgentError) -> Self {
        Self {
            kind: error.kind,
            text: error.line(),
        }
    }
}

impl From<Failure> for AgentError {
    fn from(failure: Failure) -> Self {
        Self::new(failure.kind, failure.text)
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        let code = match error.kind {
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::Unsupported => Code::UNIMPLEMENTED,
            Kind::Unavailable => Code::UNAVAILABLE,
            Kind::Internal => Code::INTERNAL,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.line()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_names_the_object_and_the_reason() {
        let error = AgentError::io("open \"/x\"", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.line(), "open \"/x\": no such file or directory");
    }

    #[test]
    fn kinds_become_the_codes_of_the_protocol() {
        let status = |error: AgentError| match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => status.code.value(),
            other => panic!("{other:?}"),
        };
        assert_eq!(status(AgentError::not_found("x")), 5);
        assert_eq!(status(AgentError::unsupported("x")), 12);
        assert_eq!(status(AgentError::internal("x")), 13);
        assert_eq!(status(AgentError::new(Kind::Unavailable, "x")), 14);
    }
}
