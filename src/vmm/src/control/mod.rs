// SPDX-License-Identifier: Apache-2.0
//! The control protocol between the VMM process and whoever started it.
//!
//! Plain serializable data over a `SOCK_SEQPACKET` Unix socket, one message a packet, files as
//! `SCM_RIGHTS` beside it. Messages name files by their index among the packet's descriptors and
//! never hold a path: the VMM lives in an empty root.

mod channel;
mod message;

pub use channel::{Channel, ChannelError};
pub use message::{
    Block, Boot, Console, Event, ExitReason, FileIndex, Filesystem, FsCache, MAX_BLOCK_QUEUES,
    MAX_QUEUE_PAIRS, MEMORY_STEP, Milestone, Net, PROTOCOL_VERSION, RateLimits, Request, Size,
    VmConfig, Vsock,
};
