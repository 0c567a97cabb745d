// SPDX-License-Identifier: Apache-2.0
//! The guest's init: one thread a connection, errors to the console.

use std::io::{Read, Result, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use rustix::system::{RebootCommand, reboot};
use tests::machine::{POWER_OFF, READY};
use tests::pattern::{Digest, Pattern, read_line};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::stream::{DIAL, ECHO, FLOOD, PIPE_BROKE, SINK, SOURCE};

type Service = fn(VsockStream) -> Result<()>;

const SERVICES: [(u32, Service); 6] = [
    (ECHO, echo),
    (SINK, sink),
    (SOURCE, source),
    (DIAL, dial),
    (FLOOD, flood),
    (POWER_OFF, power_off),
];

/// Serves until the machine is powered off.
pub(crate) fn run() -> ! {
    for (port, service) in SERVICES {
        match VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port) {
            Ok(listener) => {
                thread::spawn(move || serve(&listener, service));
            }
            Err(error) => eprintln!("guest: can't listen on port {port}: {error}"),
        }
    }
    // Closed at once: it says that the others listen.
    if let Err(error) = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, READY) {
        eprintln!("guest: can't tell the host: {error}");
    }
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn serve(listener: &VsockListener, service: Service) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            if let Err(error) = service(stream) {
                eprintln!("guest: {error}");
            }
        });
    }
}

fn echo(mut stream: VsockStream) -> Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            count => stream.write_all(chunk.get(..count).unwrap_or_default())?,
        }
    }
}

fn sink(mut stream: VsockStream) -> Result<()> {
    let digest = Digest::of(&mut stream)?;
    stream.write_all(&digest.to_bytes())
}

fn source(mut stream: VsockStream) -> Result<()> {
    let mut len = [0; 8];
    stream.read_exact(&mut len)?;
    Pattern::new().send(&mut stream, u64::from_le_bytes(len))?;
    stream.shutdown(Shutdown::Write)?;
    // The host closes when it has read everything.
    stream.read(&mut [0]).map(drop)
}

fn dial(mut stream: VsockStream) -> Result<()> {
    let line = read_line(&mut stream)?;
    let mut words = line.split_whitespace().map(str::parse::<u32>);
    let (Some(Ok(port)), Some(Ok(count))) = (words.next(), words.next()) else {
        return writeln!(stream, "what?");
    };
    let calls: Vec<_> = (0..count)
        .map(|number| thread::spawn(move || call(port, number)))
        .collect();
    let answered = calls
        .into_iter()
        .filter_map(|call| call.join().ok()?.ok())
        .filter(|same| *same)
        .count();
    writeln!(stream, "{answered}")
}

/// Whether the host gives back what it is told.
fn call(port: u32, number: u32) -> Result<bool> {
    let mut stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
    stream.write_all(&number.to_le_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer == number.to_le_bytes())
}

fn flood(mut stream: VsockStream) -> Result<()> {
    let broke = Pattern::new().send(&mut stream, u64::MAX);
    drop(stream);
    let mut host = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, PIPE_BROKE)?;
    match broke {
        Ok(()) => host.write_all(b"no end"),
        Err(error) => write!(host, "{:?}", error.kind()),
    }
}

fn power_off(_stream: VsockStream) -> Result<()> {
    Ok(reboot(RebootCommand::PowerOff)?)
}
