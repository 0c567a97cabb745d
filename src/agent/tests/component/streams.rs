// SPDX-License-Identifier: Apache-2.0
//! Standard streams, terminals, signals, pause.

use std::time::Duration;

use anyhow::Result;
use protobuf::MessageField;
use protocols::agent::agent::{PauseContainerRequest, ResumeContainerRequest, TtyWinResizeRequest};
use protocols::agent::oci;
use tokio::time::{sleep, timeout};

use crate::rig::{Rig, ctx, eventually, process, refusal};

#[tokio::test]
async fn ten_mebibytes_come_back_byte_for_byte() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["cat"])?).await?;
    rig.start("a").await?;
    let data: Vec<u8> = (0..10_u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let send = async {
        for chunk in data.chunks(1 << 20) {
            rig.write("a", "", chunk).await?;
        }
        // No data is the end.
        rig.write("a", "", &[]).await
    };
    let (_, back) = tokio::try_join!(send, rig.read_all("a", "", false))?;
    assert!(back == data);
    assert_eq!(rig.wait("a", "").await?, 0);
    Ok(())
}

#[tokio::test]
async fn output_can_be_read_after_the_status_was_taken() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "100"])?).await?;
    rig.start("a").await?;
    rig.exec("a", "e", process(&["sh", "-c", "echo late; echo err >&2"]))
        .await?;
    assert_eq!(rig.wait("a", "e").await?, 0);
    let (code, _) = refusal(rig.wait("a", "e").await);
    assert_eq!(code, 5);
    assert_eq!(rig.read_all("a", "e", false).await?, b"late\n");
    assert_eq!(rig.read_all("a", "e", true).await?, b"err\n");
    // Both ends were seen, so the process is forgotten; that is a task of its own.
    eventually("the process is gone", async || {
        Ok(rig.read_once("a", "e", false).await.is_err())
    })
    .await?;
    let (code, _) = refusal(rig.read_once("a", "e", false).await);
    assert_eq!(code, 5);
    Ok(())
}

#[tokio::test]
async fn a_background_child_does_not_hold_an_exec() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "100"])?).await?;
    rig.start("a").await?;
    rig.exec(
        "a",
        "e",
        process(&["sh", "-c", "sleep 1000 & echo started"]),
    )
    .await?;
    // Long before the child ends.
    let outcome = timeout(Duration::from_secs(60), rig.outcome("a", "e")).await??;
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("started\n", 0));
    Ok(())
}

#[tokio::test]
async fn a_terminal_has_a_size_and_controls_its_session() -> Result<()> {
    let rig = Rig::new().await?;
    let script = "tty; stty size; test -t 0 && test -t 2 && echo all; ls -l /dev/console | \
                  cut -c1; read line; stty size; echo got $line";
    let mut spec = rig.spec("a", &["sh", "-c", script])?;
    let process = spec.Process.as_mut().unwrap();
    process.Terminal = true;
    process.ConsoleSize = MessageField::some(oci::Box {
        Height: 30,
        Width: 100,
        ..oci::Box::default()
    });
    rig.create("a", spec).await?;
    rig.start("a").await?;
    let mut text = String::new();
    while !text.contains("\nc\r") && !text.contains("-\r") {
        let data = rig.read_once("a", "", false).await?;
        assert!(!data.is_empty(), "{text}");
        text.push_str(&String::from_utf8(data)?);
    }
    let resize = TtyWinResizeRequest {
        container_id: "a".to_owned(),
        row: 50,
        column: 132,
        ..TtyWinResizeRequest::default()
    };
    rig.agent.tty_win_resize(ctx(), &resize).await?;
    rig.write("a", "", b"hello\n").await?;
    text.push_str(&String::from_utf8(rig.read_all("a", "", false).await?)?);
    assert_eq!(
        text,
        "/dev/pts/0\r\n30 100\r\nall\r\nc\r\nhello\r\n50 132\r\ngot hello\r\n"
    );
    assert_eq!(rig.wait("a", "").await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_exec_may_have_a_terminal_too() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "100"])?).await?;
    rig.start("a").await?;
    let mut process = process(&["sh", "-c", "tty; ps -o tty= | head -1"]);
    process.Terminal = true;
    rig.exec("a", "e", process).await?;
    let outcome = rig.outcome("a", "e").await?;
    assert!(outcome.stdout.starts_with("/dev/pts/0\r\n"), "{outcome:?}");
    let resize = TtyWinResizeRequest {
        container_id: "a".to_owned(),
        ..TtyWinResizeRequest::default()
    };
    let (code, _) = refusal(rig.agent.tty_win_resize(ctx(), &resize).await);
    assert_eq!(code, 14);
    Ok(())
}

#[tokio::test]
async fn a_terminal_that_is_closed_for_a_while_goes_on() -> Result<()> {
    let rig = Rig::new().await?;
    let script = |console: &str| {
        format!(
            "exec </dev/null >/dev/null 2>&1; sleep 1; echo hello >{console}; sleep 1; \
             echo again >{console}"
        )
    };
    let console = script("/dev/console");
    let mut spec = rig.spec("a", &["sh", "-c", &format!("{console}; sleep 100")])?;
    spec.Process.as_mut().unwrap().Terminal = true;
    rig.create("a", spec).await?;
    rig.start("a").await?;
    let mut text = Vec::new();
    while text != b"hello\r\nagain\r\n" {
        let data = rig.read_once("a", "", false).await?;
        assert!(!data.is_empty(), "{text:?}");
        text.extend(data);
    }
    let mut process = process(&["sh", "-c", &script("/dev/tty")]);
    process.Terminal = true;
    rig.exec("a", "e", process).await?;
    let outcome = rig.outcome("a", "e").await?;
    assert_eq!(outcome.stdout, "hello\r\nagain\r\n");
    Ok(())
}

