// SPDX-License-Identifier: Apache-2.0
//! `ctr run`: exit codes, streams, the terminal.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use tests::ctr::{Ctr, LIMIT};
use tests::pty::Pty;
use tests::scenario::{Outcome, scenario};

const MIB: usize = 1 << 20;

#[test]
fn exit_codes_are_the_process_s() -> Outcome {
    scenario(exit_codes)
}

pub(crate) fn exit_codes(ctr: &Ctr) -> Result<()> {
    ctr.run(&[], "exit-0", &["true"])?.quietly()?;
    ctr.run(&[], "exit-1", &["false"])?.exits(1)?;
    ctr.run_script(&[], "exit-42", "exit 42")?.exits(42)?;
    let output = ctr
        .run_script(&[], "exit-127", "no-such-command")?
        .exits(127)?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(words.contains("no-such-command: not found"), "{output}");
    Ok(())
}

#[test]
fn a_killed_container_exits_with_137() -> Outcome {
    scenario(killed)
}

pub(crate) fn killed(ctr: &Ctr) -> Result<()> {
    let running = ctr.start_run(&[], "killed", &["sh", "-c", "echo up; exec sleep 1000"])?;
    running.wait_for_stdout("up", LIMIT)?;
    ctr.kill("killed", "SIGKILL")?;
    running.finish(LIMIT)?.exits(137)?;
    Ok(())
}

#[test]
fn ten_mebibytes_of_input_come_back_byte_for_byte() -> Outcome {
    scenario(input)
}

pub(crate) fn input(ctr: &Ctr) -> Result<()> {
    // Every byte value, and no period that a lost or doubled block could hide in.
    let mut state: u32 = 1;
    let input: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(10 * MIB)
    .collect();
    let mut running = ctr.start_run(&[], "input", &["cat"])?;
    running.feed(input.clone())?;
    let output = running.finish(LIMIT)?.quietly()?;
    let same = input
        .iter()
        .zip(&output.stdout)
        .take_while(|(a, b)| a == b)
        .count();
    ensure!(
        output.stdout == input,
        "{} bytes came back, the first {same} of them right",
        output.stdout.len()
    );
    Ok(())
}

#[test]
fn a_mebibyte_on_each_stream_arrives_whole_and_apart() -> Outcome {
    scenario(two_streams)
}

pub(crate) fn two_streams(ctr: &Ctr) -> Result<()> {
    let script = "seq 1 200000 | head -c 1048576 &
            seq 500000 700000 | head -c 1048576 >&2 & wait";
    let output = ctr.run_script(&[], "streams", script)?.exits(0)?;
    for (name, stream, from) in [
        ("stdout", &output.stdout, 1),
        ("stderr", &output.stderr, 500_000),
    ] {
        let expected = numbers(from);
        let same = expected
            .iter()
            .zip(stream)
            .take_while(|(a, b)| a == b)
            .count();
        ensure!(
            *stream == expected,
            "{name}: {} bytes, the first {same} of them right",
            stream.len()
        );
    }
    Ok(())
}

/// The first MiB of the numbers from `from` on, one a line.
fn numbers(from: u32) -> Vec<u8> {
    let mut text = String::with_capacity(MIB);
    for number in from.. {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{number}");
        if text.len() >= MIB {
            break;
        }
    }
    text.truncate(MIB);
    text.into_bytes()
}

#[test]
fn a_terminal_echoes_signals_and_follows_its_size() -> Outcome {
    scenario(terminal)
}

pub(crate) fn terminal(ctr: &Ctr) -> Result<()> {
    let script = r#"
            [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo "on $(tty)"
            until [ "$(stty size 2>&1)" = "30 100" ]; do sleep 0.1; done; echo "right size"
            trap 'echo "now $(stty size)"' WINCH
            trap 'echo interrupted; exit 7' INT
            read line; echo "read $line"
            while :; do sleep 0.1; done"#;
    let mut command = ctr.run_command(&["--rm", "-t"], "terminal", &["sh", "-c", script]);
    let mut pty = Pty::start(&mut command, 30, 100)?;
    pty.wait_for("on /dev/pts/0\n", LIMIT)?;
    // ctr sets the size once the task has started.
    pty.wait_for("right size\n", LIMIT)?;
    pty.write("hello\n")?;
    pty.wait_for("hello\n", LIMIT).context("the echo")?;
    pty.wait_for("read hello\n", LIMIT)?;
    pty.resize(40, 120, "now 40 120\n", LIMIT)?;
    pty.resize(25, 90, "now 25 90\n", LIMIT)?;
    pty.write("\x03")?;
    pty.wait_for("interrupted\n", LIMIT)?;
    let text = pty.text();
    let status = pty.finish(LIMIT)?;
    ensure!(
        status.code() == Some(7),
        "ctr ended with {status}; on the terminal: {text}"
    );
    Ok(())
}

/// The reader's place holds while what it has passed goes, on every file system of the host: where the dev
/// VM's containerd keeps its containers, positions are counted.
#[test]
fn a_folder_is_removed_while_it_is_listed() -> Outcome {
    scenario(|ctr| {
        let script = "mkdir /full && cd /full && for file in $(seq 300); do : > a-file-$file; done && \
                      cd / && rm -r /full";
        ctr.run_script(&[], "removed", script)?.quietly()?;
        Ok(())
    })
}
