// SPDX-License-Identifier: Apache-2.0
//! What a namespace holds that its guest is to have.
//!
//! An interface is served when it is up and carries Ethernet frames, of whatever kind it is: veth,
//! macvlan, ipvlan, tap, bridge, a physical one. The loopback interface is the guest's own, and a
//! port of a bridge or bond belongs to that. An interface without Ethernet can't be joined to a
//! tap: with an address it is an error, without one it is not in use.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use tracing::{debug, warn};

use super::FIRST_TAP;
use super::netlink::Socket;
use crate::error::{Context, Result};

/// A hardware address.
pub(super) type Mac = [u8; 6];

/// What a guest is to have.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct State {
    pub(super) interfaces: Vec<Interface>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
    /// Interfaces that are in use and can't be served, each in words.
    pub(super) refused: BTreeSet<String>,
}

/// An interface that carries Ethernet frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    /// What the kernel calls it: `veth`, `macvlan`, …; empty for hardware.
    pub(super) kind: String,
    pub(super) mac: Mac,
    pub(super) mtu: u32,
    pub(super) no_arp: bool,
    pub(super) addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    /// The interface's index.
    pub(super) interface: u32,
    pub(super) v6: bool,
    /// None for a default route.
    pub(super) destination: Option<Address>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    pub(super) scope: u8,
    pub(super) on_link: bool,
    pub(super) mtu: Option<u32>,
    pub(super) metric: u32,
}

/// A neighbour that somebody has set by hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Neighbour {
    /// The interface's index.
    pub(super) interface: u32,
    pub(super) address: IpAddr,
    pub(super) mac: Mac,
}

/// Reads the socket's namespace.
pub(super) fn scan(socket: &mut Socket) -> Result<State> {
    let mut state = State::default();
    let mut list = |what: &str, request| {
        let messages = socket.dump(&request);
        messages.internal(|| format!("list the {what} of the network namespace"))
    };
    let links = list(
        "interfaces",
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
    )?;
    let addresses = list(
        "addresses",
        RouteNetlinkMessage::GetAddress(AddressMessage::default()),
    )?;
    for message in links {
        let RouteNetlinkMessage::NewLink(link) = message else {
            continue;
        };
        if link.header.index >= FIRST_TAP {
            continue;
        }
        let found = addresses_of(link.header.index, &addresses);
        match interface(&link, found) {
            Ok(interface) => state.interfaces.extend(interface),
            Err(reason) => {
                state.refused.insert(reason);
            }
        }
    }
    state.refuse_twins();
    if state.interfaces.is_empty() {
        return Ok(state);
    }
    let served: BTreeSet<u32> = state.interfaces.iter().map(|it| it.index).collect();
    for message in list(
        "routes",
        RouteNetlinkMessage::GetRoute(RouteMessage::default()),
    )? {
        if let RouteNetlinkMessage::NewRoute(message) = message {
            let routes = route(&message);
            state.routes.extend(
                routes
                    .into_iter()
                    .filter(|it| served.contains(&it.interface)),
            );
        }
    }
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    for message in list("neighbours", request)? {
        if let RouteNetlinkMessage::NewNeighbour(message) = message {
            let neighbour = neighbour(&message);
            state
                .neighbours
                .extend(neighbour.filter(|it| served.contains(&it.interface)));
        }
    }
    Ok(state)
}

impl State {
    /// Takes those interfaces out that the guest could not tell from another.
    pub(super) fn refuse_twins(&mut self) {
        let mut seen = BTreeMap::new();
        let refused = &mut self.refused;
        self.interfaces.retain(|interface| {
            match seen.insert(interface.mac, interface.name.clone()) {
                None => true,
                Some(twin) => {
                    refused.insert(format!(
                        "network interfaces {twin} and {} have the same hardware address: a guest \
                         could not tell them apart",
                        interface.name
                    ));
                    false
                }
            }
        });
    }

    /// Takes an interface out, with all that belongs to it.
    pub(super) fn without(&mut self, index: u32) {
        self.interfaces.retain(|it| it.index != index);
        self.routes.retain(|it| it.interface != index);
        self.neighbours.retain(|it| it.interface != index);
    }
}

