// SPDX-License-Identifier: Apache-2.0
//! A container that needs more memory than it may have.

use anyhow::{Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{GetOOMEventRequest, RemoveContainerRequest};
use protocols::agent::oci;

use crate::client::call;
use crate::host::Host;
use crate::spec;

const ID: &str = "hungry";
const LIMIT: i64 = 32 << 20;

/// It alone is killed, and the event names it.
pub(crate) async fn one_container(host: &Host) -> Result<()> {
    let agent = host.client.agent.clone();
    let event = tokio::spawn(async move {
        call!(agent, get_oom_event, GetOOMEventRequest {}).map(|event| event.container_id)
    });
    // It keeps what has no line's end.
    let root = host.rootfs("passthrough/hungry/rootfs")?;
    let mut spec = spec::of(&root, &["tail", "/dev/zero"]);
    let linux = spec.Linux.mut_or_insert_default();
    linux.Resources.mut_or_insert_default().Memory = MessageField::some(oci::LinuxMemory {
        Limit: LIMIT,
        Swap: LIMIT,
        ..oci::LinuxMemory::default()
    });
    host.create(ID, spec).await?;
    host.start(ID).await?;
    let outcome = host.outcome(ID, "").await?;
    ensure!(outcome.status == 137, "{outcome:?}");
    let named = event.await??;
    ensure!(named == ID, "{named:?}");
    call!(
        host.client.agent,
        remove_container,
        RemoveContainerRequest { container_id: ID }
    )?;
    Ok(())
}
