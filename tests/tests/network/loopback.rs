// SPDX-License-Identifier: Apache-2.0
//! Connections that are made to the namespace's own loopback interface, as containerd makes them
//! for a port-forward.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use tests::ctr::LIMIT;
use tests::netns::Netns;
use tests::scenario::{Outcome, vm_scenario};
use tests::wait::until;

/// More than buffers on the way hold.
const BULK: usize = 4 << 20;

/// Servers of a page, each at an address of one kind, and one that answers with what it is sent.
const SERVERS: &str = "mkdir /www; echo served > /www/page
    for at in 127.0.0.1:7001 [::1]:7002 10.99.0.2:7003; do httpd -p $at -h /www; done
    nc -ll -p 7004 -e cat &
    until [ $(netstat -ltn | grep -c ':700') = 4 ]; do sleep 0.1; done
    echo up; wait";

fn connect(pod: &Netns, port: u16) -> Result<TcpStream> {
    let stream = pod.within(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)))??;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Gets the page.
fn get(mut stream: TcpStream) -> Result<()> {
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    ensure!(page.ends_with("served\n"), "{page:?}");
    Ok(())
}

/// Sends much and reads it all back, each direction ending by itself.
fn echo(mut stream: TcpStream) -> Result<()> {
    let sent: Vec<u8> = (0..=u8::MAX).cycle().take(BULK).collect();
    let mut writer = stream.try_clone()?;
    let bytes = sent.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&bytes)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    ensure!(received == sent, "{} bytes came back", received.len());
    writing
        .join()
        .map_err(|_| anyhow::anyhow!("panicked"))?
        .context("writing")
}

/// Connects where nobody listens in the guest: a reset, never an answer.
fn refused(pod: &Netns, port: u16) -> Result<()> {
    let mut stream = connect(pod, port)?;
    match stream.read(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => bail!("port {port}: {other:?}"),
    }
}

#[test]
fn servers_of_the_guest_are_reached_by_the_namespace_s_loopback() -> Outcome {
    vm_scenario(
        "servers_of_the_guest_are_reached_by_the_namespace_s_loopback",
        |ctr| {
            let pod = Netns::wired("nutshell-n", 1500)?;
            let id = "net-loopback";
            let argv = ["sh", "-c", SERVERS];
            let container = ctr.start_run(&["--with-ns", &pod.flag()], id, &argv)?;
            container.wait_for_stdout("up", LIMIT)?;
            for port in [7001, 7002] {
                get(connect(&pod, port)?).with_context(|| format!("port {port}"))?;
            }
            // Not on the loopback interface, and nowhere.
            for port in [7003, 81] {
                refused(&pod, port)?;
            }
            echo(connect(&pod, 7004)?)?;
            // One that is open until the machine ends, which ends it.
            let mut last = connect(&pod, 7004)?;
            last.write_all(b"hello")?;
            last.read_exact(&mut [0; 5])?;
            ctr.kill(id, "KILL")?;
            container.finish(LIMIT)?;
            ensure!(
                !matches!(last.read(&mut [0]), Ok(1..)),
                "it answers after its end"
            );
            // And nobody takes any more.
            until("nobody to listen", LIMIT, || match connect(&pod, 7004) {
                Ok(_) => Ok(None),
                Err(error) => {
                    let error = error.downcast::<std::io::Error>()?;
                    ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
                    Ok(Some(()))
                }
            })
        },
    )
}
