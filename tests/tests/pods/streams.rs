// SPDX-License-Identifier: Apache-2.0
//! exec, attach, port-forward and logs.

use anyhow::{Context, Result, ensure};
use tests::cri::{LIMIT, Status};
use tests::pod::Pod;
use tests::scenario::{Outcome, pod_scenario, pod_vm_scenario};

#[test]
fn an_exec_streams_both_ways() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "exec")?;
        let container = pod.start_script("main", "exec sleep 1000")?;
        let script = "while read line; do
            case $line in end) exit 9 ;; *) echo \"got $line\"; echo \"not $line\" >&2 ;; esac
        done";
        let mut session = node
            .cri()
            .exec(&container.id, &["sh", "-c", script], false)?;
        session.write(b"one\n")?;
        session.wait_for("got one\n", LIMIT)?;
        session.write(b"two\n")?;
        session.wait_for("got two\n", LIMIT)?;
        session.write(b"end\n")?;
        let code = session.finish(LIMIT)?;
        ensure!(code == 9, "exit code {code}");
        ensure!(
            session.stderr() == b"not one\nnot two\n",
            "{:?}",
            String::from_utf8_lossy(session.stderr())
        );

        // Much, and nothing of it lost at the end.
        let mut session = node
            .cri()
            .exec(&container.id, &["seq", "1", "200000"], false)?;
        let code = session.finish(LIMIT)?;
        ensure!(code == 0, "exit code {code}");
        let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
        ensure!(
            session.stdout() == expected.as_bytes(),
            "{} bytes of {}",
            session.stdout().len(),
            expected.len()
        );
        pod.remove()
    })
}

#[test]
fn an_exec_has_a_terminal() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "terminal")?;
        let container = pod.start_script("main", "exec sleep 1000")?;
        let script = r#"[ -t 0 ] && [ -t 1 ] && echo "on $(tty)"
            trap 'echo "now $(stty size)"' WINCH
            trap 'echo interrupted; exit 7' INT
            echo ready; while :; do sleep 0.1; done"#;
        let mut session = node
            .cri()
            .exec(&container.id, &["sh", "-c", script], true)?;
        session.wait_for("on /dev/pts/", LIMIT)?;
        session.wait_for("ready", LIMIT)?;
        session.resize(40, 120)?;
        session.wait_for("now 40 120", LIMIT)?;
        session.write(b"\x03")?;
        let code = session.finish(LIMIT)?;
        ensure!(code == 7, "exit code {code}");
        pod.remove()
    })
}

#[test]
fn an_attached_container_reads_and_speaks() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "attach")?;
        let script = "while read line; do echo \"got $line\"; [ $line = end ] && exit 4; done";
        for terminal in [false, true] {
            let name = if terminal { "terminal" } else { "pipes" };
            let mut config = pod.container(name, script);
            config.stdin = true;
            config.tty = terminal;
            let container = pod.start(&config)?;
            // One goes away, and the next finds the container as it was.
            let mut first = node.cri().attach(&container.id, terminal)?;
            first.write(b"first\n")?;
            first.wait_for("got first", LIMIT)?;
            first.hang_up();
            let mut second = node.cri().attach(&container.id, terminal)?;
            second.write(b"second\n")?;
            second.wait_for("got second", LIMIT)?;
            second.write(b"end\n")?;
            let code = container.wait(LIMIT)?;
            ensure!(code == 4, "{name}: exit code {code}");
            let log = container.log("stdout")?;
            for word in ["got first", "got second", "got end"] {
                ensure!(log.contains(word), "{name}: no {word:?} in the log: {log}");
            }
        }
        pod.remove()
    })
}

