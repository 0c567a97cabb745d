// SPDX-License-Identifier: Apache-2.0
//! Namespaces that can't be carried, and ends that nobody planned: one line, and nothing left.

use anyhow::{Context, Result, ensure};
use tests::ctr::{Ctr, LIMIT};
use tests::netns::{Netns, ip};
use tests::procs;
use tests::scenario::{Outcome, vm_scenario};
use tests::wait::until;

fn refused(ctr: &Ctr, flags: &[&str], words: &[&str]) -> Result<()> {
    let output = ctr.run(flags, "net-refused", &["true"])?;
    output.one_line(words).map(|_| ())
}

#[test]
fn a_namespace_that_vanished() -> Outcome {
    vm_scenario("a_namespace_that_vanished", |ctr| {
        let path = "/run/netns/nutshell-gone";
        refused(
            ctr,
            &["--with-ns", &format!("network:{path}")],
            &["network namespace", path, "No such file"],
        )
    })
}

#[test]
fn the_host_s_network() -> Outcome {
    vm_scenario("the_host_s_network", |ctr| {
        refused(ctr, &["--net-host"], &["the host's network"])?;
        let own = "/proc/1/ns/net";
        let flags = ["--with-ns", &format!("network:{own}")];
        refused(ctr, &flags, &[own, "the host's own"])
    })
}

#[test]
fn an_interface_without_ethernet() -> Outcome {
    vm_scenario("an_interface_without_ethernet", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        pod.ip(&["tuntap", "add", "tun7", "mode", "tun"])?;
        pod.ip(&["address", "add", "10.97.0.1/24", "dev", "tun7"])?;
        pod.ip(&["link", "set", "tun7", "up"])?;
        let before = pod.state()?;
        refused(ctr, &["--with-ns", &pod.flag()], &["tun7", "Ethernet"])?;
        ensure!(pod.state()? == before, "changed: {}", pod.state()?);
        Ok(())
    })
}

#[test]
fn a_namespace_that_another_sandbox_has() -> Outcome {
    vm_scenario("a_namespace_that_another_sandbox_has", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        let flag = pod.flag();
        ctr.run_detached(&["--with-ns", &flag], "net-first", &["sleep", "1000"])?;
        let before = pod.state()?;
        refused(ctr, &["--with-ns", &flag], &["eth0", "in use"])?;
        ensure!(pod.state()? == before, "changed: {}", pod.state()?);
        let ping = ["ping", "-c", "1", "-W", "20", "10.99.0.1"];
        ctr.exec(&[], "net-first", "ping", &ping)?.exits(0)?;
        ctr.kill("net-first", "KILL")?;
        ctr.wait_for_status("net-first", "STOPPED", LIMIT)?;
        ctr.delete("net-first").map(|_| ())
    })
}

/// The model's objects that outlive both of their processes, and the name at once again.
#[test]
fn a_killed_shim_leaves_the_namespace_as_it_was() -> Outcome {
    vm_scenario("a_killed_shim_leaves_the_namespace_as_it_was", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        let before = pod.state()?;
        let flag = pod.flag();
        let id = "net-killed";
        let up = ["sh", "-c", "echo up; exec sleep 1000"];
        let container = ctr.start_run(&["--with-ns", &flag], id, &up)?;
        container.wait_for_stdout("up", LIMIT)?;
        ensure!(pod.state()? != before, "nothing was made in the namespace");
        procs::shim(id)?.kill()?;
        container.finish(LIMIT)?;
        until("the namespace as before", LIMIT, || {
            Ok((pod.state()? == before).then_some(()))
        })
    })
}

#[test]
fn a_namespace_that_goes_while_in_use() -> Outcome {
    vm_scenario("a_namespace_that_goes_while_in_use", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        let id = "net-goes";
        ctr.run_detached(&["--with-ns", &pod.flag()], id, &["sleep", "1000"])?;
        // Its name and its interfaces; the namespace itself lasts as long as its last user.
        drop(pod);
        ctr.exec(&[], id, "beside", &["true"])?
            .quietly()
            .context("the container lives on")?;
        ctr.kill(id, "KILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id)?;
        let links = ip(&["-oneline", "link"])?;
        ensure!(!links.text().contains("_kata"), "{links}");
        Ok(())
    })
}
