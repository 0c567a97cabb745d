// SPDX-License-Identifier: Apache-2.0
//! The OCI runtime specification: read strictly, amended for life in a guest, and converted to
//! the agent's protocol.

mod amend;
mod convert;
mod model;

use protobuf::well_known_types::any::Any;
use protocols::agent::oci;
use serde::de::DeserializeOwned;

pub(crate) use amend::{Amended, Bind, Place, Pod, amend, amend_process};
pub(crate) use model::{Hook, HugepageLimit, Mount, Process, Resources, Spec};

use crate::error::{Context, Kind, Result, ShimError};

/// Reads a bundle's `config.json`.
pub(crate) fn read(text: &[u8]) -> Result<Spec> {
    serde_json::from_slice(text).context(Kind::InvalidArgument, || "config.json".to_owned())
}

/// Reads a part of the specification that containerd passes as JSON in an `Any`.
pub(crate) fn read_any<T: DeserializeOwned>(any: Option<&Any>, what: &str) -> Result<T> {
    let any =
        any.ok_or_else(|| ShimError::new(Kind::InvalidArgument, format!("{what}: missing")))?;
    serde_json::from_slice(&any.value).context(Kind::InvalidArgument, || what.to_owned())
}

/// Resources for a running container, and the CPUs of the host that it may run on, if they say.
pub(crate) fn resources(mut resources: Resources) -> Result<(oci::LinuxResources, String)> {
    let cpus = amend::take_cpus(&mut resources)?;
    Ok((resources.into(), cpus))
}

#[cfg(test)]
mod tests;
