// SPDX-License-Identifier: Apache-2.0
//! A bundle: the folder that containerd prepares for a container.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde::Deserialize;

use crate::cli::check_id;
use crate::error::{Context, Kind, Result, ShimError};

/// Annotations that say what a container is to its pod: containerd's and CRI-O's.
const CONTAINER_TYPE: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];
/// Annotations that name the pod's sandbox.
const SANDBOX_ID: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// The file of a bundle that holds the runtime handler's options.
pub(crate) const OPTIONS: &str = "runtime-options";

/// A bundle's folder.
#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    path: PathBuf,
}

/// The sandbox that a container belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Membership {
    /// The container has a sandbox of its own.
    Single(String),
    /// The container stands for a pod's sandbox: the "pause" container.
    Sandbox(String),
    /// The container comes into the pod of this name.
    Member(String),
}

impl Membership {
    pub(crate) fn id(&self) -> &str {
        match self {
            Self::Single(id) | Self::Sandbox(id) | Self::Member(id) => id,
        }
    }

    pub(crate) fn is_member(&self) -> bool {
        matches!(self, Self::Member(_))
    }
}

/// The part of the configuration that says where a container belongs.
#[derive(Default, Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

impl Bundle {
    /// The bundle at `path`, or in the working directory.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let path = std::path::absolute(path.unwrap_or_else(|| Path::new(".")))
            .context(Kind::InvalidArgument, || "bundle".to_owned())?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The text of the OCI configuration.
    pub(crate) fn configuration(&self) -> Result<Vec<u8>> {
        let path = self.path.join("config.json");
        fs::read(&path).context(Kind::InvalidArgument, || format!("read {}", path.display()))
    }

    /// Which sandbox the container `id` belongs to. A bundle without a configuration, as `delete`
    /// may find it, is a sandbox of its own.
    pub(crate) fn sandbox(&self, id: &str) -> Result<Membership> {
        let path = self.path.join("config.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Membership::Single(id.to_owned()));
            }
            Err(error) => return Err(error).internal(|| format!("read {}", path.display())),
        };
        membership(id, &text)
    }

    /// The options of the runtime handler that `start` has kept, if any.
    pub(crate) fn options(&self) -> Result<Option<Any>> {
        let path = self.path.join(OPTIONS);
        let context = || format!("read {}", path.display());
        match fs::read(&path) {
            Ok(bytes) => Any::parse_from_bytes(&bytes).internal(context).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).internal(context),
        }
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, bytes).internal(|| format!("write {}", path.display()))
    }
}

/// Reads the pod's annotations. The sandbox API of containerd leaves the configuration empty.
fn membership(id: &str, configuration: &[u8]) -> Result<Membership> {
    let annotations = serde_json::from_slice::<Option<Annotated>>(configuration)
        .context(Kind::InvalidArgument, || "config.json".to_owned())?
        .unwrap_or_default()
        .annotations
        .unwrap_or_default();
    let find = |names: [&str; 2]| names.iter().find_map(|&name| annotations.get(name));
    match (find(CONTAINER_TYPE).map(String::as_str), find(SANDBOX_ID)) {
        (Some("sandbox"), _) => Ok(Membership::Sandbox(id.to_owned())),
        (Some("container"), Some(sandbox)) if sandbox != id => {
            check_id("sandbox id", sandbox)?;
            Ok(Membership::Member(sandbox.clone()))
        }
        (Some("container"), _) => Err(ShimError::new(
            Kind::InvalidArgument,
            format!("config.json: container {id} of a pod names no sandbox"),
        )),
        (Some(other), _) => Err(ShimError::new(
            Kind::InvalidArgument,
            format!("config.json: container type {other:?}: wants sandbox or container"),
        )),
        (None, _) => Ok(Membership::Single(id.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_of_a_pod_joins_its_sandbox() {
        for (kind, sandbox) in [
            (
                "io.kubernetes.cri.container-type",
                "io.kubernetes.cri.sandbox-id",
            ),
            (
                "io.kubernetes.cri-o.ContainerType",
                "io.kubernetes.cri-o.SandboxID",
            ),
        ] {
            let text = |what: &str| {
                format!("{{\"annotations\":{{\"{kind}\":\"{what}\",\"{sandbox}\":\"pod\"}}}}")
            };
            assert_eq!(
                membership("c1", text("container").as_bytes()).unwrap(),
                Membership::Member("pod".to_owned())
            );
            assert_eq!(
                membership("pod", text("sandbox").as_bytes()).unwrap(),
                Membership::Sandbox("pod".to_owned())
            );
        }
    }

    #[test]
    fn others_are_their_own_sandbox() {
        for text in ["{}", "null", r#"{"annotations":null}"#] {
            assert_eq!(
                membership("t1", text.as_bytes()).unwrap(),
                Membership::Single("t1".to_owned())
            );
        }
    }

    #[test]
    fn a_member_without_a_pod_is_refused() {
        let text = br#"{"annotations":{"io.kubernetes.cri.container-type":"container"}}"#;
        assert!(membership("c1", text).is_err());
    }

    #[test]
    fn a_sandbox_name_is_never_a_path() {
        let text = br#"{"annotations":{"io.kubernetes.cri.container-type":"container",
            "io.kubernetes.cri.sandbox-id":"../../etc"}}"#;
        assert!(membership("c1", text).is_err());
    }
}
