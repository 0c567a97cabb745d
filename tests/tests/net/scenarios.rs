// SPDX-License-Identifier: Apache-2.0
//! What the wire must do.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::net::ipproto::ICMP;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};
use tests::netlink::Interface;
use tests::pattern::{Digest, Pattern};
use tests::wait;
use vmm::control::Request;

use crate::wire::{Card, ECHO, PATIENCE, Plan, SINK, SOURCE, Scenario, Wire, host_counters};

/// What every card must do.
const TRAFFIC: &[(&str, Scenario)] = &[
    ("the_guest_knows_its_card", the_guest_knows_its_card),
    ("pings_come_back", pings_come_back),
    ("datagrams_come_back", datagrams_come_back),
    ("bulk_to_the_guest", bulk_to_the_guest),
    ("bulk_to_the_host", bulk_to_the_host),
    ("bulk_both_ways_at_once", bulk_both_ways_at_once),
    ("segments_cross_whole", segments_cross_whole),
    ("both_sides_count_the_same", both_sides_count_the_same),
    ("many_streams_at_once", many_streams_at_once),
    ("a_pause_loses_nothing", a_pause_loses_nothing),
];

/// What ends in a card of no use.
const LAST: &[(&str, Scenario)] = &[("a_tap_that_goes_pulls_the_cable", a_tap_that_goes)];

const QUEUES: &[(&str, Scenario)] = &[("both_queues_are_used", both_queues_are_used)];

const BULK: u64 = 16 << 20;

/// A card that comes and goes.
const HOT: &[(&str, Scenario)] = &[
    ("a_card_is_plugged_in", a_card_is_plugged_in),
    ("pings_come_back", pings_come_back),
    ("bulk_both_ways_at_once", bulk_both_ways_at_once),
    ("both_sides_count_the_same", both_sides_count_the_same),
    ("it_is_pulled_out_under_load", it_is_pulled_out_under_load),
    ("a_card_is_plugged_in_again", a_card_is_plugged_in),
    ("pings_come_back_again", pings_come_back),
    ("what_is_not_there_stays", what_is_not_there_stays),
    ("it_is_pulled_out", it_is_pulled_out),
    ("all_slots_are_used_and_left", all_slots_are_used_and_left),
];

const LIMITS: &[(&str, Scenario)] = &[
    ("pings_come_back", pings_come_back),
    ("each_way_has_its_limit", each_way_has_its_limit),
    ("many_streams_share_it", many_streams_share_it),
];

const COLD: &[(&str, Scenario)] = &[("it_is_pulled_out", it_is_pulled_out)];

const KERNEL: &[(&str, Scenario)] =
    &[("the_kernel_moves_the_packets", the_kernel_moves_the_packets)];

/// The same card once more, after it was pulled out.
const KERNEL_HOT: &[(&str, Scenario)] = &[
    ("nobody_moves_packets", nobody_moves_packets),
    ("a_card_is_plugged_in", a_card_is_plugged_in),
    ("pings_come_back_again", pings_come_back),
    ("the_kernel_moves_them", the_kernel_moves_the_packets),
    ("it_is_pulled_out_under_load", it_is_pulled_out_under_load),
    ("nobody_moves_packets_any_more", nobody_moves_packets),
];

