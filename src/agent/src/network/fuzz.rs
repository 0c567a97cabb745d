// SPDX-License-Identifier: Apache-2.0
//! Messages of the kernel's, and texts of the runtime's, about the network.

use protocols::agent::types::{IPAddress, Interface, Route};

use super::address::{self, Network};
use super::netlink::{attributes, split};
use super::{interface, route};

/// Any bytes from the routing socket.
pub fn netlink(bytes: &[u8]) {
    for (kind, flags, body) in split(bytes) {
        let _ = flags;
        interface::fuzz(kind, body);
        route::fuzz(kind, body);
        for (_, value) in attributes(body) {
            let _ = attributes(value).count();
        }
    }
    interface::fuzz(0, bytes);
    route::fuzz(0, bytes);
}

/// A text as everything that a request says in words.
pub(crate) fn texts(text: &str) {
    if let Ok(octets) = address::hardware(text) {
        assert_eq!(
            address::hardware(&address::hardware_text(&octets)).ok(),
            Some(octets)
        );
    }
    if let Ok(network) = Network::parse(text) {
        let _ = network.broadcast();
        assert_eq!(Network::parse(&network.to_string()).ok(), Some(network));
    }
    let (first, rest) = text.split_once('/').unwrap_or((text, ""));
    let _ = Network::new(first, rest);
    interface::fuzz_request(&Interface {
        name: first.to_owned(),
        hwAddr: rest.to_owned(),
        devicePath: text.to_owned(),
        IPAddresses: vec![IPAddress {
            address: first.to_owned(),
            mask: rest.to_owned(),
            ..IPAddress::default()
        }],
        ..Interface::default()
    });
    route::fuzz_request(&Route {
        dest: text.to_owned(),
        gateway: first.to_owned(),
        source: rest.to_owned(),
        device: "lo".to_owned(),
        ..Route::default()
    });
}
