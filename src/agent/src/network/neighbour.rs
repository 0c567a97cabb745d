// SPDX-License-Identifier: Apache-2.0
//! AddARPNeighbors: hardware addresses that need no asking.

use protocols::agent::types::ARPNeighbor;

use super::netlink::{CREATE, Message, Netlink, REPLACE};
use super::{address, index_of, interface};
use crate::error::{AgentError, Context as _, Result};

/// Adds neighbours, or replaces those of the same address.
///
/// # Errors
///
/// The first one that can't be understood or added.
pub(crate) fn add(neighbours: &[ARPNeighbor]) -> Result<()> {
    let netlink = super::open()?;
    let links = interface::links(&netlink)?;
    for neighbour in neighbours {
        let what = format!(
            "neighbour {} of {:?}",
            neighbour.toIPAddress.address, neighbour.device
        );
        let index = index_of(&links, &neighbour.device, &what)?;
        add_one(&netlink, index, neighbour)
            .map_err(|error| AgentError::new(error.kind(), format!("{what}: {}", error.line())))?;
    }
    Ok(())
}

fn add_one(netlink: &Netlink, index: u32, neighbour: &ARPNeighbor) -> Result<()> {
    let address = address::parse(&neighbour.toIPAddress.address)?;
    let number = |what: &str, value: i32| {
        u16::try_from(value).map_err(|_| AgentError::invalid(format!("{what} {value}")))
    };
    let state = match number("state", neighbour.state)? {
        0 => libc::NUD_PERMANENT,
        state => state,
    };
    let flags = u8::try_from(number("flags", neighbour.flags)?)
        .map_err(|_| AgentError::invalid(format!("flags {}", neighbour.flags)))?;
    // `struct ndmsg`
    let mut fixed = vec![address::family(address), 0, 0, 0];
    fixed.extend(index.to_ne_bytes());
    fixed.extend(state.to_ne_bytes());
    fixed.extend([flags, libc::RTN_UNICAST]);
    let mut message =
        Message::new(libc::RTM_NEWNEIGH, &fixed).with(libc::NDA_DST, &address::bytes(address));
    if !neighbour.lladdr.is_empty() {
        message = message.with(libc::NDA_LLADDR, &address::hardware(&neighbour.lladdr)?);
    }
    netlink
        .request(&message, CREATE | REPLACE)
        .context(|| "add")
}
