// SPDX-License-Identifier: Apache-2.0
//! What operators and storage drivers may ask of a running sandbox, beside what containerd asks:
//! HTTP on a Unix socket in the sandbox's folder, under Kata's name and paths.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `POST /direct-volume/stats` | `{"volume_path"}` | what the volume's file system holds, as CSI has it |
//! | `POST /direct-volume/resize` | `{"volume_path", "size"}` | nothing |
//!
//! A volume that the sandbox does not have is status 404: who looks for one asks the next sandbox.

mod client;
mod http;

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use protocols::agent::csi::VolumeStatsResponse;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use tokio::{select, spawn};
use tracing::{debug, info, warn};

pub(crate) use self::client::{resize as resize_volume, stats as volume_stats};
use self::http::Request;
use crate::error::{Context, Kind, Result, ShimError};
use crate::sandbox::Sandbox;

const STATS: &str = "/direct-volume/stats";
const RESIZE: &str = "/direct-volume/resize";

/// How long a client may take for a request, and for reading its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Before the next try where no connection can be taken: there are too many open files, say.
const PAUSE: Duration = Duration::from_millis(100);

/// Which volume, and how large it is to be where that is asked.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Volume {
    volume_path: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
}

/// The socket, before anybody is served.
#[derive(Debug)]
pub(crate) struct Listener(UnixListener);

impl Listener {
    /// Listens; must be called in the runtime.
    pub(crate) fn bind(path: &Path) -> Result<Self> {
        let bind = || {
            let listener = StdListener::bind(path)?;
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener).map(Self)
        };
        bind().internal(|| format!("listen at {}", path.display()))
    }

    /// Serves the sandbox until its machine ends.
    pub(crate) async fn serve(self, sandbox: Arc<Sandbox>) {
        let ended = Arc::clone(&sandbox);
        select! {
            _ = ended.ended() => {}
            () = self.accept(sandbox) => {}
        }
    }

    async fn accept(self, sandbox: Arc<Sandbox>) {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => {
                    let sandbox = Arc::clone(&sandbox);
                    spawn(async move {
                        if let Err(error) = converse(stream, &sandbox).await {
                            debug!(%error, "a client of the sandbox's socket left");
                        }
                    });
                }
                Err(error) => {
                    debug!(%error, "no connection taken");
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

/// One request and its answer.
async fn converse(mut stream: UnixStream, sandbox: &Sandbox) -> io::Result<()> {
    let request = timeout(PATIENCE, Request::read(&mut stream)).await??;
    let answer = match request {
        Ok(request) => answer(&request, sandbox).await,
        Err(reason) => Err(ShimError::new(Kind::InvalidArgument, reason)),
    };
    let (status, body) = match answer {
        Ok(body) => (200, body),
        Err(error) => (status(error.kind()), error.chain()),
    };
    timeout(PATIENCE, http::answer(&mut stream, status, &body)).await?
}

async fn answer(request: &Request, sandbox: &Sandbox) -> Result<String> {
    let volume = || {
        serde_json::from_slice::<Volume>(&request.body)
            .context(Kind::InvalidArgument, || request.path.clone())
    };
    match (request.method.as_str(), request.path.as_str()) {
        ("POST", STATS) => {
            let stats = sandbox.volume_stats(&volume()?.volume_path).await?;
            Ok(in_csi_words(&stats).to_string())
        }
        ("POST", RESIZE) => {
            let Volume { volume_path, size } = volume()?;
            let size = size.ok_or_else(|| {
                ShimError::new(Kind::InvalidArgument, "size: missing from the request")
            })?;
            let resized = sandbox.resize_volume(&volume_path, size).await;
            let volume = volume_path.display();
            match &resized {
                Ok(()) => info!(%volume, size, "volume resized"),
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => warn!(%volume, size, error = error.chain(), "volume not resized"),
            }
            resized.map(|()| String::new())
        }
        (method, path) => Err(ShimError::new(
            Kind::NotFound,
            format!("there is no {method} {path}"),
        )),
    }
}

/// As CSI's own messages are written in JSON by Kata: a unit is its number.
fn in_csi_words(stats: &VolumeStatsResponse) -> Value {
    let usage = stats.usage.iter().map(|usage| {
        json!({
            "available": usage.available,
            "total": usage.total,
            "used": usage.used,
            "unit": usage.unit.value(),
        })
    });
    let mut words = json!({ "usage": usage.collect::<Vec<_>>() });
    if let (Some(condition), Some(words)) = (stats.volume_condition.as_ref(), words.as_object_mut())
    {
        let condition = json!({ "abnormal": condition.abnormal, "message": condition.message });
        words.insert("volume_condition".to_owned(), condition);
    }
    words
}

/// The status of an error, and the error of a status.
const STATUSES: [(Kind, u16); 7] = [
    (Kind::InvalidArgument, 400),
    (Kind::NotFound, 404),
    (Kind::FailedPrecondition, 409),
    (Kind::Internal, 500),
    (Kind::Unimplemented, 501),
    (Kind::Unavailable, 503),
    (Kind::DeadlineExceeded, 504),
];

fn status(kind: Kind) -> u16 {
    let found = STATUSES.iter().find(|(other, _)| *other == kind);
    found.map_or(500, |(_, status)| *status)
}

fn kind(status: u16) -> Kind {
    let found = STATUSES.iter().find(|(_, other)| *other == status);
    found.map_or(Kind::Internal, |(kind, _)| *kind)
}

#[cfg(test)]
mod tests {
    use protobuf::EnumOrUnknown;
    use protocols::agent::csi::{VolumeUsage, volume_usage::Unit};

    use super::*;

    #[test]
    fn statistics_are_in_csi_s_words() {
        let usage = VolumeUsage {
            available: 1,
            total: 3,
            used: 2,
            unit: EnumOrUnknown::new(Unit::INODES),
            ..VolumeUsage::default()
        };
        let stats = VolumeStatsResponse {
            usage: vec![usage],
            ..VolumeStatsResponse::default()
        };
        let words = r#"{"usage":[{"available":1,"total":3,"unit":2,"used":2}]}"#;
        assert_eq!(in_csi_words(&stats).to_string(), words);
    }

    #[test]
    fn a_kind_of_error_comes_through_as_a_status() {
        for (known, _) in STATUSES {
            assert_eq!(kind(status(known)), known);
        }
        assert_eq!(kind(418), Kind::Internal);
    }
}
