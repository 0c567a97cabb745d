// SPDX-License-Identifier: Apache-2.0
//! virtio-fs (virtio 1.2, section 5.11): a directory of the host as a file system of the guest.
//!
//! The device carries FUSE requests: each descriptor chain holds one request in its readable part
//! and room for the reply in its writable part. The `fuse-server` crate says what they mean; this
//! folder takes them off the queues and lets file data go between the host's files and guest
//! memory in one system call.
//!
//! # Threads
//! A file operation may block for as long as the host's disk likes, so several threads serve the
//! request queue, each taking one chain at a time: a slow read holds up one of them and no other
//! request. The driver kicks only while a thread sleeps; while all are busy whoever finishes first
//! takes what has come meanwhile. As long as all of them wait for the host and none gets on, as at a
//! network file system that hangs, threads are added, up to a bound: one volume must not take the
//! whole tree along. The high-priority queue, which carries what must not wait behind requests
//! (FORGET), has a thread of its own.
//!
//! | file | holds |
//! | --- | --- |
//! | `buffers.rs` | a chain as a FUSE request and its reply |
//! | `pool.rs` | threads that share a queue |
//! | `device.rs` | the face towards the transport |

mod buffers;
mod device;
mod pool;
#[cfg(test)]
mod tests;

pub use device::{Fs, FsConfig, FsError, open_file_quota};
