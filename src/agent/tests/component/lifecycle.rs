// SPDX-License-Identifier: Apache-2.0
//! From create to remove.

use anyhow::Result;
use protocols::agent::health::CheckRequest;

use crate::rig::{Outcome, Rig, ctx, process, refusal};

#[tokio::test]
async fn health_answers() -> Result<()> {
    let rig = Rig::bare().await?;
    let answer = rig.health.check(ctx(), &CheckRequest::default()).await?;
    assert_eq!(answer.status.value(), 1);
    let version = rig.health.version(ctx(), &CheckRequest::default()).await?;
    assert!(!version.agent_version.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_container_runs_and_reports() -> Result<()> {
    let rig = Rig::new().await?;
    let spec = rig.spec("a", &["sh", "-c", "echo out; echo err >&2; exit 42"])?;
    let outcome = rig.run("a", spec).await?;
    let expected = Outcome {
        stdout: "out\n".to_owned(),
        stderr: "err\n".to_owned(),
        status: 42,
    };
    assert_eq!(outcome, expected);
    Ok(())
}

#[tokio::test]
async fn a_missing_program_is_known_at_create() -> Result<()> {
    let rig = Rig::new().await?;
    let (code, line) = refusal(rig.create("a", rig.spec("a", &["no-such"])?).await);
    assert_eq!(
        (code, line.as_str()),
        (3, "exec: \"no-such\": executable file not found in $PATH")
    );
    // Nothing is left: the name is free again.
    assert_eq!(rig.run("a", rig.spec("a", &["true"])?).await?.status, 0);
    Ok(())
}

#[tokio::test]
async fn an_exec_has_streams_and_a_status_of_its_own() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "100"])?).await?;
    rig.start("a").await?;
    rig.exec("a", "e", process(&["sh", "-c", "cat; exit 3"]))
        .await?;
    assert_eq!(rig.write("a", "e", b"hello").await?, 5);
    rig.close_stdin("a", "e").await?;
    let outcome = rig.outcome("a", "e").await?;
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("hello", 3));
    let (code, _) = refusal(rig.wait("a", "e").await);
    assert_eq!(code, 5);
    rig.signal("a", "", 9).await?;
    assert_eq!(rig.wait("a", "").await?, 137);
    rig.remove("a").await?;
    let (code, _) = refusal(rig.start("a").await);
    assert_eq!(code, 5);
    Ok(())
}
