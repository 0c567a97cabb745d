// SPDX-License-Identifier: Apache-2.0
//! What a namespace holds at the start is what the guest has, and packets pass both ways.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result, ensure};
use tests::configured::Configured;
use tests::ctr::{Ctr, LIMIT};
use tests::netns::{GUEST, HOST, Netns};
use tests::pattern::Pattern;
use tests::process::Output;
use tests::scenario::{Outcome, vm_scenario};
use tests::wait::until;

/// Bytes that are sent in one piece; more than a socket's buffer holds.
const BULK: u64 = 8 << 20;

/// Bytes that differ everywhere.
fn bulk() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Pattern::new().send(&mut bytes, BULK)?;
    Ok(bytes)
}

/// Sends `bulk` to whoever connects, at one address after the other.
fn serve(bulk: &[u8]) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for host in HOST {
        let address = SocketAddr::new(host.parse()?, 0);
        let listener = TcpListener::bind(address).with_context(|| format!("listen at {host}"))?;
        ports.push(listener.local_addr()?.port());
        let bulk = bulk.to_vec();
        // Ends with the test, whether somebody connects or not.
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.write_all(&bulk);
            }
        });
    }
    Ok(ports)
}

/// Pings the host, and takes what it sends, by both families. Each CPU has its queue.
fn transfer(ctr: &Ctr, id: &str, mtu: u32, cpus: &str) -> Result<()> {
    let pod = Netns::wired("nutshell-n", mtu)?;
    let before = pod.state()?;
    let bulk = bulk()?;
    let ports = serve(&bulk)?;
    let whole = mtu.saturating_sub(28).to_string();
    let script: Vec<String> = HOST
        .iter()
        .zip(&ports)
        .map(|(host, port)| {
            // As large as one packet can be, so that a smaller link on the way is seen.
            format!(
                "ping -c 1 -W 20 {host} >/dev/null || echo no answer of {host}
                 nc -w 30 {host} {port} </dev/null | md5sum"
            )
        })
        .chain([
            format!(
                "ping -c 1 -W 20 -s {whole} {} >/dev/null || echo no large packets",
                HOST[0]
            ),
            "cat /sys/class/net/eth0/mtu; ls -d /sys/class/net/eth0/queues/rx-* | wc -l".to_owned(),
        ])
        .collect();
    let flags = ["--cpus", cpus, "--with-ns", &pod.flag()];
    let output = ctr.run_script(&flags, id, &script.join("\n"))?;
    let sum = md5sum(&bulk)?;
    let expected = [sum.as_str(), &sum, &mtu.to_string(), cpus].join("\n");
    ensure!(output.text() == expected, "{output}\nexpected {expected}");
    output.quietly()?;
    until("the namespace as before", LIMIT, || {
        Ok((pod.state()? == before).then_some(()))
    })
}

fn md5sum(bytes: &[u8]) -> Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), bytes)?;
    let mut command = std::process::Command::new("md5sum");
    let text = command.stdin(file.reopen()?).output()?.stdout;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

#[test]
fn packets_pass_both_ways() -> Outcome {
    vm_scenario("packets_pass_both_ways", |ctr| {
        transfer(ctr, "net-1500", 1500, "1")
    })
}

#[test]
fn large_packets_pass_both_ways_by_two_queues() -> Outcome {
    vm_scenario("large_packets_pass_both_ways_by_two_queues", |ctr| {
        transfer(ctr, "net-9000", 9000, "2")
    })
}

#[test]
fn a_macvtap_does_the_same() -> Outcome {
    vm_scenario("a_macvtap_does_the_same", |ctr| {
        let host = Configured::with(ctr, "[runtime]\ninternetworking_model = \"macvtap\"\n")?;
        transfer(host.ctr(), "net-macvtap", 1500, "2")
    })
}

#[test]
fn without_a_model_there_is_no_network() -> Outcome {
    vm_scenario("without_a_model_there_is_no_network", |ctr| {
        let host = Configured::with(ctr, "[runtime]\ninternetworking_model = \"none\"\n")?;
        let pod = Netns::wired("nutshell-n", 1500)?;
        let script = "ls /sys/class/net";
        let output = host
            .ctr()
            .run_script(&["--with-ns", &pod.flag()], "net-none", script)?;
        ensure!(output.text() == "lo", "{output}");
        Ok(())
    })
}

