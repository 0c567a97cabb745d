// SPDX-License-Identifier: Apache-2.0
//! A few words of rtnetlink, for either side of a cable: what `ip` would do, where there is none.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use rustix::net::netdevice::name_to_index;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const NEW_ADDRESS: u16 = 20;

/// A request that wants an answer; of something new.
const REQUEST_ACK: u16 = 1 | 4;
const CREATE: u16 = 0x400;

/// Attributes.
const LINK_MTU: u16 = 4;
const ADDRESS: u16 = 1;
const LOCAL_ADDRESS: u16 = 2;

const AF_INET: u8 = 2;
const UP: u32 = 1;

/// An interface of this network namespace.
#[derive(Debug)]
pub struct Interface {
    name: String,
    index: u32,
    socket: OwnedFd,
}

impl Interface {
    /// The interface of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is 0.
            None,
        )?;
        // Any socket will do to ask for a number.
        let any = socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let index = name_to_index(&any, name).with_context(|| format!("no interface {name}"))?;
        let name = name.to_owned();
        Ok(Self {
            name,
            index,
            socket,
        })
    }

    /// Switches it on, with this MTU unless it is to keep its own.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn up(&self, mtu: Option<u16>) -> Result<()> {
        let mut body = self.link(UP);
        if let Some(mtu) = mtu {
            attribute(&mut body, LINK_MTU, &u32::from(mtu).to_ne_bytes());
        }
        self.request(NEW_LINK, 0, &body)
            .with_context(|| format!("switching {} on", self.name))
    }

    /// Gives it an address in a network of this prefix length.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add_address(&self, address: Ipv4Addr, prefix: u8) -> Result<()> {
        let mut body = vec![AF_INET, prefix, 0, 0];
        body.extend(self.index.to_ne_bytes());
        attribute(&mut body, LOCAL_ADDRESS, &address.octets());
        attribute(&mut body, ADDRESS, &address.octets());
        self.request(NEW_ADDRESS, CREATE, &body)
            .with_context(|| format!("giving {} the address {address}", self.name))
    }

    /// Removes it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn delete(&self) -> Result<()> {
        self.request(DELETE_LINK, 0, &self.link(0))
            .with_context(|| format!("removing {}", self.name))
    }

    /// `struct ifinfomsg`: the interface, with these flags set.
    fn link(&self, flags: u32) -> Vec<u8> {
        let mut body = vec![0; 4];
        body.extend(self.index.to_ne_bytes());
        body.extend(flags.to_ne_bytes());
        body.extend(flags.to_ne_bytes());
        body
    }

    fn request(&self, kind: u16, flags: u16, body: &[u8]) -> Result<()> {
        let len = u32::try_from(body.len())?.saturating_add(16);
        let mut message = len.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST_ACK | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.socket, &message, SendFlags::empty(), &kernel)?;
        let mut answer = vec![0; 4096];
        let (len, _) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
        // Behind the header: an error number, 0 for done.
        let code = answer.get(..len).and_then(|answer| answer.get(16..20));
        let code = code.context("a short answer")?;
        match i32::from_ne_bytes(code.try_into()?) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code.saturating_neg()).into()),
        }
    }
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // All values here are a multiple of 4 long, so nothing needs padding.
    let len = u16::try_from(value.len()).unwrap_or_default();
    body.extend(len.saturating_add(4).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}
