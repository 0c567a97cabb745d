// SPDX-License-Identifier: Apache-2.0
//! Many calls, and calls that go wrong: an error for each, and the agent lives as before.

use std::fs;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use protobuf::MessageField;
use protocols::agent::agent::{CreateContainerRequest, Storage};
use protocols::agent::oci;
use tokio::time::{sleep, timeout};

use crate::rig::{Rig, ctx, eventually, mount, process, refusal, texts};

/// What the agent holds of the machine.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    processes: usize,
    resident: usize,
}

impl Held {
    fn of(rig: &Rig) -> Result<Self> {
        let pid = rig.pid()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|text| text.trim().strip_suffix(" kB"));
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        Ok(Self {
            descriptors: rig.descriptors()?,
            processes: children.split_whitespace().count(),
            resident: resident.unwrap_or_default().parse()?,
        })
    }
}

async fn sleeper(rig: &Rig, id: &str) -> Result<()> {
    rig.create(id, rig.spec(id, &["sleep", "1000"])?).await?;
    Ok(rig.start(id).await?)
}

async fn exec(rig: &Rig, id: &str, number: usize) -> Result<()> {
    let exec_id = format!("exec-{number}");
    let code = number % 256;
    let script = format!("echo {number}; exit {code}");
    rig.exec(id, &exec_id, process(&["sh", "-c", &script]))
        .await?;
    let outcome = rig.outcome(id, &exec_id).await?;
    ensure!(
        outcome.stdout == format!("{number}\n") && outcome.status == code as i32,
        "{number}: {outcome:?}"
    );
    Ok(())
}

/// Nothing is left of a process but for a moment.
async fn settled(rig: &Rig, before: Held) -> Result<Held> {
    eventually("what execs took is given back", async || {
        let now = Held::of(rig)?;
        Ok(now.descriptors <= before.descriptors && now.processes <= before.processes)
    })
    .await?;
    Held::of(rig)
}

#[tokio::test]
async fn a_thousand_execs_leave_nothing_behind() -> Result<()> {
    let rig = Rig::new().await?;
    sleeper(&rig, "a").await?;
    exec(&rig, "a", 0).await?;
    let before = Held::of(&rig)?;
    let mut after_first = before;
    for number in 1..=1000 {
        exec(&rig, "a", number).await?;
        if number == 100 {
            after_first = settled(&rig, before).await?;
        }
    }
    let after_all = settled(&rig, before).await?;
    println!("before {before:?}, after 100 {after_first:?}, after 1000 {after_all:?}");
    // Memory comes in pages, and the allocator keeps some; 900 leaks of a kilobyte would be more.
    let grown = after_all.resident.saturating_sub(after_first.resident);
    assert!(grown < 512, "{grown} kB more than after the first hundred");
    Ok(())
}

#[tokio::test]
async fn a_hundred_execs_at_once_leave_nothing_behind() -> Result<()> {
    let rig = Rig::new().await?;
    sleeper(&rig, "a").await?;
    exec(&rig, "a", 0).await?;
    let before = Held::of(&rig)?;
    let mut residents = Vec::new();
    for round in 0..3 {
        let numbers = (1..=100).map(|number| round * 100 + number);
        try_join_all(numbers.map(|number| exec(&rig, "a", number))).await?;
        residents.push(settled(&rig, before).await?.resident);
    }
    println!("before {before:?}, resident after each hundred {residents:?}");
    // The first hundred set how much the allocator keeps.
    assert!(residents[2] < residents[0] + 1024, "{residents:?}");
    Ok(())
}

