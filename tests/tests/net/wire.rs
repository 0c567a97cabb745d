// SPDX-License-Identifier: Apache-2.0
//! A machine on a wire: its taps, its addresses, and what the host says to it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tests::machine::{Cable, Machine, Setup};
use tests::netlink::Interface;
use tests::pattern::read_line;
use tests::sys;
use vmm::control::RateLimits;

/// TCP and UDP: gives back what it gets.
pub(crate) const ECHO: u16 = 7;
/// TCP: reads to the end and answers with a `Digest`.
pub(crate) const SINK: u16 = 9;
/// TCP: reads a length, 8 bytes in little endian, and sends that much of the pattern.
pub(crate) const SOURCE: u16 = 19;
/// vsock: lines that the guest carries out, each with one line as its answer.
pub(crate) const CONTROL: u32 = 100;

/// Far longer than anything here takes, even under emulation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) type Scenario = fn(&mut Wire) -> Result<()>;

/// A machine and what is asked of it, in this order.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    pub(crate) vcpus: u8,
    /// What it boots with; more may be plugged in.
    pub(crate) cards: &'static [Card],
    pub(crate) scenarios: &'static [&'static [(&'static str, Scenario)]],
}

/// A network card.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Card {
    /// The number of its network: the host is 10.0.NUMBER.1, the guest 10.0.NUMBER.2.
    pub(crate) number: u8,
    pub(crate) mtu: u16,
    pub(crate) queues: usize,
    pub(crate) vhost: bool,
    /// Bytes in a second to the guest and from it; 0 is no limit.
    pub(crate) receive: u64,
    pub(crate) transmit: u64,
}

impl Card {
    /// No network's.
    pub(crate) const PLAIN: Self = Self {
        number: 0,
        mtu: 1500,
        queues: 1,
        vhost: false,
        receive: 0,
        transmit: 0,
    };

    pub(crate) fn tap_name(self) -> String {
        format!("tap{}", self.number)
    }

    pub(crate) fn id(self) -> String {
        format!("card{}", self.number)
    }

    pub(crate) fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 0, self.number]
    }

    pub(crate) fn host(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, self.number, 1)
    }

    pub(crate) fn guest(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, self.number, 2)
    }

    /// A stream to a port of the guest.
    pub(crate) fn connect(self, port: u16) -> Result<TcpStream> {
        let address = SocketAddrV4::new(self.guest(), port).into();
        let stream = TcpStream::connect_timeout(&address, PATIENCE)
            .with_context(|| format!("connecting to {address}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Makes the tap, switched on, with an address; it goes with its descriptors.
    pub(crate) fn cable(self) -> Result<Cable> {
        let cable = self.cable_of_name(&self.tap_name())?;
        let tap = Interface::named(&self.tap_name())?;
        tap.up(Some(self.mtu))?;
        tap.add_address(self.host(), 24)?;
        Ok(cable)
    }

    /// The same with another name for the tap, which stays switched off.
    pub(crate) fn cable_of_name(self, name: &str) -> Result<Cable> {
        let taps = sys::open_tap(name, self.queues, libc::IFF_VNET_HDR)
            .with_context(|| format!("making {name}"))?;
        let mut vhost: Vec<OwnedFd> = Vec::new();
        while self.vhost && vhost.len() < self.queues {
            let device = OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/vhost-net");
            vhost.push(device.context("can't open /dev/vhost-net")?.into());
        }
        Ok(Cable {
            id: self.id(),
            mac: self.mac(),
            mtu: Some(self.mtu),
            taps,
            vhost,
            receive: limit(self.receive),
            transmit: limit(self.transmit),
        })
    }
}

fn limit(bytes: u64) -> RateLimits {
    let operations = 0;
    RateLimits { bytes, operations }
}

/// A booted machine.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) machine: Machine,
    /// The card that scenarios without a wish of their own use.
    pub(crate) card: Card,
}

impl Wire {
    /// Boots the machine; its interfaces are up.
    pub(crate) fn new(plan: &Plan, console: bool) -> Result<Self> {
        let nets = plan.cards.iter().map(|card| card.cable());
        let machine = Machine::start(Setup {
            console,
            vcpus: plan.vcpus,
            nets: nets.collect::<Result<_>>()?,
            ..Setup::default()
        })?;
        let card = plan.cards.first().copied().unwrap_or(Card::PLAIN);
        let wire = Self { machine, card };
        for (number, card) in plan.cards.iter().enumerate() {
            wire.tell(&format!("up eth{number} {}", card.guest()))?;
        }
        Ok(wire)
    }

    /// Has the guest carry out a line, and returns what it answers.
    pub(crate) fn tell(&self, line: &str) -> Result<String> {
        let mut stream = self.machine.connect(CONTROL)?;
        writeln!(stream, "{line}")?;
        let answer = read_line(&mut stream)?;
        match answer.trim_end().strip_prefix("ok ") {
            Some(answer) => Ok(answer.to_owned()),
            None if answer.trim() == "ok" => Ok(String::new()),
            None => bail!("the guest was told {line:?} and said {answer:?}"),
        }
    }

    /// A number that the guest's first interface has in this file.
    pub(crate) fn guest_counter(&self, name: &str) -> Result<u64> {
        let text = self.tell(&format!("read eth0 statistics/{name}"))?;
        text.parse().with_context(|| format!("{name} is {text:?}"))
    }
}

/// Packets and bytes of an interface of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) received: (u64, u64),
    pub(crate) sent: (u64, u64),
}

/// The host's counters of the card's tap: what it received is what the guest sent.
pub(crate) fn host_counters(card: Card) -> Result<Counters> {
    // Not in /sys: that shows the namespace in which it was mounted.
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    let name = format!("{}:", card.tap_name());
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(&name));
    let numbers: Vec<u64> = line
        .with_context(|| format!("no counters of {name}"))?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(numbers.len() == 16, "{numbers:?}");
    let number = |at: usize| numbers.get(at).copied().unwrap_or_default();
    Ok(Counters {
        received: (number(1), number(0)),
        sent: (number(9), number(8)),
    })
}