#[test]
fn a_port_is_forwarded_through_containerd() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "forward")?;
        let script = "mkdir /www; seq 1 50000 > /www/page; httpd -p 8080 -h /www; echo up;
            exec sleep 1000";
        let container = pod.start_script("server", script)?;
        container.wait_for_log("up\n", LIMIT)?;
        for _ in 0..2 {
            let mut forward = node.cri().forward(&pod.id, 8080)?;
            forward.write(b"GET /page HTTP/1.0\r\n\r\n")?;
            let answer = forward.read_to_end(LIMIT)?;
            let text = String::from_utf8_lossy(&answer);
            let (_, body) = text.split_once("\r\n\r\n").context("no body")?;
            let expected: String = (1..=50_000).map(|number| format!("{number}\n")).collect();
            ensure!(
                body == expected,
                "{} bytes of {}",
                body.len(),
                expected.len()
            );
        }
        // A port that nobody listens on is an error in words.
        let mut forward = node.cri().forward(&pod.id, 81)?;
        let error = forward.read_to_end(LIMIT).err().context("no error")?;
        ensure!(format!("{error:#}").contains("81"), "{error:#}");
        pod.remove()
    })
}

#[test]
fn logs_hold_every_line_of_both_streams() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "logs")?;
        let script = "seq 1 20000 & seq 30000 40000 >&2 & wait; printf 'no end of line'";
        let container = pod.start_script("main", script)?;
        ensure!(container.wait(LIMIT)? == 0, "exit code");
        let numbers = |from: u32, to: u32| -> String {
            (from..=to).map(|number| format!("{number}\n")).collect()
        };
        let (out, err) = (container.log("stdout")?, container.log("stderr")?);
        ensure!(
            out.trim_end() == format!("{}no end of line", numbers(1, 20_000)),
            "standard output: {} bytes",
            out.len()
        );
        ensure!(
            err == numbers(30_000, 40_000),
            "standard error: {} bytes",
            err.len()
        );
        pod.remove()
    })
}

#[test]
fn an_exec_of_a_missing_command_fails_in_words() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "missing")?;
        let container = pod.start_script("main", "exec sleep 1000")?;
        let error = container
            .exec(&["no-such-command"])
            .err()
            .context("no error")?;
        words(&error, &["no-such-command", "not found"])?;
        let error = container.exec(&["/etc/passwd"]).err().context("no error")?;
        words(&error, &["/etc/passwd", "permission denied"])?;

        let mut session = node
            .cri()
            .exec(&container.id, &["no-such-command"], false)?;
        let error = session.finish(LIMIT).err().context("no error")?;
        ensure!(
            format!("{error:#}").contains("no-such-command"),
            "{error:#}"
        );

        // The container is well.
        container.shell("true")?;
        pod.remove()
    })
}

#[test]
fn an_exec_ends_with_its_own_process() -> Outcome {
    // containerd waits for the end of the output, and runc's shim for the child that has it.
    pod_vm_scenario("an_exec_ends_with_its_own_process", |node| {
        let pod = Pod::run(node, "background")?;
        let container = pod.start_script("main", "exec sleep 1000")?;
        let argv = ["sh", "-c", "echo before; sleep 900 & exit 6"];
        let answer = container.exec(&argv)?;
        ensure!(
            answer.exit_code == 6 && answer.stdout == b"before\n",
            "exit code {}, output {:?}",
            answer.exit_code,
            String::from_utf8_lossy(&answer.stdout)
        );
        let mut session = node.cri().exec(&container.id, &argv, false)?;
        let code = session.finish(LIMIT)?;
        ensure!(
            code == 6 && session.stdout() == b"before\n",
            "exit code {code}"
        );
        let seen = container.shell("ps -o args | grep -c '^sleep 900'")?;
        ensure!(seen == "2", "{seen} children live on");
        pod.remove()
    })
}

/// A refusal in one line that has these words.
fn words(error: &anyhow::Error, expected: &[&str]) -> Result<()> {
    let status = error
        .downcast_ref::<Status>()
        .with_context(|| format!("not a refusal: {error:#}"))?;
    status.one_line(expected)
}