#[tokio::test]
async fn signals_reach_whom_they_are_meant_for() -> Result<()> {
    let rig = Rig::new().await?;
    let script = "trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    rig.create("a", rig.spec("a", &["sh", "-c", script])?)
        .await?;
    rig.start("a").await?;
    assert_eq!(rig.read_once("a", "", false).await?, b"ready\n");
    let (code, _) = refusal(rig.signal("a", "", 99).await);
    assert_eq!(code, 3);
    rig.exec("a", "e", process(&["sleep", "100"])).await?;
    rig.signal("a", "e", 10).await?;
    assert_eq!(rig.wait("a", "e").await?, 138);
    rig.signal("a", "", 15).await?;
    assert_eq!(rig.outcome("a", "").await?.stdout, "term\n");
    Ok(())
}

#[tokio::test]
async fn sigterm_ends_an_init_without_a_handler() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "100"])?).await?;
    rig.start("a").await?;
    rig.exec("a", "e", process(&["sleep", "100"])).await?;
    rig.signal("a", "", 15).await?;
    assert_eq!(rig.wait("a", "").await?, 137);
    // The kernel ends the others of a pid namespace with the first.
    assert_eq!(rig.wait("a", "e").await?, 137);
    Ok(())
}

#[tokio::test]
async fn sigkill_without_an_exec_id_means_all() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create(
        "a",
        rig.spec("a", &["sh", "-c", "trap '' TERM; sleep 100 & wait"])?,
    )
    .await?;
    rig.start("a").await?;
    rig.exec("a", "e", process(&["sleep", "100"])).await?;
    rig.signal("a", "", 9).await?;
    assert_eq!(rig.wait("a", "").await?, 137);
    assert_eq!(rig.wait("a", "e").await?, 137);
    // Once more is no error.
    rig.signal("a", "", 9).await?;
    Ok(())
}

#[tokio::test]
async fn pause_stops_and_resume_continues() -> Result<()> {
    let rig = Rig::new().await?;
    let script = "while :; do echo x; sleep 0.02; done";
    rig.create("a", rig.spec("a", &["sh", "-c", script])?)
        .await?;
    rig.start("a").await?;
    let pause = PauseContainerRequest {
        container_id: "a".to_owned(),
        ..PauseContainerRequest::default()
    };
    rig.read_once("a", "", false).await?;
    rig.agent.pause_container(ctx(), &pause).await?;
    let (code, line) = refusal(rig.exec("a", "e", process(&["true"])).await);
    assert!(code == 9 && line.contains("paused"), "{line}");
    // What was written before, perhaps nothing, and then silence.
    let read = async { while rig.read_once("a", "", false).await.is_ok() {} };
    assert!(timeout(Duration::from_millis(300), read).await.is_err());
    let processor_time = async || rig.processor_time("a").await;
    let before = processor_time().await?;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(processor_time().await?, before);
    let resume = ResumeContainerRequest {
        container_id: "a".to_owned(),
        ..ResumeContainerRequest::default()
    };
    rig.agent.resume_container(ctx(), &resume).await?;
    timeout(Duration::from_secs(60), rig.read_once("a", "", false)).await??;
    rig.remove("a").await?;
    Ok(())
}

#[tokio::test]
async fn stats_count_what_was_used() -> Result<()> {
    let rig = Rig::new().await?;
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 100";
    rig.create("a", rig.spec("a", &["sh", "-c", script])?)
        .await?;
    rig.start("a").await?;
    assert_eq!(rig.read_once("a", "", false).await?, b"done\n");
    let usage = rig.processor_time("a").await?;
    assert!(usage > 1_000_000, "{usage} ns");
    Ok(())
}

#[tokio::test]
async fn a_name_can_be_taken_once() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "100"])?).await?;
    let (code, _) = refusal(rig.create("a", rig.spec("b", &["true"])?).await);
    assert_eq!(code, 6);
    let (code, _) = refusal(rig.exec("a", "e", process(&["true"])).await);
    assert_eq!(code, 9);
    rig.start("a").await?;
    let (code, _) = refusal(rig.start("a").await);
    assert_eq!(code, 9);
    rig.exec("a", "e", process(&["sleep", "100"])).await?;
    let (code, _) = refusal(rig.exec("a", "e", process(&["true"])).await);
    assert_eq!(code, 6);
    rig.remove("a").await?;
    rig.create("a", rig.spec("c", &["true"])?).await?;
    rig.remove("a").await?;
    Ok(())
}

#[tokio::test]
async fn a_hundred_execs_at_once_and_one_by_one_leave_nothing() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "1000"])?).await?;
    rig.start("a").await?;
    let one = async |number: u32| -> Result<()> {
        let id = format!("e{number}");
        rig.exec("a", &id, process(&["sh", "-c", "echo $$; exit 7"]))
            .await?;
        let outcome = rig.outcome("a", &id).await?;
        assert_eq!(outcome.status, 7);
        Ok(())
    };
    let state = || -> Result<(usize, usize)> {
        let pid = rig.pid()?;
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        Ok((descriptors, children.split_whitespace().count()))
    };
    let all = async |range: std::ops::Range<u32>| -> Result<()> {
        let mut running = Vec::new();
        for number in range {
            running.push(one(number));
        }
        for result in futures_util::future::join_all(running).await {
            result?;
        }
        Ok(())
    };
    one(0).await?;
    let before = state()?;
    all(1..101).await?;
    for number in 101..201 {
        one(number).await?;
    }
    eventually("nothing is left", async || {
        let (descriptors, children) = state()?;
        Ok(descriptors <= before.0 && children <= before.1)
    })
    .await
}
