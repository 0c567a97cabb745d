// SPDX-License-Identifier: Apache-2.0
//! Ports beside the service's: log, debug console, streams of processes.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use protobuf::MessageField;
use protocols::agent::agent::{CreateContainerRequest, ExecProcessRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixSocket, UnixStream};
use tokio::time::timeout;

use crate::rig::{Rig, ctx, eventually, process, refusal};

const LONG: Duration = Duration::from_secs(30);

/// Connects to `port` as the host does from its own port `from`.
async fn connect(rig: &Rig, port: u32, from: u32) -> Result<UnixStream> {
    let socket = UnixSocket::new_stream()?;
    socket.bind(rig.share(&format!("host_{from}")))?;
    let path = rig.share(&format!("agent.sock_{port}"));
    let stream = socket.connect(&path).await;
    stream.with_context(|| format!("connect to {}", path.display()))
}

async fn all(stream: &mut UnixStream) -> Result<String> {
    let mut text = String::new();
    timeout(LONG, stream.read_to_string(&mut text)).await??;
    Ok(text)
}

#[tokio::test]
async fn streams_of_processes_go_over_the_host_s_connections() -> Result<()> {
    let rig = Rig::new().await?;
    let mut stdin = connect(&rig, 1027, 5001).await?;
    let mut stdout = connect(&rig, 1027, 5002).await?;
    let mut stderr = connect(&rig, 1027, 5003).await?;
    let script = "cat; echo bad >&2; exit 3";
    let request = CreateContainerRequest {
        container_id: "a".to_owned(),
        OCI: MessageField::some(rig.spec("a", &["sh", "-c", script])?),
        stdin_port: 5001,
        stdout_port: 5002,
        stderr_port: 5003,
        ..CreateContainerRequest::default()
    };
    rig.agent.create_container(ctx(), &request).await?;
    rig.start("a").await?;
    stdin.write_all(b"early ").await?;
    // More than a pipe holds.
    let long = "x".repeat(300_000);
    let write = async {
        stdin.write_all(long.as_bytes()).await?;
        stdin.shutdown().await?;
        anyhow::Ok(())
    };
    let (written, text) = tokio::join!(write, all(&mut stdout));
    written?;
    assert!(text? == format!("early {long}"));
    assert_eq!(all(&mut stderr).await?, "bad\n");
    assert_eq!(rig.wait("a", "").await?, 3);
    rig.remove("a").await?;
    Ok(())
}

#[tokio::test]
async fn an_exec_may_have_a_terminal_and_only_some_of_the_streams() -> Result<()> {
    let rig = Rig::new().await?;
    rig.create("a", rig.spec("a", &["sleep", "1000"])?).await?;
    rig.start("a").await?;
    let exec = |id: &str, terminal: bool, script: &str| ExecProcessRequest {
        container_id: "a".to_owned(),
        exec_id: id.to_owned(),
        process: MessageField::some(protocols::agent::oci::Process {
            Terminal: terminal,
            ..process(&["sh", "-c", script])
        }),
        ..ExecProcessRequest::default()
    };
    let mut stdin = connect(&rig, 1027, 6001).await?;
    let mut stdout = connect(&rig, 1027, 6002).await?;
    let mut request = exec("tty", true, "read line; echo got $line");
    (request.stdin_port, request.stdout_port) = (6001, 6002);
    rig.agent.exec_process(ctx(), &request).await?;
    stdin.write_all(b"hello\n").await?;
    assert_eq!(all(&mut stdout).await?, "hello\r\ngot hello\r\n");
    assert_eq!(rig.wait("a", "tty").await?, 0);

    // Without an input there is none; output that nobody takes holds nobody up.
    let mut stderr = connect(&rig, 1027, 6003).await?;
    let mut request = exec(
        "quiet",
        false,
        "cat; head -c 300000 /dev/zero; echo end >&2",
    );
    request.stderr_port = 6003;
    rig.agent.exec_process(ctx(), &request).await?;
    assert_eq!(all(&mut stderr).await?, "end\n");
    assert_eq!(rig.wait("a", "quiet").await?, 0);

    let gone = connect(&rig, 1027, 6004).await?;
    let mut request = exec("gone", false, "head -c 300000 /dev/zero; exit 4");
    request.stdout_port = 6004;
    drop(gone);
    rig.agent.exec_process(ctx(), &request).await?;
    assert_eq!(timeout(LONG, rig.wait("a", "gone")).await??, 4);

    let mut request = exec("none", false, "true");
    request.stdout_port = 6099;
    let (code, line) = refusal(rig.agent.exec_process(ctx(), &request).await);
    assert_eq!((code, line.contains("6099")), (5, true), "{line}");
    Ok(())
}

#[tokio::test]
async fn a_port_of_streams_may_be_off() -> Result<()> {
    let rig = Rig::with("agent.passfd_listener_port=0").await?;
    let mut request = CreateContainerRequest {
        container_id: "a".to_owned(),
        OCI: MessageField::some(rig.spec("a", &["true"])?),
        ..CreateContainerRequest::default()
    };
    request.stdout_port = 1;
    let (code, line) = refusal(rig.agent.create_container(ctx(), &request).await);
    assert_eq!(
        (code, line.contains("passfd_listener_port")),
        (12, true),
        "{line}"
    );
    Ok(())
}

#[tokio::test]
async fn the_log_is_lines_of_json() -> Result<()> {
    let rig = Rig::with("agent.log_vport=1025 agent.log=debug").await?;
    assert_eq!(rig.run("a", rig.spec("a", &["true"])?).await?.status, 0);
    let mut stream = connect(&rig, 1025, 7001).await?;
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains("\"container\":\"a\"") {
        let length = timeout(LONG, stream.read(&mut buffer)).await??;
        text.push_str(str::from_utf8(&buffer[..length])?);
    }
    let line = text
        .lines()
        .find(|line| line.contains("\"container\":\"a\""))
        .unwrap();
    for key in [
        "msg",
        "level",
        "ts",
        "pid",
        "name",
        "version",
        "source",
        "subsystem",
    ] {
        assert!(line.contains(&format!("\"{key}\":\"")), "{key}: {line}");
    }
    assert!(
        line.contains("\"msg\":\"created\"") && line.contains("\"level\":\"DEBG\""),
        "{line}"
    );
    Ok(())
}

#[tokio::test]
async fn the_debug_console_is_a_shell_where_it_is_on() -> Result<()> {
    let off = Rig::new().await?;
    assert!(connect(&off, 1026, 8001).await.is_err());

    let rig = Rig::with("agent.debug_console agent.debug_console_vport=1026").await?;
    let mut stream = connect(&rig, 1026, 8001).await?;
    let words = all(&mut stream).await?;
    assert!(words.contains("no shell"), "{words}");

    symlink("/usr/bin", rig.path().join("bin"))?;
    assert!(Path::new("/usr/bin/sh").exists());
    let mut stream = connect(&rig, 1026, 8002).await?;
    stream.write_all(b"tty; echo me $((6*7)); exit\n").await?;
    let text = all(&mut stream).await?;
    assert!(
        text.contains("/dev/pts/") && text.contains("me 42"),
        "{text}"
    );
    // Who hangs up ends the shell.
    let mut stream = connect(&rig, 1026, 8003).await?;
    stream.write_all(b"echo here\n").await?;
    let mut some = [0; 1];
    stream.read_exact(&mut some).await?;
    drop(stream);
    eventually("the shell ends", async || Ok(rig.children()? == 0)).await
}