/// The one line of a listing that begins so.
fn line<'a>(output: &'a Output, text: &'a str, start: &str) -> Result<&'a str> {
    text.lines()
        .map(str::trim)
        .find(|line| line.starts_with(start))
        .with_context(|| format!("{output}\nexpected a line {start:?}"))
}

#[test]
fn routes_and_neighbours_are_the_namespace_s() -> Outcome {
    vm_scenario("routes_and_neighbours_are_the_namespace_s", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        let mac = "02:00:00:00:99:02";
        pod.ip(&["link", "set", "eth0", "address", mac])?;
        let routes: [&[&str]; 3] = [
            &[
                "10.101.0.0/16",
                "via",
                HOST[0],
                "metric",
                "77",
                "mtu",
                "1300",
                "src",
                GUEST[0],
            ],
            &["10.102.0.1", "dev", "eth0", "scope", "link"],
            &[
                "10.103.0.0/16",
                "via",
                "10.104.0.1",
                "dev",
                "eth0",
                "onlink",
            ],
        ];
        for route in routes {
            pod.ip(&[&["route", "add"], route].concat())?;
        }
        let neighbour = "02:00:00:00:99:77";
        pod.ip(&[
            "neighbour",
            "add",
            "10.99.0.77",
            "lladdr",
            neighbour,
            "dev",
            "eth0",
        ])?;
        // The numbers of /proc/net/route are the kernel's own: no tool leaves any out.
        let script = "ip link show eth0; ip route; ip -6 route; ip neigh; cat /proc/net/route";
        let output = ctr
            .run_script(&["--with-ns", &pod.flag()], "net-routes", script)?
            .quietly()?;
        let text = output.text();
        let has = |start: &str, words: &[&str]| {
            let line = line(&output, &text, start)?;
            let missing = words.iter().find(|word| !line.contains(**word));
            ensure!(
                missing.is_none(),
                "{output}\nexpected {missing:?} in {line:?}"
            );
            Ok(())
        };
        has("link/ether", &[mac])?;
        has("default via 10.99.0.1", &["dev eth0"])?;
        has("default via fd00:99::1", &["dev eth0"])?;
        has("10.101.0.0/16", &["via 10.99.0.1", "src 10.99.0.2"])?;
        has("10.102.0.1 dev eth0", &["scope link"])?;
        has("10.103.0.0/16", &["via 10.104.0.1"])?;
        has("10.99.0.77", &[neighbour, "PERMANENT"])?;
        // 10.101.0.0 in the order of the machine; columns: interface, destination, gateway, flags,
        // references, use, metric, mask, MTU.
        let raw = line(&output, &text, "eth0\t0000650A")?;
        let fields: Vec<&str> = raw.split_whitespace().collect();
        ensure!(
            fields.get(6) == Some(&"77"),
            "{output}\nthe metric in {raw:?}"
        );
        Ok(())
    })
}

#[test]
fn a_server_in_the_guest_is_reached() -> Outcome {
    vm_scenario("a_server_in_the_guest_is_reached", |ctr| {
        let pod = Netns::wired("nutshell-n", 1500)?;
        let id = "net-server";
        let script = "mkdir /www && echo served > /www/page && exec httpd -f -p 80 -h /www";
        ctr.run_detached(&["--with-ns", &pod.flag()], id, &["sh", "-c", script])?;
        for guest in GUEST {
            let address = SocketAddr::new(guest.parse()?, 80);
            let answer = until("an answer of the server", LIMIT, || {
                let Ok(mut stream) = TcpStream::connect_timeout(&address, LIMIT) else {
                    return Ok(None);
                };
                stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(Some(answer))
            })?;
            ensure!(answer.ends_with("served\n"), "{guest} answers {answer:?}");
        }
        ctr.kill(id, "KILL")?;
        ctr.wait_for_status(id, "STOPPED", LIMIT)?;
        ctr.delete(id).map(|_| ())
    })
}
