// SPDX-License-Identifier: Apache-2.0
//! The pod's network as the guest sees it: interfaces, routes and neighbours, set as the runtime
//! found them in the pod's network namespace on the host. There everything was proven to work, so
//! it is copied: what exists in the guest and was not asked for goes, and addresses work at once,
//! without another look for duplicates (DAD).

mod address;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod interface;
mod neighbour;
mod netlink;
mod route;

pub(crate) use interface::{list as list_interfaces, update as update_interface};
pub(crate) use neighbour::add as add_neighbours;
pub(crate) use route::{list as list_routes, update as update_routes};

use crate::error::{AgentError, Context as _, Result};
use interface::Link;
use netlink::Netlink;

fn open() -> Result<Netlink> {
    Netlink::open().context(|| "open a netlink socket")
}

/// The number of the interface `name`, which `what` needs.
fn index_of(links: &[Link], name: &str, what: &str) -> Result<u32> {
    links
        .iter()
        .find(|link| link.name == name)
        .map(|link| link.index)
        .ok_or_else(|| AgentError::not_found(format!("{what}: there is no interface {name:?}")))
}
