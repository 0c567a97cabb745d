// SPDX-License-Identifier: Apache-2.0
//! What a machine needs and may lack: KVM, a kernel, an image, an agent, memory, a configuration
//! that makes sense. Each in a containerd of its own, whose environment names the configuration.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rootfs_builder::{erofs, tree};
use tests::configured::Configured;
use tests::containerd::{Containerd, Options};
use tests::installed::installed;
use tests::process::Output;
use tests::scenario::{Outcome, vm_scenario};

/// A failure that needs no boot of a guest is to come within this, on a slow machine.
const AT_ONCE: Duration = Duration::from_secs(8);

/// Runs with a file of the machine's replaced.
fn run_with(host: &Configured, key: &str, path: &Path) -> Result<Output> {
    host.run(&format!("[hypervisor.dragonball]\n{key} = {path:?}\n"))
}

#[test]
fn a_kernel_that_is_missing_or_damaged() -> Outcome {
    vm_scenario("a_kernel_that_is_missing_or_damaged", |ctr| {
        let host = Configured::start(ctr)?;
        let missing = host.folder().join("no-kernel");
        let at_once = |output: &Output, words: &[&str]| -> Result<()> {
            output.one_line(words)?;
            ensure!(
                output.elapsed < AT_ONCE,
                "{output}\nexpected within {AT_ONCE:?}"
            );
            Ok(())
        };
        at_once(
            &run_with(&host, "kernel", &missing)?,
            &["no-kernel", "kernel"],
        )?;
        at_once(&run_with(&host, "kernel", host.folder())?, &["kernel"])?;

        let kernel = fs::read(installed("vmlinux.container")?)?;
        let mut broken = kernel.clone();
        broken.get_mut(..4).context("an empty kernel")?.fill(0);
        for (name, content) in [
            ("empty", &[][..]),
            ("no-elf", &broken),
            ("cut", kernel.get(..100_000).context("a tiny kernel")?),
            ("text", b"not a kernel\n"),
        ] {
            let path = host.file(name, content)?;
            at_once(&run_with(&host, "kernel", &path)?, &["kernel", name])?;
        }
        // The machine is well: the same containerd runs with the kernel that is installed.
        host.run("")?.quietly()?;
        Ok(())
    })
}

#[test]
fn an_image_that_is_missing_or_damaged() -> Outcome {
    vm_scenario("an_image_that_is_missing_or_damaged", |ctr| {
        let host = Configured::start(ctr)?;
        let missing = host.folder().join("no-image");
        let output = run_with(&host, "image", &missing)?;
        output.one_line(&["no-image", "image"])?;
        ensure!(output.elapsed < AT_ONCE, "{output}");

        // The guest finds no file system in it: its kernel's last words are in the line.
        let path = host.file("zeros", &vec![0; 1 << 20])?;
        run_with(&host, "image", &path)?.one_line(&["panic", "VFS"])?;

        let mut image = fs::read(installed("kata-containers.img")?)?;
        let half = image.len() / 2;
        image.truncate(half);
        let path = host.file("half", &image)?;
        run_with(&host, "image", &path)?.one_line(&[])?;
        Ok(())
    })
}

/// A guest image whose `/sbin/init` is busybox: it starts, and is no agent.
fn image_without_agent() -> Result<Vec<u8>> {
    Ok(erofs::image(&tree::guest_image(fs::read(
        "/bin/busybox",
    )?)?)?)
}

#[test]
fn an_agent_that_is_not_ready_in_time() -> Outcome {
    vm_scenario("an_agent_that_is_not_ready_in_time", |ctr| {
        let host = Configured::start(ctr)?;
        let image = host.file("no-agent", &image_without_agent()?)?;
        // 10 s is the least that this key grants.
        let configuration = format!(
            "[hypervisor.dragonball]\nimage = {image:?}\nkernel_params = \"loglevel=7\"\n\
             [agent.kata]\nreconnect_timeout_ms = 10000\n"
        );
        let output = host.run(&configuration)?;
        let line = output.one_line(&["agent", "10 s"])?;
        ensure!(
            line.contains("last lines") && line.contains("init"),
            "{output}\nno last lines of the console"
        );
        ensure!(
            output.elapsed < Duration::from_secs(25),
            "{output}\nexpected soon after 10 s"
        );
        Ok(())
    })
}

#[test]
fn an_agent_that_dies_at_once() -> Outcome {
    vm_scenario("an_agent_that_dies_at_once", |ctr| {
        let host = Configured::start(ctr)?;
        // An ELF header alone: the kernel can't execute it.
        let agent = fs::read("/bin/busybox")?
            .get(..64)
            .context("no ELF header")?
            .to_vec();
        let image = host.file("dead", &erofs::image(&tree::guest_image(agent)?)?)?;
        let output = run_with(&host, "image", &image)?;
        output.one_line(&["panic", "init"])?;
        Ok(())
    })
}

#[test]
fn a_configuration_that_makes_no_sense() -> Outcome {
    vm_scenario("a_configuration_that_makes_no_sense", |ctr| {
        let host = Configured::start(ctr)?;
        host.ctr()
            .run(&[], "absent", &["true"])?
            .one_line(&["configuration.toml"])?;
        for (configuration, words) in [
            ("[hypervisor.dragonball\n", &["configuration.toml"][..]),
            ("[hypervisor.dragonball]\ncolour = \"red\"\n", &["colour"]),
            ("[hypervisor.dragonball]\nkernel = 5\n", &["kernel", "5"]),
            (
                "[hypervisor.dragonball]\ndefault_memory = 8\n",
                &["default_memory", "8"],
            ),
            (
                "[hypervisor.dragonball]\ndefault_vcpus = 33\n",
                &["default_vcpus", "33"],
            ),
        ] {
            let output = host.run(configuration)?;
            output.one_line(words)?;
            ensure!(output.elapsed < AT_ONCE, "{output}");
        }
        Ok(())
    })
}

#[test]
fn a_host_without_kvm() -> Outcome {
    vm_scenario("a_host_without_kvm", |ctr| {
        let options = Options {
            without_kvm: true,
            ..Options::default()
        };
        let containerd = Containerd::start(ctr, &options)?;
        let output = containerd.ctr().run(&[], "no-kvm", &["true"])?;
        output.one_line(&["/dev/kvm"])?;
        ensure!(output.elapsed < AT_ONCE, "{output}");
        Ok(())
    })
}

#[test]
fn a_memory_that_is_the_least_boots() -> Outcome {
    vm_scenario("a_memory_that_is_the_least_boots", |ctr| {
        let host = Configured::start(ctr)?;
        host.run("[hypervisor.dragonball]\ndefault_memory = 64\n")?
            .quietly()?;
        let output =
            host.run("[hypervisor.dragonball]\ndefault_memory = 256\ndefault_vcpus = 4\n")?;
        output.quietly()?;
        Ok(())
    })
}

#[test]
fn a_machine_larger_than_its_host() -> Outcome {
    vm_scenario("a_machine_larger_than_its_host", |ctr| {
        let host = Configured::start(ctr)?;
        let output = host.run("[hypervisor.dragonball]\ndefault_memory = 1000000000\n")?;
        output.one_line(&["default_memory = 1000000000", "more than this host has"])?;
        Ok(())
    })
}
