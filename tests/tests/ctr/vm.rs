// SPDX-License-Identifier: Apache-2.0
//! The virtual machine around the container, from inside and from the host.

use std::fs;

use anyhow::{Context, ensure};
use tests::configured::Configured;
use tests::confined::{Expected, expect_confined};
use tests::ctr::LIMIT;
use tests::descriptors::{Descriptors, expect_no_more};
use tests::procs;
use tests::scenario::{Outcome, vm_scenario};
use tests::wait::until;

#[test]
fn a_container_runs_in_a_vm_of_its_own() -> Outcome {
    vm_scenario("a_container_runs_in_a_vm_of_its_own", |ctr| {
        let script = r#"
            echo "KERNEL=$(uname -r)"
            echo "BOOT=$(cat /proc/sys/kernel/random/boot_id)"
            echo "CPUS=$(grep -c ^processor /proc/cpuinfo)"
            echo "HYPERVISOR=$(grep -c '^flags.* hypervisor' /proc/cpuinfo)"
            echo "MEMORY=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)""#;
        let host = |path| fs::read_to_string(path).with_context(|| String::from(path));
        let host_boot = host("/proc/sys/kernel/random/boot_id")?;
        let host_memory = host("/proc/meminfo")?;
        let host_memory: u64 = host_memory
            .split_whitespace()
            .nth(1)
            .context("MemTotal")?
            .parse()?;

        let output = ctr.run_script(&[], "vm-1", script)?.quietly()?;
        let kernel = output.value("KERNEL")?;
        let host_kernel = host("/proc/sys/kernel/osrelease")?;
        ensure!(kernel != host_kernel.trim(), "{output}\nthe host's kernel");
        ensure!(kernel.starts_with("6.12"), "{output}\nnot our guest kernel");
        let boot = output.value("BOOT")?;
        ensure!(boot != host_boot.trim(), "{output}\nthe host's boot");
        ensure!(
            output.value("CPUS")? == "1",
            "{output}\none CPU is the default"
        );
        ensure!(
            output.value("HYPERVISOR")? == "1",
            "{output}\nno hypervisor in sight"
        );
        let memory: u64 = output.value("MEMORY")?.parse()?;
        ensure!(
            memory < host_memory,
            "{output}\nthe host has {host_memory} kB"
        );

        let second = ctr.run_script(&[], "vm-2", script)?.quietly()?;
        ensure!(
            second.value("BOOT")? != boot,
            "{second}\ntwo containers, one boot"
        );
        Ok(())
    })
}

#[test]
fn the_vmm_is_a_child_that_holds_no_path() -> Outcome {
    vm_scenario("the_vmm_is_a_child_that_holds_no_path", |ctr| {
        let id = "confined";
        let mut running = ctr.start_run(&[], id, &["sh", "-c", "echo up; cat"])?;
        running.wait_for_stdout("up", LIMIT)?;
        let expected = Expected { vcpus: 1, taps: 0 };
        expect_confined(&procs::shim(id)?, &procs::vmm(id)?, expected)?;
        running.close_stdin();
        running.finish(LIMIT)?.quietly()?;
        Ok(())
    })
}

#[test]
fn execs_leave_no_descriptors() -> Outcome {
    vm_scenario("execs_leave_no_descriptors", |ctr| {
        let id = "long-lived";
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        let exec = |number: usize| -> anyhow::Result<()> {
            let mut running = ctr.start_exec(&[], id, &format!("exec-{number}"), &["cat"])?;
            running.write(b"there and back\n")?;
            running.close_stdin();
            let output = running.finish(LIMIT)?.quietly()?;
            ensure!(output.text() == "there and back", "{output}");
            Ok(())
        };
        // What is opened at first use stays.
        exec(0)?;
        let mut before = Vec::new();
        for process in [procs::shim(id)?, procs::vmm(id)?] {
            let descriptors = Descriptors::of(&process)?;
            before.push((process, descriptors));
        }
        for number in 1..=5 {
            exec(number)?;
        }
        expect_no_more(&before, LIMIT)?;
        ctr.kill(id, "SIGKILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id)?;
        Ok(())
    })
}

#[test]
fn the_agent_s_log_comes_with_the_runtime_s() -> Outcome {
    vm_scenario("the_agent_s_log_comes_with_the_runtime_s", |ctr| {
        let host = Configured::with(ctr, "[agent.kata]\nenable_debug = true\n")?;
        host.ctr().run(&[], "logged", &["true"])?.quietly()?;
        let line = until("the agent's word of the container", LIMIT, || {
            let log = host.log();
            let mut lines = log.lines();
            let line = lines.find(|line| line.contains("created container=logged"));
            Ok(line.map(ToOwned::to_owned))
        })
        .with_context(|| host.log())?;
        let told = line.contains("DEBUG") && line.contains("sandbox=\"logged\"");
        ensure!(told, "{line}");
        Ok(())
    })
}

#[test]
fn what_the_operator_shares_is_in_every_guest() -> Outcome {
    vm_scenario("what_the_operator_shares_is_in_every_guest", |ctr| {
        let host = Configured::start(ctr)?;
        let shared = |name: &str| {
            let folder = host.folder().join(name);
            fs::create_dir(&folder)?;
            fs::write(folder.join("file"), name)?;
            anyhow::Ok(folder)
        };
        let (given, lent) = (shared("given")?, shared("lent")?);
        host.configure(&format!(
            "[runtime]\nsandbox_bind_mounts = [{given:?}, \"{}:rw\"]\n",
            lent.display()
        ))?;
        // No container binds them: root of the guest looks where the agent would.
        let script = "mkdir /view && mount -t virtiofs kataShared /view && cd /view/passthrough/sandbox-mounts && \
                      cat given/file && cat lent/file && echo back >lent/file && \
                      mount -o remount,rw /view && ! sh -c 'echo back >given/file' 2>/dev/null";
        let output = host
            .ctr()
            .run_script(&["--privileged"], "shared", script)?
            .quietly()?;
        ensure!(output.text() == "givenlent", "{output}");
        ensure!(fs::read_to_string(given.join("file"))? == "given");
        ensure!(fs::read_to_string(lent.join("file"))? == "back\n");
        host.run("[runtime]\nsandbox_bind_mounts = [\"/none/such\"]\n")?
            .one_line(&["sandbox_bind_mounts: mount /none/such: "])?;
        Ok(())
    })
}
