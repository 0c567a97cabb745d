// SPDX-License-Identifier: Apache-2.0
//! Interfaces, routes and neighbours. A pair of virtual interfaces in the agent's own network
//! namespace stands for the guest's network card.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use protobuf::MessageField;
use protocols::agent::agent::{
    ARPNeighbors, AddARPNeighborsRequest, GetIPTablesRequest, ListInterfacesRequest,
    ListRoutesRequest, Routes, SetIPTablesRequest, UpdateInterfaceRequest, UpdateRoutesRequest,
};
use protocols::agent::types::{ARPNeighbor, IPAddress, Interface, Route};
use tokio::time::sleep;

use crate::rig::{Rig, ctx, refusal};

const CARD: &str = "02:00:00:00:00:01";
const OTHER: &str = "02:00:00:00:00:02";

/// An agent with a card that is not set up yet. Its other end is up: there is a carrier.
async fn rig() -> Result<Rig> {
    let rig = Rig::new().await?;
    plug(&rig)?;
    Ok(rig)
}

fn plug(rig: &Rig) -> Result<()> {
    rig.ip(&format!(
        "link add card address {CARD} type veth peer name far"
    ))?;
    rig.ip("link set far up")?;
    Ok(())
}

fn interface(name: &str, addresses: &[&str]) -> Interface {
    let address = |text: &&str| {
        let (address, mask) = text.split_once('/').unwrap();
        IPAddress {
            address: address.to_owned(),
            mask: mask.to_owned(),
            ..IPAddress::default()
        }
    };
    Interface {
        device: name.to_owned(),
        name: name.to_owned(),
        hwAddr: CARD.to_owned(),
        mtu: 1400,
        IPAddresses: addresses.iter().map(address).collect(),
        ..Interface::default()
    }
}

async fn update(rig: &Rig, interface: Interface) -> ttrpc::Result<Interface> {
    let request = UpdateInterfaceRequest {
        interface: MessageField::some(interface),
        ..UpdateInterfaceRequest::default()
    };
    rig.agent.update_interface(ctx(), &request).await
}

fn route(dest: &str, gateway: &str) -> Route {
    Route {
        dest: dest.to_owned(),
        gateway: gateway.to_owned(),
        device: "eth0".to_owned(),
        ..Route::default()
    }
}

async fn update_routes(rig: &Rig, routes: Vec<Route>) -> ttrpc::Result<Vec<String>> {
    let request = UpdateRoutesRequest {
        routes: MessageField::some(Routes {
            Routes: routes,
            ..Routes::default()
        }),
        ..UpdateRoutesRequest::default()
    };
    let now = rig.agent.update_routes(ctx(), &request).await?;
    Ok(now.Routes.iter().map(words).collect())
}

fn words(route: &Route) -> String {
    format!("{} {} {}", route.dest, route.gateway, route.device)
}

fn texts(interface: &Interface) -> Vec<String> {
    let mut texts: Vec<String> = interface
        .IPAddresses
        .iter()
        .map(|address| format!("{}/{}", address.address, address.mask))
        .filter(|text| !text.starts_with("fe80"))
        .collect();
    texts.sort();
    texts
}

