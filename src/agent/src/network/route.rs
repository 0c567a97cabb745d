// SPDX-License-Identifier: Apache-2.0
//! UpdateRoutes and ListRoutes: the main table, without what the kernel puts there by itself.

use std::net::IpAddr;

use protobuf::EnumOrUnknown;
use protocols::agent::types::{IPFamily, Route};

use super::address::{self, Network, V4, V6};
use super::index_of;
use super::interface::{self, Link};
use super::netlink::{APPEND, CREATE, Message, Netlink, attributes, number};
use crate::error::{AgentError, Context as _, Result};

/// `struct rtmsg`: family, lengths of the prefixes, service, table, protocol, scope, type, flags.
const ROUTE: usize = 12;
const PROTOCOL: usize = 5;
/// `RTNH_F_ONLINK`: the gateway is on the link, whatever the addresses say. The other flags are
/// reports of the kernel.
const ON_LINK: u32 = 4;
/// `RTM_F_CLONED`: an entry of a cache.
const CLONED: u32 = 0x200;
/// `RTPROT_RA`: told by a router.
const BY_ROUTER: u8 = 9;
/// `RTAX_MTU`.
const METRIC_MTU: u16 = 2;

/// What the runtime asks for, checked.
#[derive(Debug)]
struct Wanted {
    words: String,
    family: u8,
    /// None is the default route.
    destination: Option<Network>,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    index: u32,
    scope: u8,
    flags: u32,
    mtu: u32,
    metric: u32,
}

/// UpdateRoutes: these routes and no others. The result is the table as it is then.
///
/// # Errors
///
/// What can't be understood, before anything is changed; the first route that can't be set.
pub(crate) fn update(routes: &[Route]) -> Result<Vec<Route>> {
    let netlink = super::open()?;
    let links = interface::links(&netlink)?;
    let mut wanted = routes
        .iter()
        .map(|route| Wanted::new(route, &links))
        .collect::<Result<Vec<_>>>()?;
    for message in table(&netlink)? {
        // Those of the kernel come and go with the addresses.
        if matches!(message.byte(PROTOCOL), libc::RTPROT_KERNEL | BY_ROUTER) {
            continue;
        }
        let words = words(&describe(&message, &links));
        match netlink.request(&message.with_kind(libc::RTM_DELROUTE), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            other => other.context(|| format!("delete {words}"))?,
        }
    }
    // A gateway must be reachable by a route that is there already.
    wanted.sort_by_key(|route| route.gateway.is_some());
    for route in &wanted {
        match netlink.request(&route.message(), CREATE | APPEND) {
            // The kernel has made the same one with an address.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => other.context(|| format!("add {}", route.words))?,
        }
    }
    list()
}

/// ListRoutes.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn list() -> Result<Vec<Route>> {
    let netlink = super::open()?;
    let links = interface::links(&netlink)?;
    let table = table(&netlink)?;
    Ok(table
        .iter()
        .map(|message| describe(message, &links))
        .collect())
}

impl Wanted {
    fn new(route: &Route, links: &[Link]) -> Result<Self> {
        let words = words(route);
        let named =
            |error: AgentError| AgentError::new(error.kind(), format!("{words}: {}", error.line()));
        let optional = |text: &str| match text {
            "" => Ok(None),
            text => address::parse(text).map(Some).map_err(named),
        };
        let destination = match route.dest.as_str() {
            "" | "default" => None,
            text => Some(Network::parse(text).map_err(named)?),
        };
        let gateway = optional(&route.gateway)?;
        let source = optional(&route.source)?;
        let mut families = [destination.map(|network| network.address), gateway, source]
            .into_iter()
            .flatten()
            .map(address::family);
        let family =
            families
                .next()
                .unwrap_or_else(|| match route.family.enum_value_or_default() {
                    IPFamily::v4 => V4,
                    IPFamily::v6 => V6,
                });
        if families.any(|other| other != family) {
            return Err(named(AgentError::invalid("addresses of two families")));
        }
        let scope = u8::try_from(route.scope)
            .map_err(|_| named(AgentError::invalid(format!("scope {}", route.scope))))?;
        Ok(Self {
            family,
            destination: destination.filter(|network| network.prefix > 0),
            gateway,
            source,
            index: index_of(links, &route.device, &words)?,
            scope,
            flags: route.flags & ON_LINK,
            mtu: route.mtu,
            metric: route.metric,
            words,
        })
    }