pub(crate) const PLANS: &[Plan] = &[
    Plan {
        name: "userspace",
        vcpus: 1,
        cards: &[Card {
            number: 1,
            ..Card::PLAIN
        }],
        scenarios: &[TRAFFIC, LAST],
    },
    Plan {
        name: "jumbo_two_queues",
        vcpus: 2,
        cards: &[Card {
            number: 2,
            mtu: 9000,
            queues: 2,
            ..Card::PLAIN
        }],
        scenarios: &[TRAFFIC, QUEUES, COLD],
    },
    Plan {
        name: "vhost",
        vcpus: 1,
        cards: &[Card {
            number: 3,
            vhost: true,
            ..Card::PLAIN
        }],
        scenarios: &[TRAFFIC, KERNEL, COLD, KERNEL_HOT],
    },
    Plan {
        name: "vhost_two_queues",
        vcpus: 2,
        cards: &[Card {
            number: 4,
            mtu: 9000,
            queues: 2,
            vhost: true,
            ..Card::PLAIN
        }],
        scenarios: &[TRAFFIC, QUEUES, KERNEL],
    },
    Plan {
        name: "limited",
        vcpus: 2,
        cards: &[Card {
            number: 5,
            queues: 2,
            receive: 1 << 20,
            transmit: 1 << 19,
            ..Card::PLAIN
        }],
        scenarios: &[LIMITS],
    },
    Plan {
        name: "hot",
        vcpus: 2,
        cards: &[],
        scenarios: &[HOT],
    },
];

fn the_guest_knows_its_card(wire: &mut Wire) -> Result<()> {
    let bytes = wire.card.mac().map(|byte| format!("{byte:02x}"));
    let expected = [
        ("address", bytes.join(":")),
        ("mtu", wire.card.mtu.to_string()),
        ("carrier", "1".to_owned()),
    ];
    for (file, expected) in expected {
        let found = wire.tell(&format!("read eth0 {file}"))?;
        ensure!(found == expected, "{file} is {found}, not {expected}");
    }
    Ok(())
}

fn pings_come_back(wire: &mut Wire) -> Result<()> {
    // The largest that fits one packet, and one that takes several.
    let whole = usize::from(wire.card.mtu).saturating_sub(28);
    for len in [1, 56, whole, 20_000] {
        ping(wire.card.guest(), len).with_context(|| format!("{len} bytes"))?;
    }
    Ok(())
}

/// Sends an echo request with `len` bytes of data and waits for its reply.
fn ping(guest: Ipv4Addr, len: usize) -> Result<()> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(ICMP),
    )?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    let mut request = vec![8, 0, 0, 0, 0x12, 0x34];
    request.extend(u16::try_from(len)?.to_be_bytes());
    request.extend((0..len).map(|at| at.to_le_bytes()[0]));
    let sum = checksum(&request);
    request.splice(2..4, sum.to_be_bytes());
    let to = SocketAddrV4::new(guest, 0);
    sendto(&socket, &request, SendFlags::empty(), &to)?;
    let mut packet = vec![0; 65536];
    loop {
        let (received, _) = recv(&socket, &mut packet[..], RecvFlags::empty())?;
        // Behind an IP header without options; others' replies come here as well.
        let reply = packet.get(20..received).unwrap_or_default();
        if reply.first() == Some(&0) && reply.get(4..8) == request.get(4..8) {
            ensure!(reply.get(8..) == request.get(8..), "other data came back");
            return Ok(());
        }
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for word in bytes.chunks(2) {
        let low = word.get(1).copied().unwrap_or_default();
        let word = u16::from_be_bytes([word.first().copied().unwrap_or_default(), low]);
        sum = sum.saturating_add(word.into());
    }
    while let Some(carry) = sum.checked_shr(16).filter(|carry| *carry > 0) {
        sum = (sum & 0xffff).saturating_add(carry);
    }
    u16::try_from(sum).map_or(0, |sum| !sum)
}

