// SPDX-License-Identifier: Apache-2.0
//! Tasks as `ctr task` shows and steers them; several containers; events.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::ctr::{Ctr, LIMIT};
use tests::process::Running;
use tests::scenario::{Outcome, scenario};
use tests::wait::until;

#[test]
fn a_detached_container_is_listed_measured_signalled_and_deleted() -> Outcome {
    scenario(|ctr| {
        let id = "detached";
        let script = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
        ctr.run_detached(&[], id, &["sh", "-c", script])?;

        let task = ctr.task(id)?.context("no line in `ctr task ls`")?;
        ensure!(task.status == "RUNNING" && task.pid > 0, "{task:?}");

        let output = ctr.call(&["task", "ps", id])?.quietly()?;
        let pids = output
            .text()
            .lines()
            .skip(1)
            .filter(|line| is_number(first(line)))
            .count();
        ensure!(pids >= 1, "{output}");

        let memory = metric(ctr, id, &["memory.usage", "memory.usage_in_bytes"])?;
        ensure!(
            (10_000..1 << 28).contains(&memory),
            "{memory} bytes of memory"
        );
        ensure!(
            (1..10).contains(&metric(ctr, id, &["pids.current"])?),
            "pids.current"
        );

        // Deleting what runs is refused, in words, and does no harm.
        let refused = ctr.call(&["task", "delete", id])?;
        let words = String::from_utf8_lossy(&refused.stderr);
        ensure!(
            refused.code != Some(0) && words.contains("failed precondition"),
            "{refused}"
        );
        ensure!(
            ctr.task(id)?.is_some_and(|task| task.status == "RUNNING"),
            "{refused}"
        );

        ctr.kill(id, "SIGTERM")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        // A signal to what has ended is refused, in words.
        ctr.call(&["task", "kill", id])?.one_line(&["not found"])?;
        ensure!(
            ctr.delete(id)? == 3,
            "`ctr task delete` tells the task's code"
        );
        ensure!(ctr.task(id)?.is_none(), "still listed");
        Ok(())
    })
}

#[test]
fn pause_stops_every_process_and_resume_lets_them_go_on() -> Outcome {
    scenario(|ctr| {
        let id = "paused";
        let script = "trap 'exit 4' TERM; while :; do echo tick; sleep 0.05; done";
        let running = ctr.start_run(&[], id, &["sh", "-c", script])?;
        running.wait_for_stdout("tick", LIMIT)?;
        ctr.call(&["task", "pause", id])?.quietly()?;
        ensure!(
            ctr.task(id)?.is_some_and(|task| task.status == "PAUSED"),
            "not paused"
        );
        // What was printed before may still be under way; then it is quiet.
        let mut last = 0;
        until("silence", LIMIT, || {
            sleep(Duration::from_secs(1));
            let now = running.stdout().len();
            Ok((std::mem::replace(&mut last, now) == now).then_some(()))
        })?;
        ctr.call(&["task", "resume", id])?.quietly()?;
        until("a tick", LIMIT, || {
            Ok((running.stdout().len() > last).then_some(()))
        })?;
        ensure!(
            ctr.task(id)?.is_some_and(|task| task.status == "RUNNING"),
            "not running"
        );
        ctr.kill(id, "SIGTERM")?;
        running.finish(LIMIT)?.exits(4)?;
        Ok(())
    })
}

#[test]
fn a_paused_container_can_be_killed() -> Outcome {
    scenario(|ctr| {
        let id = "paused-killed";
        let running = ctr.start_run(&[], id, &["sh", "-c", "echo up; exec sleep 1000"])?;
        running.wait_for_stdout("up", LIMIT)?;
        ctr.call(&["task", "pause", id])?.quietly()?;
        ctr.kill(id, "SIGKILL")?;
        // The signal waits for the thaw, as with runc on cgroup v1; on v2 the kernel doesn't wait.
        let resumed = ctr.call(&["task", "resume", id])?;
        running
            .finish(LIMIT)?
            .exits(137)
            .with_context(|| format!("after {resumed}"))?;
        Ok(())
    })
}

