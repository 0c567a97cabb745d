// SPDX-License-Identifier: Apache-2.0
//! The host's end of a guest's network interface: a tap, of its own or on top of an interface
//! (macvtap), and the files by which the monitor moves its packets.
//!
//! A tap of its own ends with the last file of it, so with the monitor, however that ends. A
//! macvtap stays until it is removed.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoMacVtap, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage, MacVlanMode,
};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::netlink::Socket;
use super::scan::Mac;
use crate::raw;

const TUN: &str = "/dev/net/tun";
const VHOST: &str = "/dev/vhost-net";

/// What every queue of a tap is: Ethernet frames, each behind the header that virtio-net uses too.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes a tap in the calling thread's namespace; a file a queue.
pub(super) fn create(name: &str, index: u32, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let flags = match queues {
        0 | 1 => FLAGS,
        _ => FLAGS | libc::IFF_MULTI_QUEUE,
    };
    let mut files = Vec::new();
    for queue in 0..queues.max(1) {
        let file = open(TUN)?;
        if queue == 0 {
            raw::set_tap_index(&file, index)?;
            // Never another's tap of the same name.
            raw::attach_tap(&file, name, flags | libc::IFF_TUN_EXCL)?;
        } else {
            raw::attach_tap(&file, name, flags)?;
        }
        files.push(file.into());
    }
    Ok(files)
}

/// Makes a macvtap that takes all of the traffic of the interface `lower`. It has the same
/// hardware address, which is the guest's.
pub(super) fn create_macvtap(
    socket: &mut Socket,
    name: &str,
    index: u32,
    lower: u32,
    mac: Mac,
) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Link(lower),
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::MacVtap),
            LinkInfo::Data(InfoData::MacVtap(vec![InfoMacVtap::Mode(
                MacVlanMode::Passthrough,
            )])),
        ]),
    ];
    socket.change(
        RouteNetlinkMessage::NewLink(link),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// Opens a macvtap of the calling thread's namespace; a file a queue.
///
/// The device nodes in the host's `/dev` are named by a number that is unique in a namespace
/// only. So the device's number is read in a sysfs of this namespace, and a node of it made where
/// nobody sees it; neither is ever mounted at a path.
pub(super) fn open_macvtap(name: &str, index: u32, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let sysfs = unseen_mount("sysfs")?;
    let path = format!("class/macvtap/tap{index}/dev");
    let mut number = String::new();
    File::from(openat(&sysfs, path, OFlags::CLOEXEC, Mode::empty())?)
        .read_to_string(&mut number)?;
    let (major, minor) = number
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| io::Error::other(format!("{number:?} is no device's number")))?;
    let tmpfs = unseen_mount("tmpfs")?;
    mknodat(
        &tmpfs,
        "tap",
        FileType::CharacterDevice,
        Mode::RUSR | Mode::WUSR,
        makedev(major, minor),
    )?;
    let mut files = Vec::new();
    for _ in 0..queues.max(1) {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat(&tmpfs, "tap", flags, Mode::empty())?;
        raw::attach_tap(&file, name, FLAGS | libc::IFF_MULTI_QUEUE)?;
        files.push(file);
    }
    Ok(files)
}

/// A file system that is mounted nowhere.
fn unseen_mount(kind: &str) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?)
}

/// Sets up a tap, which then carries frames. The host's network stack is to say nothing on it.
pub(super) fn set_up(socket: &mut Socket, index: u32, mtu: u32) -> io::Result<()> {
    let silent = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![
        LinkAttribute::Mtu(mtu),
        LinkAttribute::AfSpecUnspec(vec![silent]),
    ];
    match socket.change(RouteNetlinkMessage::SetLink(link.clone()), 0) {
        // A host without IPv6 has nothing to say in it.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            link.attributes.truncate(1);
            socket.change(RouteNetlinkMessage::SetLink(link), 0)?;
        }
        other => other?,
    }
    let mut link = LinkMessage::default();
    link.header.index = index;
    // A macvtap drops the multicasts that nobody on the host has joined.
    link.header.flags = LinkFlags::Up | LinkFlags::Allmulti;
    link.header.change_mask = LinkFlags::Up | LinkFlags::Allmulti;
    socket.change(RouteNetlinkMessage::SetLink(link), 0)
}

/// Changes a tap's largest packet.
pub(super) fn set_mtu(socket: &mut Socket, index: u32, mtu: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::Mtu(mtu)];
    socket.change(RouteNetlinkMessage::SetLink(link), 0)
}

/// Removes the interface of this number, if it has this name.
pub(super) fn remove(socket: &mut Socket, index: u32, name: &str) -> io::Result<()> {
    if !exists(socket, index, name)? {
        return Ok(());
    }
    let mut link = LinkMessage::default();
    link.header.index = index;
    socket.change(RouteNetlinkMessage::DelLink(link), 0)
}

/// Whether there is an interface of this number and this name.
pub(super) fn exists(socket: &mut Socket, index: u32, name: &str) -> io::Result<bool> {
    let links = socket.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let name = LinkAttribute::IfName(name.to_owned());
    Ok(links.iter().any(|message| match message {
        RouteNetlinkMessage::NewLink(link) => {
            link.header.index == index && link.attributes.contains(&name)
        }
        _ => false,
    }))
}

/// Opens the kernel's packet mover for virtio-net, a file a queue pair.
pub(super) fn open_vhost(pairs: usize) -> io::Result<Vec<OwnedFd>> {
    let files = (0..pairs).map(|_| open(VHOST).map(OwnedFd::from));
    files.collect()
}

fn open(path: &str) -> io::Result<File> {
    // The monitor polls a tap, and must never be held by it.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = openat(CWD, path, flags, Mode::empty()).map_err(|error| {
        io::Error::new(
            io::Error::from(error).kind(),
            format!("open {path}: {error}"),
        )
    });
    Ok(file?.into())
}