fn datagrams_come_back(wire: &mut Wire) -> Result<()> {
    let socket = UdpSocket::bind((wire.card.host(), 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect((wire.card.guest(), ECHO))?;
    let whole = usize::from(wire.card.mtu).saturating_sub(28);
    let mut answer = vec![0; 65536];
    for len in [0, 1, 100, whole, whole.saturating_add(1), 60_000] {
        let datagram: Vec<u8> = (0..len).map(|at| at.to_le_bytes()[0]).collect();
        socket.send(&datagram)?;
        let received = socket.recv(&mut answer);
        let received = received.with_context(|| format!("{len} bytes"))?;
        ensure!(answer.get(..received) == Some(&datagram), "{len} bytes");
    }
    Ok(())
}

fn bulk_to_the_guest(wire: &mut Wire) -> Result<()> {
    let begin = Instant::now();
    push(wire.card, BULK)?;
    report("to the guest", BULK, begin);
    Ok(())
}

fn push(card: Card, len: u64) -> Result<()> {
    let mut stream = card.connect(SINK)?;
    Pattern::new().send(&mut stream, len)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; 16];
    stream.read_exact(&mut answer)?;
    ensure!(answer == Digest::of_pattern(len).to_bytes(), "{answer:?}");
    Ok(())
}

fn bulk_to_the_host(wire: &mut Wire) -> Result<()> {
    let begin = Instant::now();
    pull(wire.card, BULK)?;
    report("to the host", BULK, begin);
    Ok(())
}

fn pull(card: Card, len: u64) -> Result<()> {
    let mut stream = card.connect(SOURCE)?;
    stream.write_all(&len.to_le_bytes())?;
    let digest = Digest::of(&mut stream)?;
    ensure!(digest == Digest::of_pattern(len), "{digest:?}");
    Ok(())
}

/// What takes two seconds at the card's limits takes no less, and all of it arrives.
fn each_way_has_its_limit(wire: &mut Wire) -> Result<()> {
    let card = wire.card;
    let least = Duration::from_millis(1800);
    type Transfer = fn(Card, u64) -> Result<()>;
    let ways: [(&str, Transfer, u64); 2] = [
        ("to the guest", push, card.receive),
        ("to the host", pull, card.transmit),
    ];
    for (what, transfer, rate) in ways {
        let begin = Instant::now();
        transfer(card, rate.saturating_mul(2))?;
        let took = begin.elapsed();
        ensure!(took >= least, "{what}: {took:?}");
        report(what, rate.saturating_mul(2), begin);
    }
    Ok(())
}

/// However many queues they come by.
fn many_streams_share_it(wire: &mut Wire) -> Result<()> {
    let card = wire.card;
    let begin = Instant::now();
    let streams = [(); 4].map(|()| thread::spawn(move || push(card, card.receive / 2)));
    for stream in streams {
        let pushed = stream.join();
        pushed.map_err(|_| anyhow!("a thread panicked"))??;
    }
    let took = begin.elapsed();
    ensure!(took >= Duration::from_millis(1800), "{took:?}");
    Ok(())
}

fn bulk_both_ways_at_once(wire: &mut Wire) -> Result<()> {
    let begin = Instant::now();
    let card = wire.card;
    thread::scope(|scope| {
        let there = scope.spawn(move || push(card, BULK));
        let back = scope.spawn(move || pull(card, BULK));
        for side in [there, back] {
            side.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    report("both ways", BULK.saturating_mul(2), begin);
    Ok(())
}

/// Segmentation is left to the other side: packets are longer than the link's own limit.
fn segments_cross_whole(wire: &mut Wire) -> Result<()> {
    let limit = u64::from(wire.card.mtu).saturating_add(18);
    let (before_packets, before_bytes) = (
        wire.guest_counter("rx_packets")?,
        wire.guest_counter("rx_bytes")?,
    );
    push(wire.card, BULK)?;
    let packets = wire
        .guest_counter("rx_packets")?
        .saturating_sub(before_packets);
    let bytes = wire.guest_counter("rx_bytes")?.saturating_sub(before_bytes);
    let mean = bytes.checked_div(packets).context("no packets")?;
    ensure!(mean > limit, "the guest got {mean} bytes a packet");
    let before = host_counters(wire.card)?.received;
    pull(wire.card, BULK)?;
    let after = host_counters(wire.card)?.received;
    let (packets, bytes) = (
        after.0.saturating_sub(before.0),
        after.1.saturating_sub(before.1),
    );
    let mean = bytes.checked_div(packets).context("no packets")?;
    ensure!(mean > limit, "the host got {mean} bytes a packet");
    Ok(())
}

fn both_sides_count_the_same(wire: &mut Wire) -> Result<()> {
    // A packet may still be on its way: until they agree.
    wait::until("the counters agree", PATIENCE, || {
        let host = host_counters(wire.card)?;
        let (received, sent) = (
            wire.guest_counter("rx_packets")?,
            wire.guest_counter("tx_packets")?,
        );
        Ok((host.sent.0 == received && host.received.0 == sent).then_some(()))
    })?;
    for counter in ["rx_errors", "rx_dropped", "tx_errors", "tx_dropped"] {
        let count = wire.guest_counter(counter)?;
        ensure!(count == 0, "{counter} is {count}");
    }
    Ok(())
}

fn many_streams_at_once(wire: &mut Wire) -> Result<()> {
    let mut streams = Vec::new();
    for number in 0..64_u32 {
        streams.push((number, wire.card.connect(ECHO)?));
    }
    for (number, stream) in &mut streams {
        stream.write_all(&number.to_le_bytes())?;
    }
    for (number, mut stream) in streams {
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        ensure!(answer == number.to_le_bytes(), "stream {number}");
    }
    Ok(())
}

fn a_pause_loses_nothing(wire: &mut Wire) -> Result<()> {
    let mut stream = wire.card.connect(SINK)?;
    let writer = thread::spawn(move || {
        Pattern::new().send(&mut stream, BULK)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    });
    for _ in 0..3 {
        wire.machine.ask(&Request::Pause, &[])?;
        wire.machine.ask(&Request::Resume, &[])?;
    }
    let answer = writer.join().map_err(|_| anyhow!("a thread panicked"))??;
    ensure!(answer == Digest::of_pattern(BULK).to_bytes(), "{answer:?}");
    // And the other way round: the guest calls.
    let listener = TcpListener::bind((wire.card.host(), 0))?;
    let address = listener.local_addr()?;
    let reader = thread::spawn(move || Digest::of(&mut listener.accept()?.0));
    wire.tell(&format!("send {address} {BULK}"))?;
    let digest = reader.join().map_err(|_| anyhow!("a thread panicked"))??;
    ensure!(digest == Digest::of_pattern(BULK), "{digest:?}");
    Ok(())
}

fn both_queues_are_used(wire: &mut Wire) -> Result<()> {
    let queues = wire.tell("list eth0 queues")?;
    for queue in ["rx-0", "rx-1", "tx-0", "tx-1"] {
        ensure!(queues.split(' ').any(|name| name == queue), "{queues}");
    }
    // So many that they can't all have the same hash.
    many_streams_at_once(wire)?;
    let device = wire.tell("read eth0 device/uevent");
    let device = device.with_context(|| "the card's device".to_owned())?;
    let interrupts = wire.tell("interrupts -input.")?;
    let used = interrupts
        .split(';')
        .filter(|line| {
            line.split_whitespace()
                .skip(1)
                .map_while(|word| word.parse::<u64>().ok())
                .any(|count| count > 0)
        })
        .count();
    ensure!(used == 2, "interrupts of {device}: {interrupts}");
    Ok(())
}

fn a_tap_that_goes(wire: &mut Wire) -> Result<()> {
    Interface::named(&wire.card.tap_name())?.delete()?;
    wait::until("the guest sees no carrier", PATIENCE, || {
        Ok((wire.tell("read eth0 carrier")? == "0").then_some(()))
    })
}

fn a_card_is_plugged_in(wire: &mut Wire) -> Result<()> {
    wire.machine.attach(wire.card.cable()?)?;
    wire.tell(&format!("up eth0 {}", wire.card.guest()))?;
    the_guest_knows_its_card(wire)
}

fn it_is_pulled_out(wire: &mut Wire) -> Result<()> {
    detach(wire, wire.card)?;
    // What the guest says is so already: no waiting.
    ensure!(wire.tell("list . .")?.split(' ').all(|name| name != "eth0"));
    Ok(())
}

fn it_is_pulled_out_under_load(wire: &mut Wire) -> Result<()> {
    let card = wire.card;
    let mut stream = card.connect(SINK)?;
    let end = stream.try_clone()?;
    let writer = thread::spawn(move || Pattern::new().send(&mut stream, u64::MAX));
    // Under way for sure.
    let begin = host_counters(card)?.sent.1;
    wait::until("packets flow", PATIENCE, || {
        let now = host_counters(card)?.sent.1;
        Ok((now.saturating_sub(begin) > 1 << 20).then_some(()))
    })?;
    detach(wire, card)?;
    // TCP would go on trying for minutes.
    end.shutdown(Shutdown::Both)?;
    let sent = writer.join().map_err(|_| anyhow!("a thread panicked"))?;
    ensure!(sent.is_err(), "the stream came to an end of its own");
    // And the guest goes on.
    ensure!(wire.tell("list . .")?.split(' ').all(|name| name != "eth0"));
    Ok(())
}

fn the_kernel_moves_the_packets(wire: &mut Wire) -> Result<()> {
    let movers = movers(wire)?;
    ensure!(movers == wire.card.queues, "{movers} movers");
    Ok(())
}

fn nobody_moves_packets(wire: &mut Wire) -> Result<()> {
    wait::until("the end of the packet movers", PATIENCE, || {
        Ok((movers(wire)? == 0).then_some(()))
    })
}

/// The kernel's threads that move packets for the VMM: named after the thread of it that asked for
/// them, and since Linux 6.4 threads of its process.
fn movers(wire: &Wire) -> Result<usize> {
    let name = |path: PathBuf| {
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        name.trim().to_owned()
    };
    let mut threads = Vec::new();
    let mut own = 0_usize;
    for thread in fs::read_dir(format!("/proc/{}/task", wire.machine.pid()))? {
        let thread = thread?;
        if name(thread.path()).starts_with("vhost-") {
            own = own.saturating_add(1);
        }
        threads.push(format!("vhost-{}", thread.file_name().to_string_lossy()));
    }
    let all = fs::read_dir("/proc")?.filter_map(Result::ok);
    let kernel = all.filter(|process| threads.contains(&name(process.path())));
    Ok(kernel.count().max(own))
}

/// Pulls a card out: afterwards nobody has its tap.
fn detach(wire: &Wire, card: Card) -> Result<()> {
    let id = card.id();
    wire.machine.ask(&Request::DetachNet { id }, &[])?;
    let tap = Interface::named(&card.tap_name());
    ensure!(tap.is_err(), "the tap is still there");
    Ok(())
}

fn what_is_not_there_stays(wire: &mut Wire) -> Result<()> {
    let id = "nobody".to_owned();
    let refused = wire.machine.ask(&Request::DetachNet { id }, &[]);
    let text = refused.err().context("it was pulled out")?.to_string();
    ensure!(text.contains("net nobody"), "{text}");
    let mut again = wire.card.cable_of_name("tap99")?;
    again.id = wire.card.id();
    let refused = wire.machine.attach(again);
    let text = refused
        .err()
        .context("it was plugged in twice")?
        .to_string();
    ensure!(text.contains(&wire.card.id()), "{text}");
    Ok(())
}

fn all_slots_are_used_and_left(wire: &mut Wire) -> Result<()> {
    let cards: Vec<Card> = (10..35)
        .map(|number| Card {
            number,
            ..wire.card
        })
        .collect();
    let (last, cards) = cards.split_last().context("no cards")?;
    for card in cards {
        wire.machine.attach(card.cable()?)?;
    }
    let refused = wire.machine.attach(last.cable()?);
    let text = refused
        .err()
        .context("one more was plugged in")?
        .to_string();
    ensure!(text.contains("slots"), "{text}");
    for number in 0..cards.len() {
        wire.tell(&format!("await eth{number}"))?;
    }
    for card in cards {
        detach(wire, *card)?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn report(what: &str, bytes: u64, begin: Instant) {
    let mib = bytes as f64 / f64::from(1 << 20);
    let rate = mib / begin.elapsed().as_secs_f64();
    println!("{what}: {rate:.1} MiB/s");
}
