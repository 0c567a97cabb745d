// SPDX-License-Identifier: Apache-2.0
//! A FUSE file server over a host directory.
//!
//! The guest's kernel sends one request for each thing that it wants of a file system; this crate
//! decodes it, does it in a directory of the host, and encodes the answer. It knows neither
//! virtqueues nor guest memory: requests and replies are byte runs behind two traits
//! ([`RequestBuffer`], [`ReplyBuffer`]), so that it runs as well behind `/dev/fuse`, in tests and
//! under a fuzzer.
//!
//! What it holds to:
//! - The guest is hostile. Every number, name and length is checked; nothing that it sends panics
//!   or grows without bound; a file outside the directory is out of reach because every look-up is
//!   one plain name below an open descriptor.
//! - The host's file system decides what operations mean. The guest's kernel decides who may do
//!   them; ownership of what is created follows the guest's caller.
//! - No special file is ever opened here; the guest's kernel does so on its own side.
//! - Mounts below the directory are followed, also those made later. They stay busy while the guest
//!   knows inodes on them: unmount with `MNT_DETACH`.
//!
//! Locks (`flock`, `fcntl`) are the guest's own affair: not offered, so its kernel keeps them.

mod arguments;
mod buffer;
mod call;
mod complaints;
mod credentials;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod handle;
mod inode;
mod listing;
mod name;
mod operations;
mod options;
mod proc;
pub mod protocol;
mod quota;
mod removals;
mod server;
mod session;
mod syscall;
#[cfg(any(test, fuzzing))]
mod test_client;
#[cfg(test)]
mod tests;
mod worker;

pub use buffer::{ReplyBuffer, RequestBuffer};
pub use complaints::Complaints;
pub use error::ServerError;
pub use options::{Cache, Options};
pub use proc::ProcSelfFd;
pub use server::Server;
pub use worker::Worker;
