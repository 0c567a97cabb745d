// SPDX-License-Identifier: Apache-2.0
//! Processes in the first container, and their streams.

use anyhow::{Result, ensure};
use protobuf::MessageField;
use protocols::agent::agent::{
    CloseStdinRequest, ExecProcessRequest, SignalProcessRequest, TtyWinResizeRequest,
    WaitProcessRequest, WriteStreamRequest,
};
use protocols::agent::oci;

use crate::client::{EXISTS, NOT_FOUND, UNAVAILABLE, WRONG_STATE, call, refused};
use crate::container::FIRST;
use crate::host::Host;
use crate::spec;

async fn exec(host: &Host, id: &str, terminal: bool, script: &str) -> ttrpc::Result<()> {
    let process = oci::Process {
        Terminal: terminal,
        ..spec::process(&["sh", "-c", script])
    };
    call!(
        host.client.agent,
        exec_process,
        ExecProcessRequest {
            container_id: FIRST,
            exec_id: id,
            process: MessageField::some(process),
        }
    )
    .map(drop)
}

async fn write(host: &Host, id: &str, data: &[u8]) -> ttrpc::Result<u32> {
    call!(
        host.client.agent,
        write_stdin,
        WriteStreamRequest {
            container_id: FIRST,
            exec_id: id,
            data: data,
        }
    )
    .map(|answer| answer.len)
}

async fn close(host: &Host, id: &str) -> ttrpc::Result<()> {
    call!(
        host.client.agent,
        close_stdin,
        CloseStdinRequest {
            container_id: FIRST,
            exec_id: id,
        }
    )
    .map(drop)
}

async fn resize(host: &Host, id: &str) -> ttrpc::Result<()> {
    call!(
        host.client.agent,
        tty_win_resize,
        TtyWinResizeRequest {
            container_id: FIRST,
            exec_id: id,
            row: 33_u32,
            column: 99_u32,
        }
    )
    .map(drop)
}

async fn wait(host: &Host, id: &str) -> ttrpc::Result<i32> {
    call!(
        host.client.agent,
        wait_process,
        WaitProcessRequest {
            container_id: FIRST,
            exec_id: id,
        }
    )
    .map(|answer| answer.status)
}

pub(crate) async fn pipes(host: &Host) -> Result<()> {
    let script = "cat; echo bad >&2; exit 5";
    exec(host, "cat", false, script).await?;
    refused(EXISTS, "cat", exec(host, "cat", false, script).await)?;
    ensure!(write(host, "cat", b"words").await? == 5);
    refused(UNAVAILABLE, "terminal", resize(host, "cat").await)?;
    // No data is the end of input.
    write(host, "cat", b"").await?;
    refused(WRONG_STATE, "closed", write(host, "cat", b"x").await)?;
    close(host, "cat").await?;
    for (stderr, most, expected) in [
        (false, 3, &b"wor"[..]),
        (false, 99, b"ds"),
        (false, 99, b""),
        (true, 99, b"bad\n"),
        (true, 99, b""),
    ] {
        let data = host.read(FIRST, "cat", stderr, most).await?;
        ensure!(data == expected, "{data:?}, not {expected:?}");
    }
    ensure!(wait(host, "cat").await? == 5);
    refused(NOT_FOUND, "cat", wait(host, "cat").await)
}

pub(crate) async fn terminal(host: &Host) -> Result<()> {
    exec(host, "tty", true, "read line; stty size; echo got $line").await?;
    resize(host, "tty").await?;
    write(host, "tty", b"words\r").await?;
    let outcome = host.outcome(FIRST, "tty").await?;
    ensure!(
        outcome.stdout == "words\r\n33 99\r\ngot words\r\n" && outcome.status == 0,
        "{outcome:?}"
    );
    // Its entry goes with its last output, or is of a process that has ended.
    let late = call!(
        host.client.agent,
        signal_process,
        SignalProcessRequest {
            container_id: FIRST,
            exec_id: "tty",
            signal: 15_u32,
        }
    );
    refused(NOT_FOUND, "", late)
}

pub(crate) async fn nobody(host: &Host) -> Result<()> {
    for id in ["none", "first-none"] {
        refused(NOT_FOUND, id, close(host, id).await)?;
        refused(NOT_FOUND, id, host.read(FIRST, id, false, 1).await)?;
        refused(NOT_FOUND, id, write(host, id, b"x").await)?;
        refused(NOT_FOUND, id, resize(host, id).await)?;
        refused(NOT_FOUND, id, wait(host, id).await)?;
    }
    Ok(())
}
