// SPDX-License-Identifier: Apache-2.0
//! What a host program sends first: the line `CONNECT port\n`, and the stream goes on over its
//! socket; or `passfd\n` and then one message, `port` or `port keep` with a descriptor, and it goes on
//! over that (Kata's passfd). Words in any case.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};

/// The longest line, its end included: `CONNECT 4294967295\r\n` takes 20.
const MAX_LINE: usize = 32;

/// Room for one descriptor more than a message may have, so that more are noticed.
const MAX_FILES: usize = 2;

/// A host's stream that has not said yet where it wants to go.
#[derive(Debug)]
pub(super) struct Handshake {
    stream: OwnedFd,
    line: Vec<u8>,
    /// The line was read, and said that a message with a descriptor follows.
    passes: bool,
}

/// How far a handshake came.
#[derive(Debug)]
pub(super) enum Progress {
    /// Something is still to come.
    Waiting,
    /// The host wants this port of the guest.
    Port(u32),
    /// The host wants a port of the guest for what it has passed.
    Passed(Passed),
    /// The host left, or sent something else.
    Refused,
}

/// A descriptor, and what for.
#[derive(Debug)]
pub(super) struct Passed {
    pub(super) guest: u32,
    /// Whether the host's socket is to live as long as the stream.
    pub(super) keep: bool,
    pub(super) file: OwnedFd,
}

/// What a line asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Connect(u32),
    PassFd,
}

impl Handshake {
    pub(super) fn new(stream: OwnedFd) -> Self {
        Self {
            stream,
            line: Vec::new(),
            passes: false,
        }
    }

    pub(super) fn into_stream(self) -> OwnedFd {
        self.stream
    }

    /// Reads what has come.
    pub(super) fn advance(&mut self) -> Progress {
        if self.passes {
            return self.take_file();
        }
        match self.read_line() {
            Ok(Line::Connect(port)) => Progress::Port(port),
            Ok(Line::PassFd) => {
                self.passes = true;
                self.take_file()
            }
            Err(progress) => progress,
        }
    }

    /// The line, once it is complete. Reads not a byte beyond it: those belong to the guest.
    fn read_line(&mut self) -> Result<Line, Progress> {
        loop {
            let mut seen = [0; MAX_LINE];
            let room = MAX_LINE.saturating_sub(self.line.len());
            let Some(window) = seen.get_mut(..room).filter(|window| !window.is_empty()) else {
                return Err(Progress::Refused);
            };
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let count = match recv(&self.stream, &mut *window, peek) {
                Ok((0, _)) => return Err(Progress::Refused),
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(Progress::Waiting),
                Err(_) => return Err(Progress::Refused),
            };
            let bytes = window.get(..count).unwrap_or_default();
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let take = end.map_or(count, |end| end.saturating_add(1));
            let Some(bytes) = window.get_mut(..take) else {
                return Err(Progress::Refused);
            };
            // The bytes are there: they were just seen.
            match recv(&self.stream, &mut *bytes, RecvFlags::DONTWAIT) {
                Ok((count, _)) if count == take => {}
                _ => return Err(Progress::Refused),
            }
            self.line.extend_from_slice(bytes);
            if end.is_some() {
                return parse(&self.line).ok_or(Progress::Refused);
            }
        }
    }

    /// The message with the descriptor.
    fn take_file(&self) -> Progress {
        let mut text = [0; MAX_LINE];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let count = loop {
            let mut window = [IoSliceMut::new(&mut text)];
            match recvmsg(&self.stream, &mut window, &mut control, flags) {
                Ok(message) => break message.bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Progress::Waiting,
                Err(_) => return Progress::Refused,
            }
        };
        let mut files = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(files) => Some(files),
                _ => None,
            })
            .flatten();
        let wanted = text.get(..count).and_then(parse_port);
        match (wanted, files.next(), files.next()) {
            (Some((guest, keep)), Some(file), None) => {
                Progress::Passed(Passed { guest, keep, file })
            }
            _ => Progress::Refused,
        }
    }
}

fn parse(line: &[u8]) -> Option<Line> {
    let mut words = words(line)?;
    let line = match words.next()? {
        word if word.eq_ignore_ascii_case("connect") => Line::Connect(number(words.next()?)?),
        word if word.eq_ignore_ascii_case("passfd") => Line::PassFd,
        _ => return None,
    };
    words.next().is_none().then_some(line)
}

/// `port`, or `port keep`.
fn parse_port(text: &[u8]) -> Option<(u32, bool)> {
    let mut words = words(text)?;
    let port = number(words.next()?)?;
    let keep = match words.next() {
        None => false,
        Some(word) if word.eq_ignore_ascii_case("keep") => true,
        Some(_) => return None,
    };
    words.next().is_none().then_some((port, keep))
}

fn words(text: &[u8]) -> Option<impl Iterator<Item = &str>> {
    Some(std::str::from_utf8(text).ok()?.split_ascii_whitespace())
}

fn number(word: &str) -> Option<u32> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| word.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Handshake) {
        let (host, ours) = UnixStream::pair().unwrap();
        (host, Handshake::new(ours.into()))
    }

    #[test]
    fn lines_are_understood_in_any_case() {
        let connect = |port| Some(Line::Connect(port));
        assert_eq!(parse(b"CONNECT 1024\n"), connect(1024));
        assert_eq!(parse(b"connect 0\n"), connect(0));
        assert_eq!(parse(b"Connect 4294967295\r\n"), connect(u32::MAX));
        assert_eq!(parse(b"passfd\n"), Some(Line::PassFd));
        assert_eq!(parse_port(b"1027"), Some((1027, false)));
        assert_eq!(parse_port(b"1027 keep"), Some((1027, true)));
    }

    #[test]
    fn other_lines_are_refused() {
        let lines: [&[u8]; 9] = [
            b"\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 1 2\n",
            b"passfd 1\n",
            b"CONNECT \xff\n",
        ];
        for line in lines {
            assert_eq!(parse(line), None, "{}", line.escape_ascii());
        }
        for text in [&b""[..], b"keep", b"1 kept", b"1 keep keep", b"+1"] {
            assert_eq!(parse_port(text), None, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn the_line_may_come_in_pieces_and_nothing_behind_it_is_taken() {
        let (mut host, mut handshake) = pair();
        assert!(matches!(handshake.advance(), Progress::Waiting));
        host.write_all(b"conn").unwrap();
        assert!(matches!(handshake.advance(), Progress::Waiting));
        host.write_all(b"ect 10").unwrap();
        assert!(matches!(handshake.advance(), Progress::Waiting));
        host.write_all(b"24\nbytes for the guest").unwrap();
        assert!(matches!(handshake.advance(), Progress::Port(1024)));
        drop(host);
        let mut rest = String::new();
        UnixStream::from(handshake.into_stream())
            .read_to_string(&mut rest)
            .unwrap();
        assert_eq!(rest, "bytes for the guest");
    }

    #[test]
    fn an_endless_line_is_refused() {
        let (mut host, mut handshake) = pair();
        host.write_all(&[b'x'; 1000]).unwrap();
        assert!(matches!(handshake.advance(), Progress::Refused));
    }

    #[test]
    fn a_host_that_leaves_is_refused() {
        let (mut host, mut handshake) = pair();
        host.write_all(b"CONNECT 10").unwrap();
        drop(host);
        assert!(matches!(handshake.advance(), Progress::Refused));
    }
}
