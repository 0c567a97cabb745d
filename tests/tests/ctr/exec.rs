// SPDX-License-Identifier: Apache-2.0
//! `ctr task exec`.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::ctr::{Ctr, LIMIT};
use tests::pty::Pty;
use tests::scenario::{Outcome, scenario};

/// An exec that is to end at once: within this, on a slow machine.
const AT_ONCE: Duration = Duration::from_secs(8);

/// Runs `body` beside a container that sleeps.
fn beside(ctr: &Ctr, id: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    ctr.run_detached(&["--env", "MARK=spec"], id, &["sleep", "1000"])?;
    body()?;
    ctr.kill(id, "SIGKILL")?;
    ctr.wait_for_status(id, "STOPPED", LIMIT)?;
    ctr.delete(id)?;
    Ok(())
}

#[test]
fn an_exec_has_exit_codes_streams_and_the_container_s_environment() -> Outcome {
    scenario(basics)
}

pub(crate) fn basics(ctr: &Ctr) -> Result<()> {
    let id = "exec-basics";
    beside(ctr, id, || {
        for code in [0, 1, 42, 127] {
            let script = format!("exit {code}");
            ctr.exec(&[], id, &format!("code-{code}"), &["sh", "-c", &script])?
                .exits(code)?;
        }
        ctr.exec(&[], id, "killed", &["sh", "-c", "kill -9 $$"])?
            .exits(137)?;

        let script = "echo MARK=$MARK; echo CWD=$PWD; echo INIT=$(cat /proc/1/comm); echo err >&2";
        let output = ctr
            .exec(&["--cwd", "/tmp"], id, "inside", &["sh", "-c", script])?
            .exits(0)?;
        ensure!(output.value("MARK")? == "spec", "{output}");
        ensure!(output.value("CWD")? == "/tmp", "{output}");
        ensure!(output.value("INIT")? == "sleep", "{output}");
        ensure!(output.stderr == b"err\n", "{output}");

        let output = ctr
            .exec(&["--user", "nobody"], id, "user", &["id", "-u"])?
            .exits(0)?;
        ensure!(output.text() == "65534", "{output}");
        Ok(())
    })
}

#[test]
fn an_exec_reads_its_input_to_the_end() -> Outcome {
    scenario(input)
}

pub(crate) fn input(ctr: &Ctr) -> Result<()> {
    let id = "exec-input";
    beside(ctr, id, || {
        let input: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_be_bytes).collect();
        let mut running = ctr.start_exec(&[], id, "cat", &["cat"])?;
        running.feed(input.clone())?;
        let output = running.finish(LIMIT)?.quietly()?;
        ensure!(
            output.stdout == input,
            "{} bytes of {}",
            output.stdout.len(),
            input.len()
        );
        Ok(())
    })
}

#[test]
fn an_exec_has_a_terminal() -> Outcome {
    scenario(terminal)
}

pub(crate) fn terminal(ctr: &Ctr) -> Result<()> {
    let id = "exec-terminal";
    beside(ctr, id, || {
        let script = r#"[ -t 0 ] && [ -t 2 ] && echo up
            until [ "$(stty size 2>&1)" = "30 100" ]; do sleep 0.1; done; echo right size
            until [ "$(stty size 2>&1)" = "33 111" ]; do sleep 0.1; done; echo resized
            read line; echo "read $line"; exit 9"#;
        let mut command = ctr.exec_command(&["-t"], id, "sh", &["sh", "-c", script]);
        let mut pty = Pty::start(&mut command, 30, 100)?;
        pty.wait_for("up\n", LIMIT)?;
        pty.wait_for("right size\n", LIMIT)?;
        pty.resize(33, 111, "resized\n", LIMIT)?;
        pty.write("hello\n")?;
        pty.wait_for("read hello\n", LIMIT)?;
        let text = pty.text();
        let status = pty.finish(LIMIT)?;
        ensure!(
            status.code() == Some(9),
            "ctr ended with {status}; on the terminal: {text}"
        );
        Ok(())
    })
}

#[test]
fn an_exec_of_a_missing_command_fails_at_once_in_words() -> Outcome {
    scenario(missing_command)
}

pub(crate) fn missing_command(ctr: &Ctr) -> Result<()> {
    let id = "exec-missing";
    beside(ctr, id, || {
        let output = ctr.exec(&[], id, "missing", &["no-such-command"])?;
        output.one_line(&["no-such-command", "not found"])?;
        ensure!(output.elapsed < AT_ONCE, "{output}");
        // The container lives on, and the name is free again.
        ctr.exec(&[], id, "missing", &["true"])?.quietly()?;
        Ok(())
    })
}

#[test]
fn a_background_child_does_not_hang_an_exec() -> Outcome {
    scenario(background_child)
}

pub(crate) fn background_child(ctr: &Ctr) -> Result<()> {
    let id = "exec-background";
    beside(ctr, id, || {
        let output = ctr.exec(
            &[],
            id,
            "parent",
            &["sh", "-c", "sleep 1000 & echo started"],
        )?;
        let output = output.exits(0)?;
        ensure!(
            output.text() == "started" && output.elapsed < AT_ONCE,
            "{output}"
        );
        Ok(())
    })
}

#[test]
fn a_signal_reaches_one_exec_alone() -> Outcome {
    scenario(signal)
}

pub(crate) fn signal(ctr: &Ctr) -> Result<()> {
    let id = "exec-signal";
    beside(ctr, id, || {
        let script = "trap 'echo got it; exit 5' USR1; echo up; while :; do sleep 0.1; done";
        let first = ctr.start_exec(&[], id, "first", &["sh", "-c", script])?;
        let second = ctr.start_exec(&[], id, "second", &["sh", "-c", script])?;
        first.wait_for_stdout("up", LIMIT)?;
        second.wait_for_stdout("up", LIMIT)?;
        let signal = |exec, name| {
            ctr.call(&["task", "kill", "--signal", name, "--exec-id", exec, id])?
                .quietly()
        };
        signal("first", "SIGUSR1")?;
        let output = first.finish(LIMIT)?.exits(5)?;
        ensure!(output.text().ends_with("got it"), "{output}");
        signal("second", "SIGKILL")?;
        let output = second.finish(LIMIT)?.exits(137)?;
        ensure!(output.text() == "up", "{output}");
        Ok(())
    })
}
