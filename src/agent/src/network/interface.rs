// SPDX-License-Identifier: Apache-2.0
//! UpdateInterface and ListInterfaces.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use protobuf::EnumOrUnknown;
use protocols::agent::types::{IPAddress, IPFamily, Interface};
use tracing::warn;

use super::address::{self, Network};
use super::netlink::{CREATE, Message, Netlink, REPLACE, number};
use crate::error::{AgentError, Context as _, Result};
use crate::kernel_events::KernelEvents;
use crate::pci;

/// `struct ifinfomsg`: family, type, index, flags, change mask.
const LINK: usize = 16;
/// `struct ifaddrmsg`: family, prefix length, flags, scope, index.
const ADDRESS: usize = 8;
/// Flags of interfaces that are set here.
const UP: u32 = libc::IFF_UP.cast_unsigned();
const NO_ARP: u32 = libc::IFF_NOARP.cast_unsigned();

/// An interface of the guest.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    hardware: Vec<u8>,
    mtu: u32,
    flags: u32,
}

#[cfg(any(test, fuzzing))]
impl Link {
    /// One that is only a name.
    pub(super) fn named(name: &str) -> Self {
        Self {
            index: 1,
            name: name.to_owned(),
            hardware: Vec::new(),
            mtu: 0,
            flags: 0,
        }
    }
}

/// What the runtime asks for, checked.
#[derive(Debug)]
struct Wanted {
    place: Place,
    name: String,
    mtu: Option<u32>,
    no_arp: bool,
    addresses: Vec<Network>,
}

/// How an interface is found.
#[derive(Debug)]
enum Place {
    Hardware(Vec<u8>),
    Pci(pci::Path),
}

/// UpdateInterface: finds the interface, for which it waits until `patience` is over, and gives it
/// its name, size and addresses.
///
/// # Errors
///
/// What can't be understood, an interface that does not appear, or the kernel's reason.
pub(crate) async fn update(wanted: &Interface, patience: Duration) -> Result<Interface> {
    let named = |error: AgentError| {
        let line = format!("interface {:?}: {}", wanted.name, error.line());
        AgentError::new(error.kind(), line)
    };
    let request = Wanted::new(wanted).map_err(named)?;
    let link = appeared(&request.place, patience).await.map_err(named)?;
    let netlink = super::open()?;
    configure(&netlink, &link, &request).map_err(named)?;
    let now = links(&netlink)?
        .into_iter()
        .find(|now| now.index == link.index)
        .ok_or_else(|| named(AgentError::internal("disappeared")))?;
    describe(&netlink, &now)
}

/// ListInterfaces.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn list() -> Result<Vec<Interface>> {
    let netlink = super::open()?;
    links(&netlink)?
        .iter()
        .map(|link| describe(&netlink, link))
        .collect()
}

impl Wanted {
    fn new(interface: &Interface) -> Result<Self> {
        let name = &interface.name;
        let plain = |letter: char| letter.is_ascii_graphic() && !"/:".contains(letter);
        if name.is_empty() || name.len() > 15 || !name.chars().all(plain) || name.starts_with('.') {
            return Err(AgentError::invalid(
                "the name is none that an interface can have",
            ));
        }
        let place = match (interface.hwAddr.as_str(), interface.devicePath.as_str()) {
            ("", "") => {
                return Err(AgentError::invalid(
                    "neither hwAddr nor devicePath is given",
                ));
            }
            ("", path) => Place::Pci(pci::Path::parse(path)?),
            (hardware, _) => Place::Hardware(address::hardware(hardware)?),
        };
        let mtu = u32::try_from(interface.mtu)
            .map_err(|_| AgentError::invalid(format!("mtu {}", interface.mtu)))?;
        Ok(Self {
            place,
            name: name.clone(),
            mtu: Some(mtu).filter(|mtu| *mtu > 0),
            no_arp: interface.raw_flags & NO_ARP != 0,
            addresses: interface
                .IPAddresses
                .iter()
                .map(|address| Network::new(&address.address, &address.mask))
                .collect::<Result<_>>()?,
        })
    }
}

/// A plugged device becomes an interface in the kernel's own time, and the kernel tells.
async fn appeared(place: &Place, patience: Duration) -> Result<Link> {
    let events = KernelEvents::of_links()?;
    let netlink = super::open()?;
    let look = || Ok(place.find(links(&netlink)?));
    events.until(patience, look).await?.ok_or_else(|| {
        AgentError::not_found(format!(
            "no device with {} appeared within {} s",
            place.words(),
            patience.as_secs()
        ))
    })
}

