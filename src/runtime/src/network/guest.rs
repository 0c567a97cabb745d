// SPDX-License-Identifier: Apache-2.0
//! A namespace's state in the words of the agent's protocol.

use std::collections::HashMap;
use std::fmt::Write;
use std::net::IpAddr;

use protobuf::MessageField;
use protocols::agent::agent::ARPNeighbors;
use protocols::agent::types::{self, IPFamily};

use super::scan::{Address, Interface, Mac, Neighbour, Route, State};

/// `RTNH_F_ONLINK`: the gateway is reached without a route to it.
const ON_LINK: u32 = 4;

/// `NUD_PERMANENT`.
const PERMANENT: i32 = 0x80;

/// An interface; the agent finds it by its hardware address.
pub(super) fn interface(interface: &Interface) -> types::Interface {
    types::Interface {
        device: interface.name.clone(),
        name: interface.name.clone(),
        IPAddresses: interface.addresses.iter().map(address).collect(),
        mtu: interface.mtu.into(),
        hwAddr: mac(interface.mac),
        type_: interface.kind.clone(),
        raw_flags: if interface.no_arp {
            libc::IFF_NOARP.cast_unsigned()
        } else {
            0
        },
        ..Default::default()
    }
}

/// All routes, such that each can be added when those before it are there: a gateway is reached
/// by a route of the link. Of several to one destination, the preferred comes first.
pub(super) fn routes(state: &State) -> Vec<types::Route> {
    let names = names(state);
    let mut routes: Vec<&Route> = state.routes.iter().collect();
    routes.sort_by_key(|route| (route.gateway.is_some(), route.metric));
    routes
        .into_iter()
        .filter_map(|it| Some(route(it, names.get(&it.interface)?)))
        .collect()
}

/// All neighbours that were set by hand.
pub(super) fn neighbours(state: &State) -> ARPNeighbors {
    let names = names(state);
    let neighbour = |it: &Neighbour| {
        Some(types::ARPNeighbor {
            toIPAddress: MessageField::some(types::IPAddress {
                family: family(it.address.is_ipv6()).into(),
                address: it.address.to_string(),
                ..Default::default()
            }),
            device: (*names.get(&it.interface)?).to_owned(),
            lladdr: mac(it.mac),
            state: PERMANENT,
            ..Default::default()
        })
    };
    ARPNeighbors {
        ARPNeighbors: state.neighbours.iter().filter_map(neighbour).collect(),
        ..Default::default()
    }
}

fn names(state: &State) -> HashMap<u32, &str> {
    let interfaces = state.interfaces.iter();
    interfaces.map(|it| (it.index, it.name.as_str())).collect()
}

fn route(route: &Route, device: &str) -> types::Route {
    let text = |address: Option<IpAddr>| address.map(|it| it.to_string()).unwrap_or_default();
    types::Route {
        dest: route
            .destination
            .map(|to| format!("{}/{}", to.address, to.prefix))
            .unwrap_or_default(),
        gateway: text(route.gateway),
        device: device.to_owned(),
        source: text(route.source),
        scope: route.scope.into(),
        family: family(route.v6).into(),
        flags: if route.on_link { ON_LINK } else { 0 },
        mtu: route.mtu.unwrap_or_default(),
        metric: route.metric,
        ..Default::default()
    }
}

fn address(address: &Address) -> types::IPAddress {
    types::IPAddress {
        family: family(address.address.is_ipv6()).into(),
        address: address.address.to_string(),
        mask: address.prefix.to_string(),
        ..Default::default()
    }
}

fn family(v6: bool) -> IPFamily {
    if v6 { IPFamily::v6 } else { IPFamily::v4 }
}

/// In the form `02:00:00:00:00:01`.
fn mac(bytes: Mac) -> String {
    let mut text = String::new();
    for (position, byte) in bytes.iter().enumerate() {
        let colon = if position == 0 { "" } else { ":" };
        // Writing to a string can't fail.
        let _ = write!(text, "{colon}{byte:02x}");
    }
    text
}
