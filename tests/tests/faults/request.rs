// SPDX-License-Identifier: Apache-2.0
//! What a user may ask for and can't have.

use anyhow::ensure;
use serde_json::{Value, json};
use tests::bundle::Bundle;
use tests::ctr::{Ctr, LIMIT};
use tests::process::Output;
use tests::scenario::{Outcome, scenario, vm_scenario};

#[test]
fn a_command_that_is_missing_or_no_program() -> Outcome {
    scenario(|ctr| {
        ctr.run(&[], "missing", &["no-such-command"])?
            .one_line(&["no-such-command", "not found"])?;
        ctr.run(&[], "missing-path", &["/no/such/command"])?
            .one_line(&["/no/such/command", "no such file or directory"])?;
        ctr.run(&[], "no-program", &["/etc/passwd"])?
            .one_line(&["/etc/passwd", "permission denied"])?;
        // The name is free, and the runtime well.
        ctr.run(&[], "missing", &["true"])?.quietly()?;
        Ok(())
    })
}

#[test]
fn a_working_directory_that_is_a_file() -> Outcome {
    scenario(|ctr| {
        ctr.run(&["--cwd", "/etc/passwd"], "cwd", &["true"])?
            .one_line(&["/etc/passwd", "not a directory"])?;
        Ok(())
    })
}

/// Runs a container that differs from the default specification by `change`.
fn run(ctr: &Ctr, id: &str, change: Value) -> anyhow::Result<Output> {
    let bundle = Bundle::new(ctr, "true")?
        .with(json!({ "linux": { "cgroupsPath": format!("/default/{id}") } }))
        .with(change);
    ctr.run_config(&bundle.write()?, id)
}

#[test]
fn a_user_that_cannot_be() -> Outcome {
    scenario(|ctr| {
        // (uid_t) -1 means "leave as it is" to the kernel, so it is nobody's.
        let user = json!({ "process": { "user": { "uid": u32::MAX, "gid": 0 } } });
        let line = run(ctr, "user", user)?.one_line(&[])?;
        ensure!(
            line.contains("4294967295") || line.contains("user"),
            "{line}"
        );
        Ok(())
    })
}

#[test]
fn a_root_filesystem_that_is_missing() -> Outcome {
    scenario(|ctr| {
        let root = json!({ "root": { "path": "/no/such/rootfs" } });
        run(ctr, "rootfs", root)?.one_line(&["/no/such/rootfs"])?;
        Ok(())
    })
}

#[test]
fn a_mount_that_cannot_be() -> Outcome {
    scenario(|ctr| {
        let bundle = Bundle::new(ctr, "true")?
            .with(json!({ "linux": { "cgroupsPath": "/default/mount" } }))
            .with_mount(json!({ "destination": "/x", "type": "no-such-fs", "source": "none" }));
        let config = bundle.write()?;
        ctr.run_config(&config, "mount")?.one_line(&["/x"])?;

        let source = config.with_file_name("no-such-source");
        let bundle = bundle.with(json!({ "mounts": [{
            "destination": "/y", "type": "bind", "source": source, "options": ["rbind"],
        }]}));
        ctr.run_config(&bundle.write()?, "mount")?
            .one_line(&["no-such-source"])?;
        Ok(())
    })
}

#[test]
fn memory_too_small_for_a_process() -> Outcome {
    scenario(|ctr| {
        let output = ctr.run(&["--memory-limit", "4096"], "memory", &["true"])?;
        output.one_line(&["memory"])?;
        Ok(())
    })
}

#[test]
fn memory_in_which_a_process_would_never_get_on() -> Outcome {
    // Its pages push each other out for ever, and the kernel kills nothing: refused. With the
    // least that is granted a process ends, well or not.
    let name = "memory_in_which_a_process_would_never_get_on";
    vm_scenario(name, |ctr| {
        ctr.run(&["--memory-limit", "300000"], "thrashing", &["true"])?
            .one_line(&["memory.limit", "300000"])?;
        let output = ctr.run(&["--memory-limit", "1048576"], "tight", &["true"])?;
        ensure!(
            output.code == Some(0) || output.code == Some(137),
            "{output}"
        );
        Ok(())
    })
}

#[test]
fn a_process_that_is_killed_for_memory_is_told_apart() -> Outcome {
    scenario(|ctr| {
        let events = ctr.start(&["events"])?;
        let script = "echo up; read line; exec tail /dev/zero";
        let flags = ["--memory-limit", "33554432"];
        let mut running = ctr.start_run(&flags, "oom", &["sh", "-c", script])?;
        running.wait_for_stdout("up", LIMIT)?;
        events.wait_for_stdout("/tasks/start", LIMIT)?;
        running.write(b"go\n")?;
        running.finish(LIMIT)?.exits(137)?;
        events.wait_for_stdout("/tasks/oom", LIMIT)?;
        Ok(())
    })
}
