// SPDX-License-Identifier: Apache-2.0
//! A network namespace with an interface in it, as a container network would leave it.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::{io, thread};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::ctr::LIMIT;
use crate::process::{Output, Running};

/// The host's end and the namespace's, of both families.
pub const HOST: [&str; 2] = ["10.99.0.1", "fd00:99::1"];
/// What the guest is reached by.
pub const GUEST: [&str; 2] = ["10.99.0.2", "fd00:99::2"];

/// A namespace, joined to the host by a pair of interfaces; gone with this value.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// An empty one, but for its loopback interface.
    pub fn empty(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let this = Self {
            name: name.to_owned(),
        };
        this.ip(&["link", "set", "lo", "up"])?;
        Ok(this)
    }

    /// One with `eth0`, whose other end is the host's, both with addresses.
    pub fn wired(name: &str, mtu: u32) -> Result<Self> {
        let this = Self::empty(name)?;
        this.add_pair("eth0", &HOST, &GUEST, mtu)?;
        for host in HOST {
            this.ip(&["route", "add", "default", "via", host])?;
        }
        Ok(this)
    }

    /// The path by which containers are given it.
    #[must_use]
    pub fn flag(&self) -> String {
        format!("network:{}", self.path())
    }

    /// Adds a pair of interfaces with addresses, each with a network of its own.
    pub fn add_pair(&self, inside: &str, host: &[&str], guest: &[&str], mtu: u32) -> Result<()> {
        let outside = self.outside(inside);
        let mtu = mtu.to_string();
        ip(&[
            "link", "add", &outside, "mtu", &mtu, "type", "veth", "peer", "name", inside, "mtu",
            &mtu, "netns", &self.name,
        ])?;
        for (host, guest) in host.iter().zip(guest) {
            let (prefix, flags): (_, &[&str]) = if host.contains(':') {
                // Nobody else is there to have the address.
                ("64", &["nodad"])
            } else {
                ("24", &[])
            };
            let (host, guest) = (format!("{host}/{prefix}"), format!("{guest}/{prefix}"));
            ip(&[&["address", "add", &host, "dev", &outside], flags].concat())?;
            self.ip(&[&["address", "add", &guest, "dev", inside], flags].concat())?;
        }
        ip(&["link", "set", &outside, "up"])?;
        self.ip(&["link", "set", inside, "up"])?;
        Ok(())
    }

    /// Removes a pair.
    pub fn remove_pair(&self, inside: &str) -> Result<()> {
        ip(&["link", "delete", &self.outside(inside)])?;
        Ok(())
    }

    /// The name of a pair's end on the host.
    fn outside(&self, inside: &str) -> String {
        format!("{}-{inside}", self.name)
    }

    /// Does `work` in it, on a thread of its own. A socket stays in the namespace that it was made
    /// in.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = File::open(self.path())?;
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind)?;
                io::Result::Ok(work())
            });
            inside.join().map_err(|_| anyhow!("panicked"))
        })?
        .with_context(|| format!("entering {}", self.path()))
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs `ip` in it.
    pub fn ip(&self, arguments: &[&str]) -> Result<Output> {
        ip(&[&["-netns", &self.name], arguments].concat())
    }

    /// All that a runtime may have left in it: interfaces, their addresses, and traffic control.
    /// Nothing that changes by itself.
    pub fn state(&self) -> Result<String> {
        let addresses = self.ip(&["-oneline", "address", "show", "scope", "global"])?;
        let links = self.ip(&["-oneline", "link"])?.text();
        let names: Vec<_> = links
            .lines()
            .filter_map(|it| it.split(':').nth(1))
            .collect();
        let mut command = Command::new("tc");
        command.args(["-netns", &self.name, "qdisc"]);
        let qdiscs = run(&mut command)?.text();
        Ok([addresses.text(), names.join("\n"), qdiscs].join("\n"))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Its interfaces end with it, and their other ends with them; but not at once.
        for inside in ["eth0", "net1"] {
            let _ = ip(&["link", "delete", &self.outside(inside)]);
        }
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// Runs `ip`, which must succeed.
pub fn ip(arguments: &[&str]) -> Result<Output> {
    run(Command::new("ip").args(arguments))
}

fn run(command: &mut Command) -> Result<Output> {
    let mut running = Running::start(command)?;
    running.close_stdin();
    let output = running.finish(LIMIT)?;
    ensure!(output.code == Some(0), "{output}");
    Ok(output)
}
