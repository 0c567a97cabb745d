// SPDX-License-Identifier: Apache-2.0
//! The pod's network: the interfaces of its network namespace, carried into the guest.
//!
//! The guest has the namespace's interfaces: names, hardware addresses, addresses, routes,
//! neighbours, MTU. Each stays where it is and is joined to a tap beside it, whose files go to the
//! monitor: all that comes in at the interface goes to the guest, all that the guest sends leaves
//! by the interface. Nobody else is in the namespace: neither the shim nor the monitor.
//!
//! Whatever changes in the namespace is followed: a scan is compared with what the guest has, and
//! the difference is applied. So an interface that comes after the machine has booted is nothing
//! special, and neither is one that goes.
//!
//! Everything that is made is in the journal before it is there, by the namespace's identity and
//! the interface's number and name. Numbers are chosen here, at random, so that they are known.

mod counters;
mod guest;
mod loopback;
mod namespace;
mod netlink;
mod scan;
mod settings;
mod tap;
mod tc;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use protocols::agent::agent::ARPNeighbors;
use protocols::agent::types;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use vmm::control::RateLimits;

pub(crate) use self::counters::{Counters, counters};
pub(crate) use self::loopback::Loopback;
pub(crate) use self::namespace::Namespace;
use self::namespace::NamespaceId;
use self::netlink::{Changes, Socket};
use self::scan::{Interface, State};
pub(crate) use self::settings::{Model, Settings};
use crate::error::{Context, Kind, Result, ShimError};
use crate::sandbox::journal::{Journal, Object};

/// Where a sandbox's network is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the namespace that somebody has made for it.
    At(PathBuf),
    /// In one of its own, which somebody may wire later.
    New,
}

/// An interface of the host, for the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Link {
    namespace: NamespaceId,
    index: u32,
    name: String,
}

/// A network device for the machine, with its open files.
#[derive(Debug)]
pub(crate) struct Device {
    /// Its name in the monitor.
    pub(crate) id: String,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: Option<u16>,
    /// An open tap a queue pair.
    pub(crate) queues: Vec<OwnedFd>,
    /// The same for the kernel's packet mover; empty without.
    pub(crate) vhost: Vec<OwnedFd>,
    pub(crate) receive: RateLimits,
    pub(crate) transmit: RateLimits,
}

/// What has to be done to the machine for the guest to have what the namespace has.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Devices to take from the machine.
    pub(crate) detach: Vec<String>,
    /// Devices to give to the machine.
    pub(crate) attach: Vec<Device>,
    /// Why some interfaces can't be joined; each is told once.
    pub(crate) failures: Vec<ShimError>,
}

/// What the agent is told of a network.
#[derive(Debug, Default)]
pub(crate) struct GuestNetwork {
    /// Those that are new or have changed.
    pub(crate) interfaces: Vec<types::Interface>,
    /// All of them, if any has changed.
    pub(crate) routes: Option<Vec<types::Route>>,
    /// All of them, if any has changed.
    pub(crate) neighbours: Option<ARPNeighbors>,
}

/// An interface that the guest has.
#[derive(Debug)]
struct Endpoint {
    interface: Interface,
    /// The device's name, which is the tap's.
    id: String,
    tap: u32,
    /// Set once the interface may be redirected: whether the qdisc for that was made, too.
    redirect: Option<bool>,
}

/// A namespace that is carried into a guest.
#[derive(Debug)]
pub(crate) struct Network {
    namespace: Arc<Namespace>,
    settings: Settings,
    socket: Socket,
    changes: Changes,
    endpoints: Vec<Endpoint>,
    /// What is joined; `None` before the first look.
    joined: Option<State>,
    /// What of it the guest was told.
    told: State,
    /// Number of the next tap.
    next: u32,
}