#[test]
fn five_run_at_once() -> Outcome {
    scenario(|ctr| {
        let names = [
            "at-once-1",
            "at-once-2",
            "at-once-3",
            "at-once-4",
            "at-once-5",
        ];
        let mut all = Vec::new();
        for name in names {
            let script = format!("echo {name} is up; read line; echo {name} read $line");
            all.push(ctr.start_run(&[], name, &["sh", "-c", &script])?);
        }
        for (name, running) in names.iter().zip(&all) {
            running.wait_for_stdout(&format!("{name} is up"), LIMIT)?;
        }
        let listed = names
            .iter()
            .filter(|name| ctr.task(name).is_ok_and(|task| task.is_some()));
        ensure!(listed.count() == names.len(), "not all five are listed");
        for (name, mut running) in names.into_iter().zip(all) {
            running.write(format!("from {name}\n").as_bytes())?;
            let output = running.finish(LIMIT)?.quietly()?;
            let expected = format!("{name} is up\n{name} read from {name}");
            ensure!(output.text() == expected, "{output}");
        }
        Ok(())
    })
}

#[test]
fn a_name_is_taken_while_in_use_and_free_after_delete() -> Outcome {
    scenario(|ctr| {
        let id = "again";
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        ctr.run(&[], id, &["true"])?
            .one_line(&[id, "already exists"])?;
        ensure!(
            ctr.task(id)?.is_some_and(|task| task.status == "RUNNING"),
            "harmed by the second"
        );
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ensure!(ctr.delete(id)? == 137, "exit code of the killed task");
        ctr.run_script(&[], id, "exit 8")?.exits(8)?;
        ctr.run_script(&[], id, "exit 9")?.exits(9)?;
        Ok(())
    })
}

#[test]
fn each_event_comes_once_and_in_order() -> Outcome {
    scenario(|ctr| {
        let events = ctr.start(&["events"])?;
        // The subscription is up once an event of our own arrives.
        let mut count = 0_u32;
        until("the first event", LIMIT, || {
            count = count.saturating_add(1);
            ctr.call(&[
                "namespaces",
                "label",
                "default",
                &format!("nutshell-tests={count}"),
            ])?;
            Ok(text(&events).contains("/namespaces/update").then_some(()))
        })?;
        ctr.call(&["namespaces", "label", "default", "nutshell-tests="])?;

        let id = "events";
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        ctr.exec(&[], id, "inner", &["true"])?.quietly()?;
        ctr.call(&["task", "pause", id])?.quietly()?;
        ctr.call(&["task", "resume", id])?.quietly()?;
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id)?;
        events.wait_for_stdout("/containers/delete", LIMIT)?;
        let seen: Vec<String> = text(&events)
            .lines()
            .filter(|line| line.contains("\"events\""))
            .flat_map(str::split_whitespace)
            .filter_map(|word| word.strip_prefix("/tasks/"))
            .map(str::to_owned)
            .collect();
        let expected = [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit",
            "paused",
            "resumed",
            "exit",
            "delete",
        ];
        ensure!(
            seen == expected,
            "events {seen:?}, expected {expected:?}\n{}",
            text(&events)
        );
        Ok(())
    })
}

fn text(running: &Running) -> String {
    String::from_utf8_lossy(&running.stdout()).into_owned()
}

/// The first of these that `ctr task metrics` shows: names differ between cgroup versions.
fn metric(ctr: &Ctr, id: &str, names: &[&str]) -> Result<u64> {
    let output = ctr.call(&["task", "metrics", id])?.quietly()?;
    for line in output.text().lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(value)) = (words.next(), words.next())
            && names.contains(&name)
        {
            return value.parse().with_context(|| output.to_string());
        }
    }
    anyhow::bail!("{output}\nexpected one of {names:?}")
}

fn first(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or("")
}

fn is_number(word: &str) -> bool {
    word.parse::<u32>().is_ok()
}
