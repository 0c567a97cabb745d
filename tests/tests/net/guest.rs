// SPDX-License-Identifier: Apache-2.0
//! The guest's init: services on its network, and a control channel on vsock.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use tests::machine::{POWER_OFF, READY};
use tests::netlink::Interface;
use tests::pattern::{Digest, Pattern, read_line};
use tests::wait;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::wire::{CONTROL, ECHO, PATIENCE, SINK, SOURCE};

/// Serves until the machine is powered off.
pub(crate) fn run() -> ! {
    if let Err(error) = start() {
        eprintln!("guest: {error:#}");
    }
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn start() -> Result<()> {
    for (kind, place) in [("sysfs", "/sys"), ("proc", "/proc")] {
        mount(kind, place, kind, MountFlags::empty(), None)
            .with_context(|| format!("mounting {place}"))?;
    }
    tcp(ECHO, echo)?;
    tcp(SINK, sink)?;
    tcp(SOURCE, source)?;
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO))?;
    thread::spawn(move || udp_echo(&udp));
    let control = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, CONTROL)?;
    thread::spawn(move || {
        for mut stream in control.incoming().flatten() {
            thread::spawn(move || {
                while let Ok(line) = read_line(&mut stream)
                    && !line.is_empty()
                {
                    let answer = match obey(line.trim()) {
                        Ok(answer) => format!("ok {answer}\n"),
                        Err(error) => format!("failed: {error:#}\n"),
                    };
                    if stream.write_all(answer.as_bytes()).is_err() {
                        break;
                    }
                }
            });
        }
    });
    let end = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, POWER_OFF)?;
    thread::spawn(move || {
        if end.accept().is_ok() {
            let _ = reboot(RebootCommand::PowerOff);
        }
    });
    // Closed at once: it says that the others listen.
    vsock::VsockStream::connect_with_cid_port(VMADDR_CID_HOST, READY)?;
    Ok(())
}

/// Carries out a line of the control channel and returns its answer, one line.
fn obey(line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["up", name, address] => {
            wait_until(name, true)?;
            let interface = Interface::named(name)?;
            interface.up(None)?;
            interface.add_address(address.parse()?, 24)?;
            Ok(String::new())
        }
        ["await", name] => wait_until(name, true).map(|()| String::new()),
        ["await-gone", name] => wait_until(name, false).map(|()| String::new()),
        ["read", name, file] => {
            let text = fs::read_to_string(Path::new("/sys/class/net").join(name).join(file));
            Ok(text?.trim().to_owned())
        }
        ["list", name, folder] => {
            let entries = fs::read_dir(Path::new("/sys/class/net").join(name).join(folder))?;
            let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            Ok(names.collect::<Result<Vec<_>>>()?.join(" "))
        }
        ["interrupts", device] => {
            let text = fs::read_to_string("/proc/interrupts")?;
            let lines = text.lines().filter(|line| line.contains(device));
            Ok(lines.collect::<Vec<_>>().join(";"))
        }
        ["send", address, len] => {
            let mut stream = TcpStream::connect(address)?;
            Pattern::new().send(&mut stream, len.parse()?)?;
            stream.shutdown(Shutdown::Write)?;
            // The host closes when it has read everything.
            stream.read_to_end(&mut Vec::new())?;
            Ok(String::new())
        }
        _ => bail!("what is {line:?}?"),
    }
}

fn wait_until(name: &str, there: bool) -> Result<()> {
    let path = Path::new("/sys/class/net").join(name);
    let what = format!("{name} {}", if there { "comes" } else { "goes" });
    wait::until(&what, PATIENCE, || {
        Ok((path.exists() == there).then_some(()))
    })
}

fn tcp(port: u16, service: fn(TcpStream) -> Result<()>) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                if let Err(error) = service(stream) {
                    eprintln!("guest: {error:#}");
                }
            });
        }
    });
    Ok(())
}

fn echo(mut stream: TcpStream) -> Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            count => stream.write_all(chunk.get(..count).unwrap_or_default())?,
        }
    }
}

fn sink(mut stream: TcpStream) -> Result<()> {
    let digest = Digest::of(&mut stream)?;
    Ok(stream.write_all(&digest.to_bytes())?)
}

fn source(mut stream: TcpStream) -> Result<()> {
    let mut len = [0; 8];
    stream.read_exact(&mut len)?;
    Pattern::new().send(&mut stream, u64::from_le_bytes(len))?;
    stream.shutdown(Shutdown::Write)?;
    // The host closes when it has read everything.
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn udp_echo(socket: &UdpSocket) {
    let mut datagram = vec![0; 65536];
    while let Ok((len, from)) = socket.recv_from(&mut datagram) {
        let _ = socket.send_to(datagram.get(..len).unwrap_or_default(), from);
    }
}
