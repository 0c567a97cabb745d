// SPDX-License-Identifier: Apache-2.0
//! virtio-vsock (virtio 1.2, section 5.10), hybrid: sockets for the guest, Unix streams for the
//! host.
//!
//! # The protocol in brief
//! A stream is known by its two ports. It starts with REQUEST and RESPONSE, carries its bytes in
//! RW packets, loses one direction or both by SHUTDOWN, and ends with RST, which is also the
//! answer to whatever fits no stream. Each side says in every header how much it can hold
//! (`buf_alloc`) and how much it has passed on (`fwd_cnt`); the other never sends more than that.
//!
//! # The host's side
//! A host program connects to the listening Unix socket, writes `CONNECT port\n`, reads
//! `OK port\n`, and from then on has the guest's listener on that port at the other end. Or it writes
//! `passfd\n` and sends one message, the port with a descriptor (a pipe's end, say): then the stream is
//! between the guest and that, and the socket ends with `OK port\n`. With the word `keep` after the
//! port it stays: its end is the end of the stream, whichever comes first. A connection that the guest
//! makes reaches the host by [`ConnectionSink`].
//!
//! # How the bytes go
//! One worker thread owns everything. Bytes go from the Unix socket into the guest's buffers and
//! back in one system call each, with no copy between. Only what the host's program is too slow
//! to take is kept here, never more than the window that the guest was granted.
//!
//! | file | holds |
//! | --- | --- |
//! | `packet.rs` | headers, and the guest's buffers behind a descriptor chain |
//! | `credit.rs` | how much each side may send |
//! | `backlog.rs` | bytes that the host has not taken yet |
//! | `endpoint.rs` | the host's end of a stream: a socket or a pipe |
//! | `connection.rs`, `connection/turn.rs` | one stream's states, and what it has for the guest |
//! | `handshake.rs` | what a host program says first |
//! | `muxer.rs` | all streams: dispatch, turns, limits |
//! | `queues.rs` | what worker and muxer need of virtqueues |
//! | `handler.rs`, `device.rs` | what the thread does, and the face towards the transport |

mod backlog;
mod connection;
mod credit;
mod device;
mod endpoint;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod handler;
mod handshake;
mod muxer;
mod packet;
mod queues;
#[cfg(any(test, fuzzing))]
mod test_driver;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;

pub use device::Vsock;

/// The host's context ID, as the guest addresses it (virtio 1.2, section 5.10.4).
const HOST_CID: u64 = 2;

/// Where connections that the guest makes to the host arrive.
pub trait ConnectionSink: Debug + Send + Sync {
    /// A guest process connected to host port `port`; `stream` is the host's end. To refuse it
    /// later, drop the stream. Called on the device's worker: it must not block.
    ///
    /// # Errors
    /// Nobody can take the connection; the guest sees it refused.
    fn connect(&self, port: u32, stream: OwnedFd) -> io::Result<()>;
}
