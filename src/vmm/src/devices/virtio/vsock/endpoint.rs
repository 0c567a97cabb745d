// SPDX-License-Identifier: Apache-2.0
//! The host's end of a stream: a socket, or what a host program has passed instead, which may be a
//! pipe, and so go one way only; and the socket that it came by.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use vm_memory::VolatileSlice;

use super::packet::Closed;
use crate::sys::vectored;

/// A descriptor whose reads and writes never wait.
#[derive(Debug)]
pub(super) struct Endpoint {
    file: OwnedFd,
    is_socket: bool,
}

impl Endpoint {
    pub(super) fn socket(socket: OwnedFd) -> Self {
        Self {
            file: socket,
            is_socket: true,
        }
    }

    /// What a host program has passed.
    pub(super) fn passed(file: OwnedFd) -> io::Result<Self> {
        let is_socket = FileType::from_raw_mode(fstat(&file)?.st_mode) == FileType::Socket;
        if !is_socket {
            fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        }
        Ok(Self { file, is_socket })
    }

    /// What the host can't do by this end from the start: a pipe's end takes or gives.
    pub(super) fn closed(&self) -> io::Result<Closed> {
        let mode = fcntl_getfl(&self.file)? & OFlags::RWMODE;
        Ok(Closed {
            receive: mode == OFlags::RDONLY,
            send: mode == OFlags::WRONLY,
        })
    }

    /// Hands on what lies in guest memory; how many bytes.
    pub(super) fn send(&self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        if self.is_socket {
            vectored::send(&self.file, slices)
        } else {
            vectored::write(&self.file, slices)
        }
    }

    /// Hands on bytes of ours; how many.
    pub(super) fn send_bytes(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        if self.is_socket {
            send(&self.file, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
        } else {
            rustix::io::write(&self.file, bytes)
        }
    }

    /// Takes what is there right into guest memory; how many bytes, none at the end.
    pub(super) fn receive(&self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        if self.is_socket {
            vectored::receive(&self.file, slices)
        } else {
            vectored::read(&self.file, slices)
        }
    }

    /// Ends one direction. A pipe has no other, and ends as this is dropped.
    pub(super) fn shutdown(&self, half: Shutdown) {
        // It fails only if the host has closed its end, which the stream will show by itself.
        let _ = shutdown(&self.file, half);
    }

    /// Whether the end that was just seen is that of both directions: the guest then hears of both
    /// at once.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut file = [PollFd::new(&self.file, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut file, Some(&now)).is_ok()
            && file
                .iter()
                .any(|file| file.revents().contains(PollFlags::HUP))
    }
}

impl AsRawFd for Endpoint {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The socket by which a host program passed a stream's other end. Its answer goes there, and its
/// end is the stream's.
#[derive(Debug)]
pub(super) struct Control {
    /// None once it has its answer, unless it is to stay.
    pub(super) socket: Option<OwnedFd>,
    /// Whether it stays, to be told of the stream's end.
    pub(super) keep: bool,
    /// What its events are known by.
    pub(super) token: u64,
}

impl Control {
    /// Says that the stream has come about; how many bytes of that were taken.
    pub(super) fn answer(&mut self, answer: &[u8]) -> rustix::io::Result<usize> {
        let socket = self.socket.take().ok_or(Errno::NOTCONN)?;
        let sent = send(&socket, answer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        self.socket = Some(socket).filter(|_| self.keep);
        Ok(sent)
    }
}
