// SPDX-License-Identifier: Apache-2.0
//! A client of the agent's services whose requests are noted on their way, and what a refusal must be.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::os::unix::net;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_trait::async_trait;
use protobuf::Message as _;
use protocols::agent::agent_ttrpc::{AgentService, AgentServiceClient, create_agent_service};
use protocols::agent::health_ttrpc::{Health, HealthClient, create_health};
use tests::machine::PATIENCE;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy};
use tokio::net::UnixStream;
use ttrpc::asynchronous::Client as Connection;
use ttrpc::context::{Context, with_timeout};
use ttrpc::proto::Request;

use crate::host::Host;

/// A frame of ttrpc begins with length, stream (both in big endian), type and flags.
const HEADER: usize = 10;
const REQUEST: u8 = 1;

/// Codes of gRPC's that the agent answers with.
pub(crate) const INVALID: i32 = 3;
pub(crate) const NOT_FOUND: i32 = 5;
pub(crate) const EXISTS: i32 = 6;
pub(crate) const WRONG_STATE: i32 = 9;
pub(crate) const UNIMPLEMENTED: i32 = 12;
pub(crate) const INTERNAL: i32 = 13;
pub(crate) const UNAVAILABLE: i32 = 14;

/// Calls a method with fields of its request; the others have their defaults.
macro_rules! call {
    ($client:expr, $method:ident, $request:ident { $($field:ident: $value:expr),* $(,)? }) => {
        $client
            .$method(
                crate::client::limit(),
                &$request { $($field: $value.into(),)* ..$request::default() },
            )
            .await
    };
}
pub(crate) use call;

/// How long a call may take, on a slow machine.
pub(crate) fn limit() -> Context {
    let nanoseconds = i64::try_from(PATIENCE.as_nanos());
    with_timeout(nanoseconds.unwrap_or(i64::MAX))
}

/// A call must have been refused by this code, in words with `word` in them.
pub(crate) fn refused<T: Debug>(code: i32, word: &str, result: ttrpc::Result<T>) -> Result<()> {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => {
            let is = (status.code.value(), status.message);
            ensure!(
                is.0 == code && is.1.contains(word),
                "not {code} and {word:?}: {is:?}"
            );
            Ok(())
        }
        other => bail!("not refused ({word:?}): {other:?}"),
    }
}

/// Clients on one connection, and which methods went over it, as `SERVICE/METHOD`.
pub(crate) struct Client {
    pub(crate) agent: AgentServiceClient,
    pub(crate) health: HealthClient,
    driven: Arc<Mutex<BTreeSet<String>>>,
}

impl Client {
    /// Speaks to the server at the other end of `stream`.
    pub(crate) fn new(stream: net::UnixStream) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let server = UnixStream::from_std(stream)?;
        let (client, middle) = UnixStream::pair()?;
        let driven = Arc::default();
        tokio::spawn(note(middle, server, Arc::clone(&driven)));
        let connection = Connection::new(client.into());
        Ok(Self {
            agent: AgentServiceClient::new(connection.clone()),
            health: HealthClient::new(connection),
            driven,
        })
    }

    /// Methods of the services' descriptors that were not called.
    pub(crate) fn not_driven(&self) -> Result<Vec<String>> {
        let described = described();
        ensure!(described.len() == 44, "{} methods", described.len());
        let driven = self.driven.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(described.difference(&driven).cloned().collect())
    }
}

/// Hands all on from the one to the other, and notes what is called. It ends with either.
async fn note(
    client: UnixStream,
    server: UnixStream,
    driven: Arc<Mutex<BTreeSet<String>>>,
) -> Result<()> {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::spawn(async move { copy(&mut from_server, &mut to_client).await });
    loop {
        let mut header = [0; HEADER];
        from_client.read_exact(&mut header).await?;
        let [a, b, c, d, _, _, _, _, kind, _] = header;
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d]))?;
        let mut body = vec![0; length];
        from_client.read_exact(&mut body).await?;
        if kind == REQUEST {
            let request = Request::parse_from_bytes(&body)?;
            let name = format!("{}/{}", request.service, request.method);
            let mut driven = driven.lock().unwrap_or_else(PoisonError::into_inner);
            driven.insert(name);
        }
        to_server.write_all(&header).await?;
        to_server.write_all(&body).await?;
    }
}

/// For the names of the methods only.
struct Nobody;

#[async_trait]
impl AgentService for Nobody {}

#[async_trait]
impl Health for Nobody {}

/// All methods of the services' descriptors.
fn described() -> BTreeSet<String> {
    let mut services = HashMap::new();
    services.extend(create_agent_service(Arc::new(Nobody)));
    services.extend(create_health(Arc::new(Nobody)));
    let methods = services.iter().flat_map(|(service, handlers)| {
        let methods = handlers.methods.keys();
        methods.map(move |method| {
            let name = method.rsplit('/').next().unwrap_or(method);
            format!("{service}/{name}")
        })
    });
    methods.collect()
}

/// The last scenario: none of the services' methods may be left.
pub(crate) async fn every_method_was_driven(host: &Host) -> Result<()> {
    let missing = host.client.not_driven()?;
    ensure!(missing.is_empty(), "not driven: {missing:?}");
    Ok(())
}

/// Asks until `check` holds.
pub(crate) async fn eventually(
    what: &str,
    mut check: impl AsyncFnMut() -> Result<bool>,
) -> Result<()> {
    let asked = async {
        while !check().await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, asked)
        .await
        .with_context(|| format!("never: {what}"))?
}