impl Place {
    fn find(&self, links: Vec<Link>) -> Option<Link> {
        let fits: Box<dyn Fn(&Link) -> bool> = match self {
            Self::Hardware(hardware) => Box::new(move |link| link.hardware == *hardware),
            Self::Pci(path) => {
                let name = path.net_device()?;
                Box::new(move |link| link.name == name)
            }
        };
        links.into_iter().find(fits)
    }

    fn words(&self) -> String {
        match self {
            Self::Hardware(hardware) => {
                format!("hardware address {}", address::hardware_text(hardware))
            }
            Self::Pci(path) => format!("PCI path {path}"),
        }
    }
}

fn configure(netlink: &Netlink, link: &Link, wanted: &Wanted) -> Result<()> {
    if link.name != wanted.name {
        rename(netlink, link, &wanted.name)?;
    }
    trust_addresses(&wanted.name);
    if let Some(mtu) = wanted.mtu.filter(|mtu| *mtu != link.mtu) {
        let message = change(link.index, 0, 0).with(libc::IFLA_MTU, &mtu.to_ne_bytes());
        netlink
            .request(&message, 0)
            .context(|| format!("set MTU {mtu}"))?;
    }
    let flags = UP | if wanted.no_arp { NO_ARP } else { 0 };
    netlink
        .request(&change(link.index, flags, UP | NO_ARP), 0)
        .context(|| "set up")?;
    replace_addresses(netlink, link.index, &wanted.addresses)
}

/// Renames an interface. One that has the name already takes the old one in exchange.
fn rename(netlink: &Netlink, link: &Link, name: &str) -> Result<()> {
    let give = |index: u32, name: &str| {
        // Not all kernels rename what is up.
        netlink
            .request(&change(index, 0, UP), 0)
            .context(|| format!("set down for its name {name:?}"))?;
        let message = change(index, 0, 0).with(libc::IFLA_IFNAME, &terminated(name));
        netlink
            .request(&message, 0)
            .context(|| format!("give the name {name:?}"))
    };
    let other = links(netlink)?.into_iter().find(|other| other.name == name);
    let Some(other) = other else {
        return give(link.index, name);
    };
    give(other.index, &format!("moved{}", other.index))?;
    give(link.index, name)?;
    give(other.index, &link.name)?;
    if other.flags & UP != 0 {
        netlink
            .request(&change(other.index, UP, UP), 0)
            .context(|| format!("set {:?} up again", link.name))?;
    }
    Ok(())
}

/// Turns the look for duplicates off for addresses that the kernel gives by itself. Those that are
/// asked for carry a flag of their own.
fn trust_addresses(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/accept_dad");
    match fs::write(&path, "0") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(path, %error, "IPv6 addresses work only after a second");
        }
        // Without IPv6 there is nothing to turn off.
        _ => {}
    }
}

fn replace_addresses(netlink: &Netlink, index: u32, wanted: &[Network]) -> Result<()> {
    let keep: HashSet<Network> = wanted.iter().copied().collect();
    for message in addresses_of(netlink, index)? {
        let Some(network) = network(&message) else {
            continue;
        };
        // Without its link-local address IPv6 does not work at all.
        if keep.contains(&network) || is_link_local(network.address) {
            continue;
        }
        match netlink.request(&message.with_kind(libc::RTM_DELADDR), 0) {
            // The kernel takes secondary addresses away with their primary one.
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            other => other.context(|| format!("delete address {network}"))?,
        }
    }
    for network in wanted {
        netlink
            .request(&new_address(index, network), CREATE | REPLACE)
            .context(|| format!("add address {network}"))?;
    }
    Ok(())
}

