// SPDX-License-Identifier: Apache-2.0
//! What the streams must do.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use tests::machine::Machine;
use tests::pattern::{Digest, Pattern, read_line};

use crate::stream::{DIAL, ECHO, FLOOD, NOBODY, PIPE_BROKE, SINK, SOURCE};

type Scenario = fn(&Machine) -> Result<()>;

/// All of them, in the order in which they run.
pub(crate) const ALL: [(&str, Scenario); 12] = [
    ("a_word_comes_back", a_word_comes_back),
    ("any_case_and_early_bytes", any_case_and_early_bytes),
    ("nobody_listens", nobody_listens),
    (
        "bulk_to_the_guest_then_half_close",
        bulk_to_the_guest_then_half_close,
    ),
    (
        "bulk_to_the_host_then_half_close",
        bulk_to_the_host_then_half_close,
    ),
    ("bulk_both_ways_at_once", bulk_both_ways_at_once),
    ("one_after_the_other", one_after_the_other),
    ("many_at_once", many_at_once),
    ("the_guest_dials", the_guest_dials),
    (
        "the_host_hangs_up_on_the_guest",
        the_host_hangs_up_on_the_guest,
    ),
    (
        "a_slow_host_holds_up_nobody_else",
        a_slow_host_holds_up_nobody_else,
    ),
    (
        "a_host_that_leaves_breaks_the_guests_pipe",
        a_host_that_leaves_breaks_the_guests_pipe,
    ),
];

const BULK: u64 = 16 << 20;

fn a_word_comes_back(machine: &Machine) -> Result<()> {
    let mut stream = machine.connect(ECHO)?;
    expect_echo(&mut stream, b"hello")
}

fn any_case_and_early_bytes(machine: &Machine) -> Result<()> {
    let mut stream = machine.dial()?;
    stream.write_all(format!("connect {ECHO}\nearly").as_bytes())?;
    ensure!(read_line(&mut stream)?.starts_with("OK "));
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)?;
    ensure!(&answer == b"early");
    Ok(())
}

fn nobody_listens(machine: &Machine) -> Result<()> {
    let mut stream = machine.dial()?;
    writeln!(stream, "CONNECT {NOBODY}")?;
    ensure!(read_line(&mut stream)?.is_empty());
    Ok(())
}

fn bulk_to_the_guest_then_half_close(machine: &Machine) -> Result<()> {
    let mut stream = machine.connect(SINK)?;
    let begin = Instant::now();
    Pattern::new().send(&mut stream, BULK)?;
    stream.shutdown(Shutdown::Write)?;
    let mut digest = [0; 16];
    stream.read_exact(&mut digest)?;
    report("host to guest", BULK, begin);
    ensure!(digest == Digest::of_pattern(BULK).to_bytes());
    Ok(())
}

fn bulk_to_the_host_then_half_close(machine: &Machine) -> Result<()> {
    let mut stream = machine.connect(SOURCE)?;
    let begin = Instant::now();
    stream.write_all(&BULK.to_le_bytes())?;
    let digest = Digest::of(&mut stream)?;
    report("guest to host", BULK, begin);
    ensure!(digest == Digest::of_pattern(BULK), "{digest:?}");
    Ok(())
}

fn bulk_both_ways_at_once(machine: &Machine) -> Result<()> {
    let mut stream = machine.connect(ECHO)?;
    let mut writer = stream.try_clone()?;
    let sent = thread::spawn(move || {
        Pattern::new().send(&mut writer, BULK)?;
        writer.shutdown(Shutdown::Write)
    });
    let digest = Digest::of(&mut stream)?;
    join(sent)??;
    ensure!(digest == Digest::of_pattern(BULK), "{digest:?}");
    Ok(())
}

fn one_after_the_other(machine: &Machine) -> Result<()> {
    for round in 0..200_u32 {
        let mut stream = machine.connect(ECHO)?;
        expect_echo(&mut stream, &round.to_le_bytes())?;
    }
    Ok(())
}

fn many_at_once(machine: &Machine) -> Result<()> {
    let mut streams = Vec::new();
    for number in 0..200_u32 {
        let stream = machine.connect(ECHO);
        streams.push((number, stream.with_context(|| format!("stream {number}"))?));
    }
    for (number, stream) in &mut streams {
        stream.write_all(&number.to_le_bytes())?;
    }
    for (number, mut stream) in streams {
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        ensure!(answer == number.to_le_bytes(), "stream {number}");
        stream.shutdown(Shutdown::Write)?;
        ensure!(stream.read(&mut answer)? == 0, "stream {number} has no end");
    }
    Ok(())
}

fn the_guest_dials(machine: &Machine) -> Result<()> {
    const COUNT: usize = 50;
    const PORT: u32 = 5000;
    let mut control = machine.connect(DIAL)?;
    writeln!(control, "{PORT} {COUNT}")?;
    for _ in 0..COUNT {
        let mut stream = machine.accept(PORT)?;
        thread::spawn(move || {
            let mut word = Vec::new();
            stream.read_to_end(&mut word)?;
            stream.write_all(&word)
        });
    }
    let answered = read_line(&mut control)?;
    ensure!(answered.trim() == COUNT.to_string(), "{answered:?}");
    Ok(())
}

fn the_host_hangs_up_on_the_guest(machine: &Machine) -> Result<()> {
    const PORT: u32 = 5001;
    let mut control = machine.connect(DIAL)?;
    writeln!(control, "{PORT} 1")?;
    drop(machine.accept(PORT)?);
    let answered = read_line(&mut control)?;
    ensure!(answered == "0\n", "{answered:?}");
    Ok(())
}

fn a_slow_host_holds_up_nobody_else(machine: &Machine) -> Result<()> {
    let mut slow = machine.connect(SOURCE)?;
    slow.write_all(&BULK.to_le_bytes())?;
    thread::sleep(Duration::from_millis(300));
    for _ in 0..10 {
        let mut stream = machine.connect(ECHO)?;
        expect_echo(&mut stream, b"still there?")?;
    }
    let digest = Digest::of(&mut slow)?;
    ensure!(digest == Digest::of_pattern(BULK), "{digest:?}");
    Ok(())
}

fn a_host_that_leaves_breaks_the_guests_pipe(machine: &Machine) -> Result<()> {
    let mut stream = machine.connect(FLOOD)?;
    stream.read_exact(&mut [0; 100_000])?;
    drop(stream);
    let mut verdict = String::new();
    machine.accept(PIPE_BROKE)?.read_to_string(&mut verdict)?;
    let kinds = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].map(|it| format!("{it:?}"));
    ensure!(kinds.contains(&verdict), "{verdict}");
    Ok(())
}

fn expect_echo(stream: &mut (impl Read + Write), word: &[u8]) -> Result<()> {
    stream.write_all(word)?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer)?;
    ensure!(answer == word, "{answer:?}");
    Ok(())
}

fn join<T>(thread: thread::JoinHandle<T>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn report(what: &str, bytes: u64, begin: Instant) {
    let mib = bytes as f64 / f64::from(1 << 20);
    let rate = mib / begin.elapsed().as_secs_f64();
    println!("{what}: {rate:.1} MiB/s");
}
