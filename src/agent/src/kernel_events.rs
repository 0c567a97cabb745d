// SPDX-License-Identifier: Apache-2.0
//! Tells that something came, went or changed: the kernel's word that it is time to look again.
//! What it says of it is not read.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// The kernel fills at most this much at once.
const BUFFER: usize = 64 << 10;

/// Events since the socket was opened.
#[derive(Debug)]
pub(crate) struct KernelEvents(AsyncFd<OwnedFd>);

impl KernelEvents {
    /// Of network interfaces.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn of_links() -> io::Result<Self> {
        /// `RTMGRP_LINK`.
        const LINKS: u32 = 1;
        // `NETLINK_ROUTE` is 0, which `socket(2)` takes for no protocol in particular.
        Self::listen(None, LINKS)
    }

    /// Of devices.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn of_devices() -> io::Result<Self> {
        /// The group that the kernel itself sends to.
        const KERNEL: u32 = 1;
        Self::listen(Some(KOBJECT_UEVENT), KERNEL)
    }

    fn listen(protocol: Option<Protocol>, groups: u32) -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            protocol,
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self(sys::watch::watch(socket, Interest::READABLE)?))
    }

    /// Waits for events, and takes all that are there.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) async fn next(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        let mut buffer = vec![0; BUFFER];
        loop {
            match recv(self.0.get_ref(), &mut *buffer, RecvFlags::empty()) {
                // More events than fit are events as well.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