#[tokio::test]
async fn an_interface_gets_what_was_asked_for() -> Result<()> {
    let rig = rig().await?;
    let mut wanted = interface("eth0", &["10.1.0.2/24", "fd00::2/64"]);
    wanted.raw_flags = 0x80;
    let now = update(&rig, wanted).await?;
    assert_eq!(texts(&now), ["10.1.0.2/24", "fd00::2/64"]);
    assert_eq!(
        (now.name.as_str(), now.mtu, now.hwAddr.as_str()),
        ("eth0", 1400, CARD)
    );
    let text = rig.ip("addr show eth0")?;
    for part in [
        "NOARP",
        ",UP",
        "mtu 1400",
        "brd 10.1.0.255",
        "fd00::2/64 scope global nodad",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Usable from the first moment on, the kernel's own address too.
    assert!(!text.contains("tentative"), "{text}");

    let list = rig
        .agent
        .list_interfaces(ctx(), &ListInterfacesRequest::default())
        .await?;
    let card = list
        .Interfaces
        .iter()
        .find(|one| one.name == "eth0")
        .context("eth0")?;
    assert_eq!(texts(card), ["10.1.0.2/24", "fd00::2/64"]);
    Ok(())
}

#[tokio::test]
async fn a_second_update_replaces_the_first() -> Result<()> {
    let rig = rig().await?;
    update(
        &rig,
        interface("eth0", &["10.1.0.2/24", "10.1.0.3/24", "fd00::2/64"]),
    )
    .await?;
    let now = update(&rig, interface("net1", &["10.1.0.3/24", "10.2.0.2/16"])).await?;
    assert_eq!(texts(&now), ["10.1.0.3/24", "10.2.0.2/16"]);
    // NOARP was not asked for.
    assert!(!rig.ip("link show net1")?.contains("NOARP"));
    Ok(())
}

#[tokio::test]
async fn names_are_exchanged() -> Result<()> {
    let rig = rig().await?;
    rig.ip(&format!(
        "link add eth0 address {OTHER} type veth peer name far2"
    ))?;
    rig.ip("link set eth0 up")?;
    update(&rig, interface("eth0", &["10.1.0.2/24"])).await?;
    assert!(rig.ip("link show eth0")?.contains(CARD));
    let other = rig.ip("link show card")?;
    assert!(other.contains(OTHER) && other.contains(",UP"), "{other}");
    Ok(())
}

#[tokio::test]
async fn a_plugged_card_is_waited_for() -> Result<()> {
    let rig = Rig::new().await?;
    let plugged = async {
        sleep(Duration::from_millis(300)).await;
        plug(&rig)
    };
    let (now, plugged) = tokio::join!(update(&rig, interface("eth0", &["10.1.0.2/24"])), plugged);
    plugged?;
    assert_eq!(texts(&now?), ["10.1.0.2/24"]);
    Ok(())
}

#[tokio::test]
async fn interfaces_that_cannot_be_are_said_so() -> Result<()> {
    let rig = rig().await?;
    let (code, line) = refusal(update(&rig, interface("eth0", &["10.1.0.2/33"])).await);
    assert_eq!(
        (code, line.as_str()),
        (3, "interface \"eth0\": address \"10.1.0.2/33\"")
    );
    let (_, line) = refusal(update(&rig, interface("eth0", &["ff02::1/64"])).await);
    assert!(
        line.starts_with("interface \"eth0\": add address ff02::1/64: "),
        "{line}"
    );
    let mut wanted = interface("eth0", &[]);
    wanted.hwAddr = OTHER.to_owned();
    let (code, line) = refusal(update(&rig, wanted).await);
    assert_eq!(
        (code, line.as_str()),
        (
            5,
            "interface \"eth0\": no device with hardware address 02:00:00:00:00:02 appeared \
             within 10 s"
        )
    );
    Ok(())
}

#[tokio::test]
async fn routes_are_replaced_in_an_order_that_works() -> Result<()> {
    let rig = rig().await?;
    update(&rig, interface("eth0", &["10.1.0.2/24", "fd00::2/64"])).await?;
    // As some networks of Kubernetes have it: the gateway is on the link by a route of its own,
    // and comes after the route that needs it.
    let mut on_link = route("169.254.1.1", "");
    on_link.scope = 253;
    let mut with_mtu = route("10.9.0.0/16", "10.1.0.1");
    with_mtu.mtu = 1300;
    with_mtu.source = "10.1.0.2".to_owned();
    let mut any_gateway = route("10.8.0.0/16", "10.77.0.1");
    any_gateway.flags = 4;
    let routes = vec![
        route("", "169.254.1.1"),
        route("::/0", "fd00::1"),
        with_mtu,
        any_gateway,
        on_link,
    ];
    let mut now = update_routes(&rig, routes).await?;
    now.retain(|route| !route.contains("fe80"));
    now.sort();
    assert_eq!(
        now,
        [
            " 169.254.1.1 eth0",
            " fd00::1 eth0",
            "10.1.0.0/24  eth0",
            "10.8.0.0/16 10.77.0.1 eth0",
            "10.9.0.0/16 10.1.0.1 eth0",
            "169.254.1.1/32  eth0",
            "fd00::/64  eth0"
        ]
    );
    let text = rig.ip("route show")?;
    for line in [
        "default via 169.254.1.1 dev eth0",
        "10.8.0.0/16 via 10.77.0.1 dev eth0 proto static onlink",
        "10.9.0.0/16 via 10.1.0.1 dev eth0 proto static src 10.1.0.2 mtu 1300",
        "169.254.1.1 dev eth0 proto static scope link",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }

    let mut now = update_routes(&rig, vec![route("default", "10.1.0.1")]).await?;
    now.retain(|route| !route.contains("fe80"));
    now.sort();
    assert_eq!(
        now,
        [" 10.1.0.1 eth0", "10.1.0.0/24  eth0", "fd00::/64  eth0"]
    );
    let list = rig
        .agent
        .list_routes(ctx(), &ListRoutesRequest::default())
        .await?;
    assert!(
        list.Routes
            .iter()
            .map(words)
            .any(|route| route == " 10.1.0.1 eth0")
    );
    Ok(())
}

#[tokio::test]
async fn a_route_that_cannot_be_is_named() -> Result<()> {
    let rig = rig().await?;
    update(&rig, interface("eth0", &["10.1.0.2/24"])).await?;
    let (_, line) = refusal(update_routes(&rig, vec![route("", "10.3.0.1")]).await);
    assert_eq!(
        line,
        "add route default via 10.3.0.1 dev eth0: network is unreachable"
    );
    let mut nowhere = route("10.4.0.0/16", "");
    nowhere.device = "eth7".to_owned();
    let (code, line) = refusal(update_routes(&rig, vec![nowhere]).await);
    assert_eq!(
        (code, line.as_str()),
        (
            5,
            "route 10.4.0.0/16 dev eth7: there is no interface \"eth7\""
        )
    );
    Ok(())
}

#[tokio::test]
async fn neighbours_need_no_asking() -> Result<()> {
    let rig = rig().await?;
    update(&rig, interface("eth0", &["10.1.0.2/24", "fd00::2/64"])).await?;
    let neighbour = |address: &str| ARPNeighbor {
        toIPAddress: MessageField::some(IPAddress {
            address: address.to_owned(),
            ..IPAddress::default()
        }),
        device: "eth0".to_owned(),
        lladdr: OTHER.to_owned(),
        state: 0x80,
        ..ARPNeighbor::default()
    };
    let request = |neighbours| AddARPNeighborsRequest {
        neighbors: MessageField::some(ARPNeighbors {
            ARPNeighbors: neighbours,
            ..ARPNeighbors::default()
        }),
        ..AddARPNeighborsRequest::default()
    };
    let both = request(vec![neighbour("10.1.0.1"), neighbour("fd00::1")]);
    rig.agent.add_arp_neighbors(ctx(), &both).await?;
    // Once more is no error.
    rig.agent.add_arp_neighbors(ctx(), &both).await?;
    let text = rig.ip("neigh show dev eth0")?;
    for address in ["10.1.0.1", "fd00::1"] {
        let line = format!("{address} lladdr {OTHER} PERMANENT");
        assert!(text.contains(&line), "{text}");
    }
    let mut wrong = neighbour("10.1.0.1");
    wrong.lladdr = "2".to_owned();
    let (code, line) = refusal(
        rig.agent
            .add_arp_neighbors(ctx(), &request(vec![wrong]))
            .await,
    );
    assert_eq!(
        (code, line.as_str()),
        (3, "neighbour 10.1.0.1 of \"eth0\": hardware address \"2\"")
    );
    Ok(())
}

/// By the tools of the agent's root, which here are the host's; with none the refusal names the one that
/// is missing.
#[tokio::test]
async fn packet_filters_are_their_tool_s() -> Result<()> {
    let rig = Rig::new().await?;
    // The host's links to its programs, which the agent's root needs too.
    let links = rig.path().join("etc/alternatives");
    fs::create_dir_all(&links)?;
    for entry in fs::read_dir("/etc/alternatives").into_iter().flatten() {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains("tables") {
            symlink(fs::read_link(entry.path())?, links.join(entry.file_name()))?;
        }
    }
    for (is_ipv6, tool) in [
        (false, "/usr/sbin/iptables-save"),
        (true, "/usr/sbin/ip6tables-save"),
    ] {
        let get = GetIPTablesRequest {
            is_ipv6,
            ..GetIPTablesRequest::default()
        };
        let set = SetIPTablesRequest {
            is_ipv6,
            data: b"*filter\n-A INPUT -p tcp --dport 99 -j DROP\nCOMMIT\n".to_vec(),
            ..SetIPTablesRequest::default()
        };
        let before = rig.agent.get_ip_tables(ctx(), &get).await;
        let set = rig.agent.set_ip_tables(ctx(), &set).await;
        // The program may be there for a kernel that lacks its part.
        let there = fs::exists(tool)?;
        if there && Command::new(tool).output()?.status.success() {
            before?;
            set?;
            let now = rig.agent.get_ip_tables(ctx(), &get).await?;
            let now = String::from_utf8(now.data)?;
            assert!(now.contains("--dport 99"), "{now}");
        } else {
            let code = if there { 13 } else { 12 };
            for (refused, word) in [(refusal(before), "-save"), (refusal(set), "-restore")] {
                assert_eq!(
                    (refused.0, refused.1.contains(word)),
                    (code, true),
                    "{refused:?}"
                );
            }
        }
    }
    Ok(())
}
