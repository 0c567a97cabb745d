// SPDX-License-Identifier: Apache-2.0
//! GetIPTables and SetIPTables, by iptables' own programs where the guest image has them.

use protocols::agent::agent::SetIPTablesRequest;

use crate::error::{AgentError, Result};
use crate::reaper::Reaper;
use crate::tool;

/// Another program may hold the tables: seconds to wait for it.
const WAIT: [&str; 2] = ["--wait", "10"];

/// The tables, as iptables-save writes them.
///
/// # Errors
///
/// UNIMPLEMENTED where the image has no iptables; the program's own.
pub(super) async fn get(reaper: &Reaper, is_ipv6: bool) -> Result<Vec<u8>> {
    let name = program(is_ipv6, "save");
    let path = tool::find(&name).ok_or_else(|| missing(&name))?;
    tool::run(reaper, &path, &[], b"").await
}

/// Replaces the tables that `request` has, all of each or none.
///
/// # Errors
///
/// As those of [`get`].
pub(super) async fn set(reaper: &Reaper, request: &SetIPTablesRequest) -> Result<Vec<u8>> {
    let name = program(request.is_ipv6, "restore");
    let path = tool::find(&name).ok_or_else(|| missing(&name))?;
    tool::run(reaper, &path, &WAIT, &request.data).await
}

fn program(is_ipv6: bool, what: &str) -> String {
    let family = if is_ipv6 { "ip6tables" } else { "iptables" };
    format!("{family}-{what}")
}

fn missing(name: &str) -> AgentError {
    AgentError::unsupported(format!("not implemented: the guest image has no {name}"))
}
