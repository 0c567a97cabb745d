// SPDX-License-Identifier: Apache-2.0
//! Tells that something came, went or changed: the kernel's word that it is time to look again.
//! What it says of it is not read.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use crate::error::{Context as _, Result};
use crate::sys;

/// The kernel fills at most this much at once.
const BUFFER: usize = 64 << 10;

/// Events since the socket was opened.
#[derive(Debug)]
pub(crate) struct KernelEvents {
    socket: AsyncFd<OwnedFd>,
    /// What they are about, for errors.
    what: &'static str,
}

impl KernelEvents {
    /// Of network interfaces.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn of_links() -> Result<Self> {
        /// `RTMGRP_LINK`.
        const LINKS: u32 = 1;
        // `NETLINK_ROUTE` is 0, which `socket(2)` takes for no protocol in particular.
        Self::listen(None, LINKS, "interfaces")
    }

    /// Of devices.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn of_devices() -> Result<Self> {
        /// The group that the kernel itself sends to.
        const KERNEL: u32 = 1;
        Self::listen(Some(KOBJECT_UEVENT), KERNEL, "devices")
    }

    fn listen(protocol: Option<Protocol>, groups: u32, what: &'static str) -> Result<Self> {
        let open = || -> io::Result<AsyncFd<OwnedFd>> {
            let socket = socket_with(
                AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                protocol,
            )?;
            bind(&socket, &SocketAddrNetlink::new(0, groups))?;
            sys::watch::watch(socket, Interest::READABLE)
        };
        let socket = open().context(|| format!("listen to {what}"))?;
        Ok(Self { socket, what })
    }

    /// Has `find` look now and after each event, until it finds something; none once `patience` is
    /// over.
    ///
    /// # Errors
    ///
    /// The kernel's, or those of `find`.
    pub(crate) async fn until<T>(
        &self,
        patience: Duration,
        mut find: impl FnMut() -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now()
            .checked_add(patience)
            .unwrap_or_else(Instant::now);
        loop {
            if let Some(found) = find()? {
                return Ok(Some(found));
            }
            match timeout_at(deadline, self.next()).await {
                Ok(event) => event.context(|| format!("listen to {}", self.what))?,
                Err(_) => return Ok(None),
            }
        }
    }

    /// Waits for events, and takes all that are there.
    async fn next(&self) -> io::Result<()> {
        let mut ready = self.socket.readable().await?;
        let mut buffer = vec![0; BUFFER];
        loop {
            match recv(self.socket.get_ref(), &mut *buffer, RecvFlags::empty()) {
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
