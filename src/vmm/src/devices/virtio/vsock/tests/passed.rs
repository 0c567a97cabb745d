// SPDX-License-Identifier: Apache-2.0
//! Streams whose host end is a descriptor that a host program passes.

use std::fs::File;
use std::io::{IoSlice, PipeReader, PipeWriter, pipe};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

impl Machine {
    /// A host program that has sent `text` with `files`.
    fn passing(&self, text: &str, files: &[BorrowedFd<'_>]) -> UnixStream {
        let mut host = self.host();
        host.write_all(b"passfd\n").unwrap();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
        let text = [IoSlice::new(text.as_bytes())];
        sendmsg(&host, &text, &mut control, SendFlags::empty()).unwrap();
        host
    }

    /// The same, with a guest that takes the stream; its host port too.
    fn open_passed(&mut self, text: &str, file: impl AsFd) -> (UnixStream, u32) {
        let mut host = self.passing(text, &[file.as_fd()]);
        let request = self.expect(REQUEST);
        assert_eq!(request.dst_port, 1027);
        self.send(&from_guest(1027, request.src_port, RESPONSE, 0), &[]);
        assert_eq!(read_line(&mut host), format!("OK {}\n", request.src_port));
        (host, request.src_port)
    }

    /// A stream into a pipe, and the pipe's other end.
    fn open_output(&mut self) -> (UnixStream, u32, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        let (host, port) = self.open_passed("1027 keep", writer);
        assert_eq!(self.expect(SHUTDOWN).flags, NO_MORE_WRITING);
        (host, port, reader)
    }

    fn open_input(&mut self, text: &str) -> (UnixStream, u32, PipeWriter) {
        let (reader, writer) = pipe().unwrap();
        let (host, port) = self.open_passed(text, reader);
        assert_eq!(self.expect(SHUTDOWN).flags, NO_MORE_READING);
        (host, port, writer)
    }
}

#[test]
fn what_the_guest_says_goes_into_a_pipe() {
    let mut machine = Machine::new();
    let (mut host, port, mut reader) = machine.open_output();
    machine.send(&from_guest(1027, port, DATA, 5), b"words");
    let mut word = [0; 5];
    reader.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"words");
    machine.close(1027, port);
    assert_eq!(reader.read(&mut word).unwrap(), 0);
    assert!(at_end(&mut host));
}

#[test]
fn what_comes_out_of_a_pipe_goes_to_the_guest() {
    let mut machine = Machine::new();
    let (mut host, port, mut writer) = machine.open_input("1027");
    // The socket has done its part.
    assert!(at_end(&mut host));
    drop(host);
    writer.write_all(b"words").unwrap();
    assert_eq!(machine.receive().1, b"words");
    writer.write_all(b"more").unwrap();
    drop(writer);
    assert_eq!(machine.receive().1, b"more");
    assert_eq!(machine.expect(SHUTDOWN).flags, 3);
    machine.send(&from_guest(1027, port, RESET, 0), &[]);
    machine.expect_silence();
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_its_own_stream_alone_and_loses_nothing() {
    let mut machine = Machine::new();
    let (mut host, port, mut reader) = machine.open_output();
    let mut sent = Vec::new();
    // More than a pipe holds.
    for _ in 0..3 {
        let data = pattern(65_000);
        machine.send(&from_guest(1027, port, DATA, data.len()), &data);
        sent.extend_from_slice(&data);
    }
    let (_host, other, mut other_reader) = machine.open_output();
    machine.send(&from_guest(1027, other, DATA, 5), b"other");
    let mut word = [0; 5];
    other_reader.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"other");

    machine.close(1027, port);
    // The stream is over for the guest, but not for the host.
    host.set_nonblocking(true).unwrap();
    let error = host.read(&mut word).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    host.set_nonblocking(false).unwrap();
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert!(all == sent);
    assert!(at_end(&mut host));
}

#[test]
fn a_host_that_hangs_up_ends_the_stream() {
    let mut machine = Machine::new();
    let (host, _, mut reader) = machine.open_output();
    drop(host);
    machine.expect(RESET);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);

    let (host, _, mut writer) = machine.open_input("1027 keep");
    drop(host);
    machine.expect(RESET);
    let error = writer.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);

    // Before the guest has answered, too.
    let (_reader, writer) = pipe().unwrap();
    let host = machine.passing("1027", &[writer.as_fd()]);
    machine.expect(REQUEST);
    drop(host);
    machine.expect(RESET);
}

#[test]
fn a_reader_that_leaves_is_told_to_the_guest() {
    let mut machine = Machine::new();
    let (mut host, port, reader) = machine.open_output();
    drop(reader);
    machine.send(&from_guest(1027, port, DATA, 5), b"words");
    assert_eq!(machine.expect(SHUTDOWN).flags, 3);
    machine.send(&from_guest(1027, port, RESET, 0), &[]);
    assert!(at_end(&mut host));
}

#[test]
fn what_is_passed_wrongly_is_refused() {
    let mut machine = Machine::new();
    let (reader, writer) = pipe().unwrap();
    let (one, two) = (reader.as_fd(), writer.as_fd());
    for (text, files) in [
        ("1027", &[][..]),
        ("1027", &[one, two]),
        ("1027 stay", &[one]),
        ("port", &[one]),
    ] {
        assert!(at_end(&mut machine.passing(text, files)), "{text}");
    }
    // Nobody can be told when a file has room.
    let file = File::open(std::env::current_exe().unwrap()).unwrap();
    assert!(at_end(&mut machine.passing("1027 keep", &[file.as_fd()])));
    machine.expect_silence();

    let mut host = machine.passing("1027 keep", &[one]);
    let port = machine.expect(REQUEST).src_port;
    machine.send(&from_guest(1027, port, RESET, 0), &[]);
    assert!(at_end(&mut host));
}
