// SPDX-License-Identifier: Apache-2.0
//! What has passed a pod's interfaces, as its namespace counts it: no guest can lie about that.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, Stats64};

use super::netlink::Socket;
use super::{FIRST_TAP, Namespace};

/// An interface's counters, from the pod's point of view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) interface: String,
    pub(crate) stats: Stats64,
}

/// The counters of all interfaces that are the pod's.
pub(crate) fn counters(namespace: &Namespace) -> io::Result<Vec<Counters>> {
    let mut socket = namespace.run(Socket::open)??;
    let links = socket.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links.iter().filter_map(of_link).collect())
}

/// Loopback is nobody's traffic, and a tap's is its interface's.
fn of_link(message: &RouteNetlinkMessage) -> Option<Counters> {
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    if link.header.index >= FIRST_TAP || link.header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let (mut interface, mut stats) = (None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface = Some(name.clone()),
            LinkAttribute::Stats64(found) => stats = Some(*found),
            _ => {}
        }
    }
    Some(Counters {
        interface: interface?,
        stats: stats?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        let mut stats = Stats64::default();
        stats.rx_bytes = 7;
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Stats64(stats),
        ];
        link
    }

    #[test]
    fn the_pod_s_interfaces_count_and_no_others() {
        let found = of_link(&RouteNetlinkMessage::NewLink(link(2, "eth0"))).unwrap();
        assert_eq!(
            (found.interface.as_str(), found.stats.rx_bytes),
            ("eth0", 7)
        );
        let tap = RouteNetlinkMessage::NewLink(link(FIRST_TAP, "tap0_kata"));
        assert_eq!(of_link(&tap), None);
        let mut loopback = link(1, "lo");
        loopback.header.flags = LinkFlags::Loopback;
        assert_eq!(of_link(&RouteNetlinkMessage::NewLink(loopback)), None);
    }
}
