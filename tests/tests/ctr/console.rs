// SPDX-License-Identifier: Apache-2.0
//! The debug console: `kata-ctl exec`.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use rootfs_builder::{erofs, tree};
use tests::configured::Configured;
use tests::ctr::LIMIT;
use tests::installed::installed;
use tests::process::{Output, Running};
use tests::pty::Pty;
use tests::scenario::{Outcome, vm_scenario};
use tests::volume::Mounted;

fn kata_ctl(sandbox: &str) -> Command {
    let mut command = Command::new("kata-ctl");
    command.args(["exec", sandbox]);
    command
}

/// `kata-ctl exec` to its end, with this as its input.
fn tell(sandbox: &str, input: &str) -> Result<Output> {
    let mut running = Running::start(&mut kata_ctl(sandbox))?;
    running.feed(input.as_bytes().to_vec())?;
    running.finish(LIMIT)
}

/// The image that is installed, with busybox as its shell.
fn image_with_shell() -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let _mounted = Mounted::image(&installed("kata-containers.img")?, folder.path())?;
    let agent = fs::read(folder.path().join("usr/bin/kata-agent"))?;
    let mut root = tree::guest_image(agent)?;
    tree::add_shell(&mut root, fs::read("/bin/busybox")?)?;
    Ok(erofs::image(&root)?)
}

#[test]
fn a_console_is_a_terminal_in_the_guest() -> Outcome {
    vm_scenario("a_console_is_a_terminal_in_the_guest", |ctr| {
        let host = Configured::start(ctr)?;
        let image = host.file("image", &image_with_shell()?)?;
        host.configure(&format!(
            "[hypervisor.dragonball]\nimage = {image:?}\n\
             [agent.kata]\ndebug_console_enabled = true\n"
        ))?;
        let ctr = host.ctr();
        let id = "console-on";
        let mut container = ctr.start_run(&[], id, &["sh", "-c", "echo up; exec cat"])?;
        container.wait_for_stdout("up", LIMIT)?;

        // The guest's own root, not the container's; by a part of the name.
        let said = tell("console-o", "echo pid $(cat /proc/1/comm) $((6*7))\nexit\n")?.exits(0)?;
        ensure!(said.text().contains("pid init 42"), "{said}");
        // What is no terminal may end without a word; the shell's last words still come.
        let said = tell(id, "echo last $((7*7))\n")?.exits(0)?;
        ensure!(said.text().contains("last 49"), "{said}");

        let mut console = Pty::start(&mut kata_ctl(id), 24, 80)?;
        console.write("echo on $(tty); while :; do :; done\n")?;
        console.wait_for("on /dev/pts/", LIMIT)?;
        // Ctrl-C is the guest's, Ctrl-] is not.
        console.write("\x03")?;
        console.write("echo interrupted $?\n")?;
        console.wait_for("interrupted 130", LIMIT)?;
        console.write("\x1d")?;
        let status = console.finish(LIMIT)?;
        ensure!(status.success(), "kata-ctl exec ended with {status}");

        container.close_stdin();
        container.finish(LIMIT)?.quietly()?;
        tell(id, "")?.one_line(&[id, "no sandbox"])?;
        Ok(())
    })
}

#[test]
fn a_sandbox_has_no_console_unless_it_is_asked_for() -> Outcome {
    vm_scenario("a_sandbox_has_no_console_unless_it_is_asked_for", |ctr| {
        let id = "console-off";
        let mut container = ctr.start_run(&[], id, &["sh", "-c", "echo up; exec cat"])?;
        container.wait_for_stdout("up", LIMIT)?;
        tell(id, "")?.one_line(&[id, "no debug console", "debug_console_enabled"])?;
        container.close_stdin();
        container.finish(LIMIT)?.quietly()?;
        Ok(())
    })
}
