// SPDX-License-Identifier: Apache-2.0
//! Differences between two states, in the agent's words.
use super::scan::{Address, Neighbour, Route};
use super::*;
use std::collections::BTreeSet;

fn interface(index: u32, name: &str) -> Interface {
    Interface {
        index,
        name: name.to_owned(),
        kind: "veth".to_owned(),
        mac: [2, 0, 0, 0, 0, u8::try_from(index).unwrap()],
        mtu: 9000,
        no_arp: false,
        addresses: vec![
            Address {
                address: "10.88.0.2".parse().unwrap(),
                prefix: 16,
            },
            Address {
                address: "fd00::2".parse().unwrap(),
                prefix: 64,
            },
        ],
    }
}

fn default_route(interface: u32) -> Route {
    Route {
        interface,
        v6: false,
        destination: None,
        gateway: Some("10.88.0.1".parse().unwrap()),
        source: None,
        scope: 0,
        on_link: true,
        mtu: Some(1400),
        metric: 7,
    }
}

fn state() -> State {
    let to_gateway = Route {
        destination: Some(Address {
            address: "10.88.0.1".parse().unwrap(),
            prefix: 32,
        }),
        gateway: None,
        source: Some("10.88.0.2".parse().unwrap()),
        scope: 253,
        on_link: false,
        mtu: None,
        ..default_route(3)
    };
    State {
        interfaces: vec![interface(3, "eth0")],
        routes: vec![default_route(3), to_gateway],
        neighbours: vec![Neighbour {
            interface: 3,
            address: "10.88.0.1".parse().unwrap(),
            mac: [0xee; 6],
        }],
        refused: BTreeSet::new(),
    }
}

#[test]
fn a_new_network_is_told_whole() {
    let told = difference(&State::default(), &state());
    let [interface] = told.interfaces.as_slice() else {
        panic!("{told:?}");
    };
    assert_eq!(interface.name, "eth0");
    assert_eq!(interface.hwAddr, "02:00:00:00:00:03");
    assert_eq!(interface.mtu, 9000);
    assert_eq!(interface.IPAddresses[0].mask, "16");
    assert_eq!(interface.IPAddresses[1].address, "fd00::2");
    assert_eq!(
        interface.IPAddresses[1].family.unwrap(),
        types::IPFamily::v6
    );

    // The gateway's route first: the default route rests on it.
    let routes = told.routes.unwrap();
    let [link, default] = routes.as_slice() else {
        panic!("{routes:?}");
    };
    assert_eq!(link.dest, "10.88.0.1/32");
    assert_eq!((link.scope, link.source.as_str()), (253, "10.88.0.2"));
    assert_eq!(default.dest, "");
    assert_eq!(default.gateway, "10.88.0.1");
    assert_eq!(default.device, "eth0");
    assert_eq!((default.flags, default.mtu, default.metric), (4, 1400, 7));

    let neighbours = told.neighbours.unwrap().ARPNeighbors;
    let [neighbour] = neighbours.as_slice() else {
        panic!("{neighbours:?}");
    };
    assert_eq!(neighbour.toIPAddress.address, "10.88.0.1");
    assert_eq!(neighbour.lladdr, "ee:ee:ee:ee:ee:ee");
    assert_eq!(neighbour.state, 0x80);
}

#[test]
fn only_what_changed_is_told() {
    let old = state();
    let same = difference(&old, &old);
    assert!(same.interfaces.is_empty() && same.routes.is_none() && same.neighbours.is_none());

    let mut new = state();
    new.routes.pop();
    let told = difference(&old, &new);
    assert!(told.interfaces.is_empty());
    assert_eq!(told.routes.unwrap().len(), 1);

    let mut new = state();
    new.interfaces.push(interface(4, "net1"));
    let told = difference(&old, &new);
    assert_eq!(told.interfaces.len(), 1);
    assert_eq!(told.interfaces[0].name, "net1");
    assert_eq!(told.routes.unwrap().len(), 2);
}

#[test]
fn twins_are_refused_by_name() {
    let mut twins = state();
    twins.interfaces.push(Interface {
        mac: twins.interfaces[0].mac,
        ..interface(4, "net1")
    });
    twins.refuse_twins();
    assert_eq!(twins.interfaces.len(), 1);
    let text = twins.refused.first().unwrap();
    assert!(text.contains("eth0 and net1"), "{text}");
}

#[test]
fn the_numbers_of_taps_are_out_of_the_way() {
    for _ in 0..100 {
        let index = random_index().unwrap();
        assert!(index >= FIRST_TAP && i32::try_from(index).is_ok());
    }
}