fn new_address(index: u32, network: &Network) -> Message {
    let address = address::bytes(network.address);
    let mut fixed = vec![address::family(network.address), network.prefix, 0, 0];
    // An address of the link is one that others on it can reach, no further.
    if is_link_local(network.address) {
        fixed = vec![
            address::family(network.address),
            network.prefix,
            0,
            libc::RT_SCOPE_LINK,
        ];
    }
    fixed.extend(index.to_ne_bytes());
    let mut message = Message::new(libc::RTM_NEWADDR, &fixed)
        .with(libc::IFA_LOCAL, &address)
        .with(libc::IFA_ADDRESS, &address);
    if let Some(broadcast) = network.broadcast() {
        message = message.with(libc::IFA_BROADCAST, &broadcast.octets());
    }
    if network.address.is_ipv6() {
        message = message.with(libc::IFA_FLAGS, &libc::IFA_F_NODAD.to_ne_bytes());
    }
    message
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// A change of an interface; flags outside of `mask` stay.
fn change(index: u32, flags: u32, mask: u32) -> Message {
    let mut fixed = [0; 4].to_vec();
    for number in [index, flags, mask] {
        fixed.extend(number.to_ne_bytes());
    }
    Message::new(libc::RTM_NEWLINK, &fixed)
}

fn terminated(name: &str) -> Vec<u8> {
    name.bytes().chain([0]).collect()
}

/// All interfaces.
pub(super) fn links(netlink: &Netlink) -> Result<Vec<Link>> {
    let messages = netlink
        .list(&Message::new(libc::RTM_GETLINK, &[0; LINK]))
        .context(|| "list interfaces")?;
    Ok(messages.iter().filter_map(link).collect())
}

fn link(message: &Message) -> Option<Link> {
    let name = message.attribute(LINK, libc::IFLA_IFNAME)?;
    Some(Link {
        index: message.number(4),
        name: String::from_utf8_lossy(name)
            .trim_end_matches('\0')
            .to_owned(),
        hardware: message
            .attribute(LINK, libc::IFLA_ADDRESS)
            .unwrap_or_default()
            .to_vec(),
        mtu: message
            .attribute(LINK, libc::IFLA_MTU)
            .and_then(number)
            .unwrap_or(0),
        flags: message.number(8),
    })
}

/// A message of the kernel's as an interface and as an address.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(kind: u16, body: &[u8]) {
    let message = Message::received(kind, body);
    let _ = link(&message);
    let _ = network(&message);
}

/// A request that is checked, with nothing done.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz_request(interface: &Interface) {
    let _ = Wanted::new(interface).map(|wanted| wanted.place.words());
}

fn addresses_of(netlink: &Netlink, index: u32) -> Result<Vec<Message>> {
    let mut messages = netlink
        .list(&Message::new(libc::RTM_GETADDR, &[0; ADDRESS]))
        .context(|| "list addresses")?;
    messages.retain(|message| message.number(4) == index);
    Ok(messages)
}

/// On a link between two ends, `IFA_ADDRESS` is the other one.
fn network(message: &Message) -> Option<Network> {
    let address = message
        .attribute(ADDRESS, libc::IFA_LOCAL)
        .or_else(|| message.attribute(ADDRESS, libc::IFA_ADDRESS))?;
    Some(Network {
        address: address::from_bytes(address)?,
        prefix: message.byte(1),
    })
}

fn describe(netlink: &Netlink, link: &Link) -> Result<Interface> {
    let addresses = addresses_of(netlink, link.index)?;
    let addresses = addresses
        .iter()
        .filter_map(network)
        .map(|network| IPAddress {
            family: EnumOrUnknown::new(family(network.address)),
            address: network.address.to_string(),
            mask: network.prefix.to_string(),
            ..IPAddress::default()
        });
    Ok(Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        IPAddresses: addresses.collect(),
        mtu: link.mtu.into(),
        hwAddr: address::hardware_text(&link.hardware),
        raw_flags: link.flags,
        ..Interface::default()
    })
}

pub(super) fn family(address: IpAddr) -> IPFamily {
    match address {
        IpAddr::V4(_) => IPFamily::v4,
        IpAddr::V6(_) => IPFamily::v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str) -> Interface {
        Interface {
            name: name.to_owned(),
            hwAddr: "02:00:00:00:00:01".to_owned(),
            ..Interface::default()
        }
    }

    #[test]
    fn names_that_no_interface_has_are_refused() {
        for wrong in [
            "",
            ".",
            "..",
            "a b",
            "a/b",
            "a:1",
            "sixteen-letters-",
            "a\nb",
        ] {
            Wanted::new(&interface(wrong)).unwrap_err();
        }
        for right in ["eth0", "net1", "veth@if3", "fifteen-letters", "eth0.100"] {
            Wanted::new(&interface(right)).unwrap();
        }
    }

    #[test]
    fn an_interface_needs_a_way_to_be_found() {
        let mut wanted = interface("eth0");
        wanted.hwAddr = String::new();
        let line = Wanted::new(&wanted).unwrap_err().line();
        assert!(line.contains("hwAddr"), "{line}");
        wanted.devicePath = "02/03".to_owned();
        let wanted = Wanted::new(&wanted).unwrap();
        assert_eq!(wanted.place.words(), "PCI path 02/03");
    }
}