    fn message(&self) -> Message {
        let prefix = self.destination.map_or(0, |network| network.prefix);
        let mut fixed = vec![
            self.family,
            prefix,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_STATIC,
            self.scope,
            libc::RTN_UNICAST,
        ];
        fixed.extend(self.flags.to_ne_bytes());
        let mut message =
            Message::new(libc::RTM_NEWROUTE, &fixed).with(libc::RTA_OIF, &self.index.to_ne_bytes());
        let addresses = [
            (
                libc::RTA_DST,
                self.destination.map(|network| network.address),
            ),
            (libc::RTA_GATEWAY, self.gateway),
            (libc::RTA_PREFSRC, self.source),
        ];
        for (kind, address) in addresses {
            if let Some(address) = address {
                message = message.with(kind, &address::bytes(address));
            }
        }
        if self.metric > 0 {
            message = message.with(libc::RTA_PRIORITY, &self.metric.to_ne_bytes());
        }
        if self.mtu > 0 {
            let mut metrics = 8_u16.to_ne_bytes().to_vec();
            metrics.extend(METRIC_MTU.to_ne_bytes());
            metrics.extend(self.mtu.to_ne_bytes());
            message = message.with(libc::RTA_METRICS, &metrics);
        }
        message
    }
}

/// Unicast routes of the main table.
fn table(netlink: &Netlink) -> Result<Vec<Message>> {
    let mut found = Vec::new();
    for family in [V4, V6] {
        let mut fixed = [0; ROUTE];
        if let Some(first) = fixed.first_mut() {
            *first = family;
        }
        match netlink.list(&Message::new(libc::RTM_GETROUTE, &fixed)) {
            Ok(routes) => found.extend(routes),
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(AgentError::io("list routes", error)),
        }
    }
    found.retain(|message| {
        message.kind() == libc::RTM_NEWROUTE
            && message.byte(4) == libc::RT_TABLE_MAIN
            && message.byte(7) == libc::RTN_UNICAST
            && message.number(8) & CLONED == 0
    });
    Ok(found)
}

fn describe(message: &Message, links: &[Link]) -> Route {
    let address = |kind| {
        message
            .attribute(ROUTE, kind)
            .and_then(address::from_bytes)
            .map(|address| address.to_string())
            .unwrap_or_default()
    };
    let index = message.attribute(ROUTE, libc::RTA_OIF).and_then(number);
    let device = links.iter().find(|link| Some(link.index) == index);
    let metrics = message
        .attribute(ROUTE, libc::RTA_METRICS)
        .unwrap_or_default();
    let mtu = attributes(metrics)
        .find(|(kind, _)| *kind == METRIC_MTU)
        .and_then(|(_, value)| number(value));
    let metric = message
        .attribute(ROUTE, libc::RTA_PRIORITY)
        .and_then(number);
    let destination = address(libc::RTA_DST);
    Route {
        dest: match destination.as_str() {
            "" => String::new(),
            address => format!("{address}/{}", message.byte(1)),
        },
        gateway: address(libc::RTA_GATEWAY),
        device: device.map(|link| link.name.clone()).unwrap_or_default(),
        source: address(libc::RTA_PREFSRC),
        scope: message.byte(6).into(),
        family: EnumOrUnknown::new(match message.byte(0) {
            V6 => IPFamily::v6,
            _ => IPFamily::v4,
        }),
        flags: message.number(8),
        mtu: mtu.unwrap_or(0),
        metric: metric.unwrap_or(0),
        ..Route::default()
    }
}

/// A message of the kernel's as a route.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(kind: u16, body: &[u8]) {
    let _ = words(&describe(&Message::received(kind, body), &[]));
}

/// A request that is checked, and the message for it, which is not sent.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz_request(route: &Route) {
    let links = [Link::named("lo")];
    let _ = Wanted::new(route, &links).map(|wanted| wanted.message());
}

/// A route as `ip` writes it.
fn words(route: &Route) -> String {
    let destination = match route.dest.as_str() {
        "" => "default",
        text => text,
    };
    let mut words = format!("route {destination}");
    for (word, value) in [
        ("via", &route.gateway),
        ("dev", &route.device),
        ("src", &route.source),
    ] {
        if !value.is_empty() {
            words.push_str(&format!(" {word} {value}"));
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(dest: &str, gateway: &str) -> Route {
        Route {
            dest: dest.to_owned(),
            gateway: gateway.to_owned(),
            device: "nowhere".to_owned(),
            ..Route::default()
        }
    }

    fn refusal(route: &Route) -> String {
        Wanted::new(route, &[]).unwrap_err().line()
    }

    #[test]
    fn errors_are_said_in_the_words_of_ip() {
        assert_eq!(
            refusal(&route("", "10.0.0.1")),
            "route default via 10.0.0.1 dev nowhere: there is no interface \"nowhere\""
        );
        assert_eq!(
            refusal(&route("10.0.0.0/8", "fd00::1")),
            "route 10.0.0.0/8 via fd00::1 dev nowhere: addresses of two families"
        );
        assert_eq!(
            refusal(&route("10.0.0.0/99", "")),
            "route 10.0.0.0/99 dev nowhere: address \"10.0.0.0/99\""
        );
    }
}
