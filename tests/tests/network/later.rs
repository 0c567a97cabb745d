// SPDX-License-Identifier: Apache-2.0
//! What changes in the namespace while the container runs.

use anyhow::{Result, ensure};
use tests::ctr::{Ctr, LIMIT};
use tests::netns::Netns;
use tests::process::Output;
use tests::scenario::{Outcome, vm_scenario};
use tests::wait::until;

/// A container that does nothing, and whose guest is asked.
struct Guest<'a> {
    ctr: &'a Ctr,
    id: &'a str,
    execs: u32,
}

impl<'a> Guest<'a> {
    fn start(ctr: &'a Ctr, id: &'a str, flags: &[&str]) -> Result<Self> {
        ctr.run_detached(flags, id, &["sleep", "1000"])?;
        let execs = 0;
        Ok(Self { ctr, id, execs })
    }

    fn ask(&mut self, script: &str) -> Result<Output> {
        self.execs = self.execs.saturating_add(1);
        let exec = format!("e{}", self.execs);
        self.ctr.exec(&[], self.id, &exec, &["sh", "-c", script])
    }

    /// Asks until the answer is 0: the host has changed, and the guest follows.
    fn follows(&mut self, script: &str) -> Result<()> {
        until(script, LIMIT, || {
            Ok((self.ask(script)?.code == Some(0)).then_some(()))
        })
    }

    fn end(self) -> Result<()> {
        self.ctr.kill(self.id, "KILL")?;
        self.ctr.wait_for_status(self.id, "STOPPED", LIMIT)?;
        self.ctr.delete(self.id).map(|_| ())
    }
}

#[test]
fn an_interface_comes_and_goes() -> Outcome {
    vm_scenario("an_interface_comes_and_goes", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        let mut guest = Guest::start(ctr, "net-later", &["--with-ns", &pod.flag()])?;
        let before = pod.state()?;
        pod.add_pair("net1", &["10.98.0.1"], &["10.98.0.2"], 1500)?;
        guest.follows("ping -c 1 -W 2 10.98.0.1")?;
        guest.follows("ping -c 1 -W 2 10.99.0.1")?;
        pod.remove_pair("net1")?;
        guest.follows("! test -e /sys/class/net/net1")?;
        until("the second tap to be gone", LIMIT, || {
            Ok((pod.state()? == before).then_some(()))
        })?;
        guest.follows("ping -c 1 -W 2 10.99.0.1")?;
        guest.end()
    })
}

#[test]
fn addresses_and_routes_are_followed() -> Outcome {
    vm_scenario("addresses_and_routes_are_followed", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        let mut guest = Guest::start(ctr, "net-change", &["--with-ns", &pod.flag()])?;
        pod.ip(&["address", "add", "10.99.0.3/24", "dev", "eth0"])?;
        guest.follows("ip address show dev eth0 | grep -q 10.99.0.3/24")?;
        pod.ip(&["address", "delete", "10.99.0.3/24", "dev", "eth0"])?;
        guest.follows("! ip address show dev eth0 | grep -q 10.99.0.3/24")?;
        pod.ip(&["route", "add", "10.105.0.0/16", "via", "10.99.0.1"])?;
        guest.follows("ip route | grep -q 10.105.0.0/16")?;
        pod.ip(&["route", "delete", "default"])?;
        guest.follows("! ip route | grep -q default")?;
        guest.end()
    })
}

/// As Docker wires a container: between create and start, through the process's namespace.
#[test]
fn what_comes_before_the_start_is_there_at_the_start() -> Outcome {
    vm_scenario("what_comes_before_the_start_is_there_at_the_start", |ctr| {
        let pod = Netns::empty("nutshell-n")?;
        let id = "net-early";
        ctr.call(&[
            "container",
            "create",
            "--runtime",
            ctr.runtime(),
            "--with-ns",
            &pod.flag(),
            ctr.image(),
            id,
            // `ctr` would take a script's `-c` for a flag of its own.
            "sh",
        ])?
        .quietly()?;
        // `ctr task start` creates and starts in one: the interface is made before, and set up
        // while the machine boots.
        let mut running = ctr.start(&["task", "start", id])?;
        // `ctr` may miss to tell of the input's end, where that comes before the task.
        let script = "cat /sys/class/net/eth0/address; ip route; ping -c 1 -W 20 10.99.0.1; exit\n";
        running.feed(script.as_bytes().to_vec())?;
        until("the machine's process", LIMIT, || {
            Ok(tests::procs::vmm(id).ok().map(|_| ()))
        })?;
        pod.add_pair("eth0", &["10.99.0.1"], &["10.99.0.2"], 1500)?;
        let output = running.finish(LIMIT)?.quietly()?;
        ensure!(output.text().contains("10.99.0.0/24"), "{output}");
        // The task is gone with the client that started it.
        ctr.call(&["container", "delete", id])?
            .quietly()
            .map(|_| ())
    })
}
