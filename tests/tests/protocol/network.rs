// SPDX-License-Identifier: Apache-2.0
//! The guest's card, on a wire to the host.

use anyhow::{Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    ARPNeighbors, AddARPNeighborsRequest, GetIPTablesRequest, ListInterfacesRequest,
    ListRoutesRequest, Routes, SetIPTablesRequest, UpdateInterfaceRequest, UpdateRoutesRequest,
};
use protocols::agent::types::{ARPNeighbor, IPAddress, Interface, Route};

use crate::client::{INVALID, NOT_FOUND, UNIMPLEMENTED, call, refused};
use crate::host::{ADDRESS, CARD, Host};

const NAME: &str = "eth0";
const NOBODY: &str = "eth7";
/// Not on the wire.
const NEIGHBOUR: (&str, &str) = ("10.9.0.77", "02:00:00:00:00:77");

fn interface() -> Interface {
    Interface {
        device: NAME.to_owned(),
        name: NAME.to_owned(),
        hwAddr: CARD.to_owned(),
        mtu: 1400,
        IPAddresses: vec![IPAddress {
            address: "10.9.0.2".to_owned(),
            mask: "24".to_owned(),
            ..IPAddress::default()
        }],
        ..Interface::default()
    }
}

/// Found by its hardware address; the host is reached by it.
pub(crate) async fn card(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    let now = call!(
        agent,
        update_interface,
        UpdateInterfaceRequest {
            interface: MessageField::some(interface()),
        }
    )?;
    ensure!(now.name == NAME && now.mtu == 1400, "{now:?}");
    let unknown = Interface {
        hwAddr: String::new(),
        name: NOBODY.to_owned(),
        ..interface()
    };
    let unknown = call!(
        agent,
        update_interface,
        UpdateInterfaceRequest {
            interface: MessageField::some(unknown),
        }
    );
    refused(INVALID, "hwAddr", unknown)?;
    let listed = call!(agent, list_interfaces, ListInterfacesRequest {})?;
    ensure!(
        listed
            .Interfaces
            .iter()
            .any(|one| one.name == NAME && one.hwAddr == CARD),
        "{listed:?}"
    );

    let update = async |device: &str| {
        let route = Route {
            gateway: ADDRESS.to_string(),
            device: device.to_owned(),
            ..Route::default()
        };
        call!(
            agent,
            update_routes,
            UpdateRoutesRequest {
                routes: MessageField::some(Routes {
                    Routes: vec![route],
                    ..Routes::default()
                }),
            }
        )
    };
    let has = |routes: &Routes| {
        let mut routes = routes.Routes.iter();
        routes.any(|one| one.gateway == ADDRESS.to_string() && one.device == NAME)
    };
    let set = update(NAME).await?;
    ensure!(has(&set), "{set:?}");
    refused(NOT_FOUND, NOBODY, update(NOBODY).await)?;
    let listed = call!(agent, list_routes, ListRoutesRequest {})?;
    ensure!(has(&listed), "{listed:?}");

    let add = async |device: &str| {
        let neighbour = ARPNeighbor {
            toIPAddress: MessageField::some(IPAddress {
                address: NEIGHBOUR.0.to_owned(),
                ..IPAddress::default()
            }),
            device: device.to_owned(),
            lladdr: NEIGHBOUR.1.to_owned(),
            ..ARPNeighbor::default()
        };
        call!(
            agent,
            add_arp_neighbors,
            AddARPNeighborsRequest {
                neighbors: MessageField::some(ARPNeighbors {
                    ARPNeighbors: vec![neighbour],
                    ..ARPNeighbors::default()
                }),
            }
        )
    };
    add(NAME).await?;
    refused(NOT_FOUND, NOBODY, add(NOBODY).await)?;

    let seen = host
        .look("ip addr show eth0; ip route; ip neigh show dev eth0")
        .await?;
    for part in [
        "mtu 1400",
        CARD,
        "inet 10.9.0.2/24",
        "default via 10.9.0.1 dev eth0",
        NEIGHBOUR.1,
    ] {
        ensure!(seen.contains(part), "{part:?} is not in {seen}");
    }
    host.look(&format!("ping -c 1 -W 10 {ADDRESS}")).await?;
    Ok(())
}

/// The image has no tool for them, and the answer says which.
pub(crate) async fn filters(host: &Host) -> Result<()> {
    let agent = &host.client.agent;
    for (is_ipv6, tool) in [(false, "iptables"), (true, "ip6tables")] {
        let get = call!(
            agent,
            get_ip_tables,
            GetIPTablesRequest { is_ipv6: is_ipv6 }
        );
        refused(UNIMPLEMENTED, &format!("{tool}-save"), get)?;
        let set = call!(
            agent,
            set_ip_tables,
            SetIPTablesRequest {
                is_ipv6: is_ipv6,
                data: b"*filter\nCOMMIT\n".to_vec(),
            }
        );
        refused(UNIMPLEMENTED, &format!("{tool}-restore"), set)?;
    }
    Ok(())
}
