// SPDX-License-Identifier: Apache-2.0
//! Addresses in the words of the protocol and in the bytes of the kernel.

use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::{AgentError, Result};

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Network {
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

impl Network {
    /// An address and a prefix length, such as "24".
    pub(super) fn new(address: &str, prefix: &str) -> Result<Self> {
        let wrong = || AgentError::invalid(format!("address \"{address}/{prefix}\""));
        let address = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().map_err(|_| wrong())?;
        if prefix > bits(address) {
            return Err(wrong());
        }
        Ok(Self { address, prefix })
    }

    /// A route's destination: `10.0.0.0/8`, or one address.
    pub(super) fn parse(text: &str) -> Result<Self> {
        match text.split_once('/') {
            Some((address, prefix)) => Self::new(address, prefix),
            None => {
                let address = parse(text)?;
                Ok(Self {
                    address,
                    prefix: bits(address),
                })
            }
        }
    }

    /// The address of all hosts of an IPv4 network that has one.
    pub(super) fn broadcast(&self) -> Option<Ipv4Addr> {
        let IpAddr::V4(address) = self.address else {
            return None;
        };
        if self.prefix > 30 {
            return None;
        }
        let hosts = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
        Some(Ipv4Addr::from_bits(address.to_bits() | hosts))
    }
}

impl Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

pub(super) fn parse(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| AgentError::invalid(format!("address {text:?}")))
}

pub(super) fn bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// `AF_INET` or `AF_INET6`.
pub(super) fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => V4,
        IpAddr::V6(_) => V6,
    }
}

pub(super) const V4: u8 = 2;
pub(super) const V6: u8 = 10;

pub(super) fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) fn from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(bytes).into());
    }
    let bytes = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(bytes).into())
}

/// Octets of a hardware address such as `02:00:ca:fe:00:01`.
pub(super) fn hardware(text: &str) -> Result<Vec<u8>> {
    let octet = |text: &str| {
        let digits = text.len() == 2 && !text.starts_with('+');
        u8::from_str_radix(text, 16).ok().filter(|_| digits)
    };
    text.split(':')
        .map(octet)
        .collect::<Option<_>>()
        .ok_or_else(|| AgentError::invalid(format!("hardware address {text:?}")))
}

pub(super) fn hardware_text(octets: &[u8]) -> String {
    let octets: Vec<String> = octets.iter().map(|octet| format!("{octet:02x}")).collect();
    octets.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let network = |text| Network::parse(text).map(|network| network.to_string());
        assert_eq!(network("10.0.0.0/8").unwrap(), "10.0.0.0/8");
        assert_eq!(network("10.0.0.1").unwrap(), "10.0.0.1/32");
        assert_eq!(network("fd00::/64").unwrap(), "fd00::/64");
        assert_eq!(network("fd00::1").unwrap(), "fd00::1/128");
        for wrong in [
            "",
            "10.0.0.0/33",
            "fd00::/129",
            "10.0.0/8",
            "10.0.0.0/",
            "x",
        ] {
            let line = network(wrong).unwrap_err().line();
            assert!(line.contains("address"), "{line}");
        }
    }

    #[test]
    fn broadcast_is_the_last_address() {
        let broadcast = |text| Network::parse(text).unwrap().broadcast();
        assert_eq!(broadcast("10.1.2.3/24"), Some(Ipv4Addr::new(10, 1, 2, 255)));
        assert_eq!(broadcast("10.1.2.3/0"), Some(Ipv4Addr::BROADCAST));
        assert_eq!(broadcast("10.1.2.3/31"), None);
        assert_eq!(broadcast("fd00::1/64"), None);
    }

    #[test]
    fn hardware_addresses() {
        let octets = hardware("02:00:CA:fe:00:01").unwrap();
        assert_eq!(octets, [2, 0, 0xca, 0xfe, 0, 1]);
        assert_eq!(hardware_text(&octets), "02:00:ca:fe:00:01");
        for wrong in ["", "0:1", "02-00", "02:00:", "02:00:+1"] {
            hardware(wrong).unwrap_err();
        }
    }

    #[test]
    fn bytes_of_both_families() {
        for text in ["10.0.0.1", "fd00::1"] {
            let address = parse(text).unwrap();
            assert_eq!(from_bytes(&bytes(address)), Some(address));
        }
        assert_eq!(from_bytes(&[1, 2, 3]), None);
    }
}
