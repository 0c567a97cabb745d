// SPDX-License-Identifier: Apache-2.0
//! The loopback interface of a pod's namespace on the host.
//!
//! The pod's servers are in the guest, so nobody listens there. But containerd's port-forward
//! enters the namespace and connects to `localhost`, on any port. One socket takes all of these
//! connections, by a program that the kernel asks for the listener of each. Nothing of it can stay
//! behind: it ends with the files that hold it, which are the shim's.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::sockopt::set_ip_freebind;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};

use super::namespace::Namespace;
use crate::raw::bpf;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Listens on every port of the loopback interface, by IPv4, which clients try first.
#[derive(Debug)]
pub(crate) struct Loopback {
    pub(crate) listener: TcpListener,
    /// As long as it is open, connections are led here.
    pub(crate) lookup: OwnedFd,
}

impl Loopback {
    pub(super) fn listen(namespace: &Namespace) -> io::Result<Self> {
        let socket = namespace.run(|| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
            // The interface may still be down, and its address missing.
            set_ip_freebind(&socket, true)?;
            bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
            listen(&socket, BACKLOG)?;
            io::Result::Ok(socket)
        })??;
        Ok(Self {
            lookup: bpf::take_loopback_connections(namespace.as_fd(), socket.as_fd())?,
            listener: socket.into(),
        })
    }
}