impl Network {
    /// Looks into the namespace; makes nothing in it.
    pub(crate) fn new(place: &Place, settings: Settings) -> Result<Self> {
        let namespace = match place {
            Place::At(path) => Namespace::open(path)?,
            Place::New => Namespace::create()?,
        };
        let sockets = namespace.run(|| Ok((Socket::open()?, Changes::open()?)));
        let (socket, changes) = sockets
            .and_then(|sockets: io::Result<_>| sockets)
            .internal(|| "open a netlink socket".to_owned())?;
        Ok(Self {
            namespace: Arc::new(namespace),
            settings,
            socket,
            changes,
            endpoints: Vec::new(),
            joined: None,
            told: State::default(),
            next: 0,
        })
    }

    pub(crate) fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }

    /// Listens on the loopback interface of the namespace.
    pub(crate) fn loopback(&self) -> io::Result<Loopback> {
        Loopback::listen(&self.namespace)
    }

    /// Becomes readable when there is something to follow.
    pub(crate) fn changes(&self) -> io::Result<OwnedFd> {
        self.changes.as_fd().try_clone_to_owned()
    }

    /// Joins what is new in the namespace, and parts from what is gone. An interface that can't be
    /// joined is left as it is.
    pub(crate) fn follow(&mut self, journal: &mut Journal) -> Result<Plan> {
        let mut plan = Plan::default();
        // Asked before the scan, so that what changes meanwhile is found the next time.
        let changed = self
            .changes
            .drain()
            .internal(|| "hear of changes".to_owned())?;
        if self.joined.is_some() && !changed {
            return Ok(plan);
        }
        let mut state = scan::scan(&mut self.socket)?;
        let joined = self.joined.take().unwrap_or_default();
        let refused = state.refused.difference(&joined.refused);
        let error = |reason: &String| ShimError::new(Kind::FailedPrecondition, reason.clone());
        plan.failures = refused.map(error).collect();
        let stays = |endpoint: &Endpoint| {
            let known = &endpoint.interface;
            let mut interfaces = state.interfaces.iter();
            interfaces.any(|it| (it.index, it.mac) == (known.index, known.mac))
        };
        let (kept, gone): (Vec<_>, Vec<_>) = self.endpoints.drain(..).partition(stays);
        self.endpoints = kept;
        for endpoint in gone {
            info!(interface = endpoint.interface.name, "parted");
            self.part(&endpoint);
            plan.detach.push(endpoint.id);
        }
        for interface in state.interfaces.clone() {
            match self.update(&interface, journal) {
                Ok(device) => plan.attach.extend(device),
                Err(error) => {
                    state.without(interface.index);
                    plan.failures.push(error);
                }
            }
        }
        self.joined = Some(state);
        Ok(plan)
    }

    /// Undoes what was made for a device that the machine has not taken.
    pub(crate) fn reject(&mut self, device: &Device) {
        let Some(position) = self.endpoints.iter().position(|it| it.id == device.id) else {
            return;
        };
        let endpoint = self.endpoints.remove(position);
        self.part(&endpoint);
        if let Some(joined) = &mut self.joined {
            joined.without(endpoint.interface.index);
        }
    }

    /// What the agent is to be told.
    pub(crate) fn news(&self) -> GuestNetwork {
        let joined = self.joined.as_ref();
        joined.map_or_else(GuestNetwork::default, |it| difference(&self.told, it))
    }

    /// The agent was told.
    pub(crate) fn told(&mut self) {
        self.told = self.joined.clone().unwrap_or_default();
    }

    /// Joins an interface that is new; otherwise what has changed of it is its tap's, too.
    fn update(&mut self, interface: &Interface, journal: &mut Journal) -> Result<Option<Device>> {
        let known = self
            .endpoints
            .iter_mut()
            .find(|it| it.interface.index == interface.index);
        let Some(endpoint) = known else {
            let device = self.join(interface, journal)?;
            info!(
                interface = interface.name,
                kind = interface.kind,
                mtu = interface.mtu,
                tap = device.id,
                "joined"
            );
            return Ok(Some(device));
        };
        if endpoint.interface.mtu != interface.mtu {
            tap::set_mtu(&mut self.socket, endpoint.tap, interface.mtu)
                .internal(|| format!("set the MTU of {}", endpoint.id))?;
        }
        endpoint.interface = interface.clone();
        Ok(None)
    }

    fn join(&mut self, interface: &Interface, journal: &mut Journal) -> Result<Device> {
        let id = format!("tap{}_kata", self.next);
        self.next = self.next.wrapping_add(1);
        let endpoint = Endpoint {
            interface: interface.clone(),
            id: id.clone(),
            tap: random_index()?,
            redirect: None,
        };
        journal.record(Object::Link(Link {
            namespace: self.namespace.id().clone(),
            index: endpoint.tap,
            name: id.clone(),
        }))?;
        self.endpoints.push(endpoint);
        let joined = match self.settings.model {
            Model::Macvtap => self.join_by_macvtap(),
            _ => self.join_by_filter(journal),
        };
        let queues = match joined {
            Ok(queues) => queues,
            Err(error) => {
                if let Some(endpoint) = self.endpoints.pop() {
                    self.part(&endpoint);
                }
                return Err(error);
            }
        };
        let vhost = if self.settings.vhost && !self.settings.limited() {
            tap::open_vhost(queues.len()).unwrap_or_else(|error| {
                info!(interface = interface.name, %error, "the monitor moves the packets");
                Vec::new()
            })
        } else {
            Vec::new()
        };
        Ok(Device {
            id,
            mac: interface.mac,
            mtu: u16::try_from(interface.mtu).ok(),
            queues,
            vhost,
            receive: self.settings.receive,
            transmit: self.settings.transmit,
        })
    }

    /// Joins the last endpoint; its tap's files.
    fn join_by_filter(&mut self, journal: &mut Journal) -> Result<Vec<OwnedFd>> {
        let Some(endpoint) = self.endpoints.last_mut() else {
            return Ok(Vec::new());
        };
        let (tap, name) = (endpoint.tap, endpoint.id.clone());
        let interface = endpoint.interface.clone();
        let queues = self.settings.queues;
        let files = self
            .namespace
            .run(|| tap::create(&name, tap, queues))
            .and_then(|files| files)
            .map_err(|error| in_use(error, &name))
            .context(Kind::FailedPrecondition, || {
                format!(
                    "make the tap {name} for network interface {}",
                    interface.name
                )
            })?;
        let socket = &mut self.socket;
        let mut wire = || {
            let qdisc = !tc::has_ingress(socket, interface.index)?;
            if !qdisc && tc::has_redirect(socket, interface.index)? {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            // Written down as it will be before it is.
            journal
                .record(Object::Redirect {
                    link: Link {
                        namespace: self.namespace.id().clone(),
                        index: interface.index,
                        name: interface.name.clone(),
                    },
                    qdisc,
                })
                .map_err(io::Error::other)?;
            endpoint.redirect = Some(qdisc);
            tap::set_up(socket, tap, interface.mtu)?;
            tc::add_ingress(socket, tap)?;
            if qdisc {
                tc::add_ingress(socket, interface.index)?;
            }
            tc::add_redirect(socket, tap, interface.index)?;
            tc::add_redirect(socket, interface.index, tap)
        };
        wire()
            .map_err(|error| in_use(error, &interface.name))
            .context(Kind::FailedPrecondition, || {
                format!("redirect network interface {} to {name}", interface.name)
            })?;
        Ok(files)
    }

    /// Joins the last endpoint; its tap's files.
    fn join_by_macvtap(&mut self) -> Result<Vec<OwnedFd>> {
        let Some(endpoint) = self.endpoints.last() else {
            return Ok(Vec::new());
        };
        let interface = &endpoint.interface;
        let (tap, name) = (endpoint.tap, endpoint.id.as_str());
        let queues = self.settings.queues;
        let socket = &mut self.socket;
        tap::create_macvtap(socket, name, tap, interface.index, interface.mac)
            .and_then(|()| tap::set_up(socket, tap, interface.mtu))
            .and_then(|()| {
                self.namespace
                    .run(|| tap::open_macvtap(name, tap, queues))?
            })
            .map_err(|error| in_use(error, &interface.name))
            .context(Kind::FailedPrecondition, || {
                format!(
                    "make the macvtap {name} on network interface {} (kind {:?})",
                    interface.name, interface.kind
                )
            })
    }

    /// Removes what an endpoint has on the host, so that its interface is as it was. What can't be
    /// removed stays in the journal.
    fn part(&mut self, endpoint: &Endpoint) {
        let interface = &endpoint.interface;
        if let Some(qdisc) = endpoint.redirect
            && let Err(error) =
                unredirect(&mut self.socket, interface.index, &interface.name, qdisc)
        {
            warn!(interface = interface.name, %error, "still redirected");
        }
        if let Err(error) = tap::remove(&mut self.socket, endpoint.tap, &endpoint.id) {
            warn!(tap = endpoint.id, %error, "not removed");
        }
    }
}