#[tokio::test]
async fn others_answer_while_a_create_waits() -> Result<()> {
    let rig = Rig::new().await?;
    sleeper(&rig, "a").await?;
    // A disk that never comes: the create waits its whole time.
    let missing = Storage {
        driver: "blk".to_owned(),
        source: "1f/1f".to_owned(),
        fstype: "ext4".to_owned(),
        mount_point: "/run/kata-containers/sandbox/storage/x".to_owned(),
        ..Storage::default()
    };
    let request = CreateContainerRequest {
        container_id: "b".to_owned(),
        OCI: MessageField::some(rig.spec("b", &["true"])?),
        storages: vec![missing],
        ..CreateContainerRequest::default()
    };
    let agent = rig.agent.clone();
    let blocked = tokio::spawn(async move { agent.create_container(ctx(), &request).await });
    sleep(Duration::from_millis(200)).await;
    let begin = Instant::now();
    rig.processor_time("a").await?;
    let (code, line) = refusal(rig.processor_time("b").await);
    assert_eq!((code, line.contains("being created")), (9, true), "{line}");
    let (code, _) = refusal(rig.create("b", rig.spec("b2", &["true"])?).await);
    assert_eq!(code, 6);
    rig.create("c", rig.spec("c", &["sleep", "1000"])?).await?;
    rig.start("c").await?;
    rig.signal("a", "", 9).await?;
    assert_eq!(rig.wait("a", "").await?, 137);
    assert!(!blocked.is_finished(), "after {:?}", begin.elapsed());
    // The agent's time for devices is ten seconds.
    let refused = timeout(Duration::from_secs(60), blocked).await??;
    let (code, line) = refusal(refused);
    assert_eq!((code, line.contains("1f/1f")), (5, true), "{line}");
    // Nothing of it stays.
    assert_eq!(rig.run("b", rig.spec("b3", &["true"])?).await?.status, 0);
    Ok(())
}

#[tokio::test]
async fn a_fork_bomb_ends_with_its_container() -> Result<()> {
    let rig = Rig::new().await?;
    let mut spec = rig.spec("bomb", &["sh", "-c", "f() { f | f & f; }; f"])?;
    spec.Linux
        .mut_or_insert_default()
        .Resources
        .mut_or_insert_default()
        .Pids = MessageField::some(oci::LinuxPids {
        Limit: 50,
        ..oci::LinuxPids::default()
    });
    rig.create("bomb", spec).await?;
    rig.start("bomb").await?;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.run("b", rig.spec("b", &["true"])?).await?.status, 0);
    // It may have ended by itself: a shell that can't fork does.
    let _ = rig.signal("bomb", "", 9).await;
    rig.wait("bomb", "").await?;
    Ok(rig.remove("bomb").await?)
}

#[tokio::test]
async fn a_full_tmpfs_is_an_error_of_that_call() -> Result<()> {
    let rig = Rig::new().await?;
    let storage = Storage {
        driver: "ephemeral".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: texts(&["size=64k"]),
        mount_point: "/run/kata-containers/sandbox/ephemeral/small".to_owned(),
        ..Storage::default()
    };
    let mut spec = rig.spec(
        "full",
        &[
            "sh",
            "-c",
            "yes > /data/x; df /data | tail -1 | grep -o 100%",
        ],
    )?;
    spec.Mounts
        .push(mount("/data", "bind", &storage.mount_point, &["rbind"]));
    let request = CreateContainerRequest {
        container_id: "full".to_owned(),
        OCI: MessageField::some(spec),
        storages: vec![storage],
        ..CreateContainerRequest::default()
    };
    rig.agent.create_container(ctx(), &request).await?;
    rig.start("full").await?;
    let outcome = rig.outcome("full", "").await?;
    assert_eq!(outcome.stdout, "100%\n", "{outcome:?}");
    assert!(outcome.stderr.contains("No space left"), "{outcome:?}");
    rig.remove("full").await?;
    Ok(())
}

#[tokio::test]
async fn sigterm_ends_a_first_process_without_a_handler_and_leaves_one_that_ignores_it()
-> Result<()> {
    let rig = Rig::new().await?;
    sleeper(&rig, "plain").await?;
    rig.signal("plain", "", 15).await?;
    assert_eq!(rig.wait("plain", "").await?, 137);
    let script = "trap '' TERM; echo ready; sleep 1000";
    rig.create("deaf", rig.spec("deaf", &["sh", "-c", script])?)
        .await?;
    rig.start("deaf").await?;
    assert_eq!(rig.read_once("deaf", "", false).await?, b"ready\n");
    rig.signal("deaf", "", 15).await?;
    // One wait all along: the agent would give an abandoned one the status, once.
    let mut waited = pin!(rig.wait("deaf", ""));
    let early = timeout(Duration::from_millis(500), waited.as_mut()).await;
    assert!(early.is_err(), "{early:?}");
    rig.signal("deaf", "", 9).await?;
    assert_eq!(waited.await?, 137);
    Ok(())
}