/// A link as an interface; none if it is not in use, and words if it can't be served.
fn interface(link: &LinkMessage, addresses: Vec<Address>) -> Result<Option<Interface>, String> {
    let flags = link.header.flags;
    if !flags.contains(LinkFlags::Up) || flags.contains(LinkFlags::Loopback) {
        return Ok(None);
    }
    let mut name = String::new();
    let mut kind = String::new();
    let mut mac = None;
    let mut mtu = 0;
    let mut port = false;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => mac = Mac::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Controller(_) => port = true,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(text) = info {
                        kind = text.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    if port && addresses.is_empty() {
        debug!(interface = name, "belongs to a bridge or bond: not served");
        return Ok(None);
    }
    match mac {
        Some(mac) if link.header.link_layer_type == LinkLayerType::Ether => {
            let own = link_local(mac);
            Ok(Some(Interface {
                index: link.header.index,
                name,
                kind,
                mac,
                mtu,
                no_arp: flags.contains(LinkFlags::Noarp),
                // The guest's kernel gives itself the same.
                addresses: addresses
                    .into_iter()
                    .filter(|it| it.address != own)
                    .collect(),
            }))
        }
        _ if addresses.is_empty() => {
            debug!(
                interface = name,
                kind, "neither Ethernet nor an address: not served"
            );
            Ok(None)
        }
        _ => Err(format!(
            "network interface {name} (kind {kind:?}, layer {:?}): a guest can be given Ethernet \
             interfaces only",
            link.header.link_layer_type
        )),
    }
}

/// The link-local address that the kernel makes of a hardware address (RFC 4291, appendix A).
fn link_local(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    IpAddr::V6(Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        ((a ^ 2) << 8) | b,
        (c << 8) | 0xff,
        0xfe00 | d,
        (e << 8) | f,
    ))
}

fn addresses_of(index: u32, messages: &[RouteNetlinkMessage]) -> Vec<Address> {
    let mut found = Vec::new();
    for message in messages {
        let RouteNetlinkMessage::NewAddress(message) = message else {
            continue;
        };
        if message.header.index != index {
            continue;
        }
        let mut local = None;
        let mut address = None;
        for attribute in &message.attributes {
            match attribute {
                // Where the two differ, the other is the far end of a point-to-point link.
                AddressAttribute::Local(own) => local = Some(*own),
                AddressAttribute::Address(any) => address = Some(*any),
                _ => {}
            }
        }
        found.extend(local.or(address).map(|address| Address {
            address,
            prefix: message.header.prefix_len,
        }));
    }
    found
}

/// A route that somebody has set; the kernel's own follow from the addresses.
fn route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let v6 = match header.address_family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return None,
    };
    let mut route = Route {
        interface: 0,
        v6,
        destination: None,
        gateway: None,
        source: None,
        scope: header.scope.into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
        mtu: None,
        metric: 0,
    };
    let mut table = u32::from(header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(index) => route.interface = *index,
            RouteAttribute::Destination(to) => {
                route.destination = ip(to).map(|address| Address {
                    address,
                    prefix: header.destination_prefix_length,
                });
            }
            RouteAttribute::Gateway(by) => route.gateway = ip(by),
            RouteAttribute::PrefSource(from) => route.source = ip(from),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::Via(_) => {
                warn!("a route whose gateway is of the other family: the guest does without");
                return None;
            }
            RouteAttribute::MultiPath(hops) => {
                if let Some(hop) = hops.first() {
                    warn!(
                        hops = hops.len(),
                        "a route with several ways: the guest gets the first"
                    );
                    route.interface = hop.interface_index;
                    for attribute in &hop.attributes {
                        if let RouteAttribute::Gateway(by) = attribute {
                            route.gateway = ip(by);
                        }
                    }
                }
            }
            _ => {}
        }
    }
    let kept = table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && header.kind == RouteType::Unicast
        && header.protocol != RouteProtocol::Kernel
        && !header.flags.contains(RouteFlags::Cloned);
    kept.then_some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some((*ip).into());
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some((*ip).into());
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = Mac::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(Neighbour {
        interface: message.header.ifindex,
        address: address?,
        mac: mac?,
    })
}