/// Takes an interface away that was made for a sandbox, wherever it is now.
pub(crate) fn remove_link(link: &Link) -> io::Result<()> {
    match link.namespace.find()? {
        Some(namespace) => {
            let mut socket = namespace.run(Socket::open)??;
            tap::remove(&mut socket, link.index, &link.name)
        }
        // A namespace's interfaces end with it.
        None => Ok(()),
    }
}

/// Takes the redirection from an interface.
pub(crate) fn remove_redirect(link: &Link, qdisc: bool) -> io::Result<()> {
    match link.namespace.find()? {
        Some(namespace) => {
            let mut socket = namespace.run(Socket::open)??;
            unredirect(&mut socket, link.index, &link.name, qdisc)
        }
        None => Ok(()),
    }
}

fn unredirect(socket: &mut Socket, index: u32, name: &str, qdisc: bool) -> io::Result<()> {
    if !tap::exists(socket, index, name)? {
        return Ok(());
    }
    let removed = if qdisc {
        tc::remove_ingress(socket, index)
    } else {
        tc::remove_redirect(socket, index)
    };
    match removed {
        // It was not made yet, or the qdisc was taken away with all that is in it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        other => other,
    }
}

/// What the kernel says when another sandbox has the namespace.
fn in_use(error: io::Error, name: &str) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => io::Error::other(format!(
            "{name} is in use, by another sandbox in this namespace most likely: {error}"
        )),
        _ => error,
    }
}

/// From here on are the numbers of taps, of this sandbox or another: the kernel gives out small
/// ones.
const FIRST_TAP: u32 = 1 << 30;

/// A number that no interface has.
fn random_index() -> Result<u32> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes, GetRandomFlags::empty()).internal(|| "random number".to_owned())?;
    Ok(u32::from_ne_bytes(bytes) >> 2 | FIRST_TAP)
}

/// What to tell a guest that has `old`, so that it has `new`.
fn difference(old: &State, new: &State) -> GuestNetwork {
    let known = |interface: &&Interface| !old.interfaces.contains(interface);
    let interfaces: Vec<_> = new
        .interfaces
        .iter()
        .filter(known)
        .map(guest::interface)
        .collect();
    // A guest's routes go with the addresses they rest on.
    let touched = !interfaces.is_empty();
    GuestNetwork {
        routes: (touched || old.routes != new.routes).then(|| guest::routes(new)),
        neighbours: (touched || old.neighbours != new.neighbours)
            .then(|| guest::neighbours(new))
            .filter(|list| !list.ARPNeighbors.is_empty()),
        interfaces,
    }
}

#[cfg(test)]
mod tests;
