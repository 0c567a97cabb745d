// SPDX-License-Identifier: Apache-2.0
//! What containers of a pod have together.

use anyhow::Result;

use crate::rig::{Rig, eventually, process};

/// The pid namespace that `id` is in, and what its process 1 is called.
async fn pids(rig: &Rig, id: &str) -> Result<(String, String)> {
    let exec = format!("{id}-look");
    let script = "readlink /proc/self/ns/pid; cat /proc/1/comm";
    rig.exec(id, &exec, process(&["sh", "-c", script])).await?;
    let outcome = rig.outcome(id, &exec).await?;
    let mut lines = outcome.stdout.lines().map(str::to_owned);
    Ok((lines.next().unwrap(), lines.next().unwrap()))
}

#[tokio::test]
async fn a_pod_may_share_its_pids_without_a_pause_container() -> Result<()> {
    let rig = Rig::new().await?;
    for name in ["a", "b"] {
        let spec = rig.spec(name, &["sleep", "1000"])?;
        rig.create_sharing(name, spec).await?;
        rig.start(name).await?;
    }
    rig.create("c", rig.spec("c", &["sleep", "1000"])?).await?;
    rig.start("c").await?;
    let (a, b, c) = (
        pids(&rig, "a").await?,
        pids(&rig, "b").await?,
        pids(&rig, "c").await?,
    );
    assert_eq!(a.1, "pause");
    assert_eq!(a, b);
    assert_eq!(c.1, "sleep");
    assert_ne!(a.0, c.0);

    // A container ends without the others, and is made anew among them.
    rig.signal("a", "", 9).await?;
    assert_eq!(rig.wait("a", "").await?, 137);
    rig.remove("a").await?;
    std::fs::remove_dir_all(rig.share("a"))?;
    let spec = rig.spec("a", &["sh", "-c", "ps | grep -c '[s]leep 1000'"])?;
    rig.create_sharing("a", spec).await?;
    rig.start("a").await?;
    assert_eq!(rig.outcome("a", "").await?.stdout, "1\n");
    Ok(())
}

/// Kata's runtimes take the pid namespace out of each specification.
#[tokio::test]
async fn a_container_of_a_pod_never_sees_the_agents_pids() -> Result<()> {
    let rig = Rig::new().await?;
    let mut spec = rig.spec("a", &["sleep", "1000"])?;
    let linux = spec.Linux.as_mut().unwrap();
    linux.Namespaces.retain(|namespace| namespace.Type != "pid");
    rig.create("a", spec).await?;
    rig.start("a").await?;
    assert_eq!(pids(&rig, "a").await?.1, "sleep");
    Ok(())
}

#[tokio::test]
async fn the_agents_own_first_process_reaps_and_has_no_rights() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create_sharing("a", rig.spec("a", &["sleep", "1000"])?)
        .await?;
    rig.start("a").await?;
    let script = "grep -E '^(Uid|Cap(Prm|Bnd)|NoNewPrivs|SigIgn)' /proc/1/status; \
                  cat /proc/1/oom_score_adj; (sleep 0 &); true";
    rig.exec("a", "e", process(&["sh", "-c", script])).await?;
    assert_eq!(
        rig.outcome("a", "e").await?.stdout,
        "Uid:\t65535\t65535\t65535\t65535\nSigIgn:\t0000000000010000\n\
         CapPrm:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n-998\n"
    );
    // The orphan's parent is gone; nobody but process 1 can have waited for it.
    eventually("no zombies", async || {
        let script = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null; true";
        rig.exec("a", "z", process(&["sh", "-c", script])).await?;
        Ok(rig.outcome("a", "z").await?.stdout.is_empty())
    })
    .await
}

#[tokio::test]
async fn a_pause_container_is_the_first_of_its_pod() -> Result<()> {
    let rig = Rig::new().await?;
    let mut pause = rig.spec("pause", &["sleep", "1000"])?;
    pause.Annotations.insert(
        "io.kubernetes.cri.container-type".to_owned(),
        "sandbox".to_owned(),
    );
    rig.create_sharing("pause", pause).await?;
    rig.start("pause").await?;
    rig.create_sharing("a", rig.spec("a", &["cat"])?).await?;
    rig.start("a").await?;
    let (pause, a) = (pids(&rig, "pause").await?, pids(&rig, "a").await?);
    assert_eq!(pause.1, "sleep");
    assert_eq!(pause, a);
    Ok(())
}
