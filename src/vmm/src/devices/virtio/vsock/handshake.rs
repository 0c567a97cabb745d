// SPDX-License-Identifier: Apache-2.0
//! The line that a host program sends first: `CONNECT port\n`, in any case.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// The longest line, its end included: `CONNECT 4294967295\r\n` takes 20.
const MAX_LINE: usize = 32;

/// A host's stream that has not said yet where it wants to go.
#[derive(Debug)]
pub(super) struct Handshake {
    stream: OwnedFd,
    line: Vec<u8>,
}

/// How far a handshake came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not complete.
    Waiting,
    /// The host wants this port of the guest.
    Port(u32),
    /// The host left, or sent no such line.
    Refused,
}

impl Handshake {
    pub(super) fn new(stream: OwnedFd) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    pub(super) fn into_stream(self) -> OwnedFd {
        self.stream
    }

    /// Reads what has come of the line, and not a byte beyond it: those belong to the guest.
    pub(super) fn advance(&mut self) -> Progress {
        loop {
            let mut seen = [0; MAX_LINE];
            let room = MAX_LINE.saturating_sub(self.line.len());
            let Some(window) = seen.get_mut(..room).filter(|window| !window.is_empty()) else {
                return Progress::Refused;
            };
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let count = match recv(&self.stream, &mut *window, peek) {
                Ok((0, _)) => return Progress::Refused,
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Progress::Waiting,
                Err(_) => return Progress::Refused,
            };
            let bytes = window.get(..count).unwrap_or_default();
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let take = end.map_or(count, |end| end.saturating_add(1));
            let Some(bytes) = window.get_mut(..take) else {
                return Progress::Refused;
            };
            // The bytes are there: they were just seen.
            match recv(&self.stream, &mut *bytes, RecvFlags::DONTWAIT) {
                Ok((count, _)) if count == take => {}
                _ => return Progress::Refused,
            }
            self.line.extend_from_slice(bytes);
            if end.is_some() {
                return parse(&self.line).map_or(Progress::Refused, Progress::Port);
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let command = words.next()?;
    let port = words.next()?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (command.eq_ignore_ascii_case("connect") && digits && words.next().is_none())
        .then(|| port.parse().ok())
        .flatten()
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
        assert_eq!(parse(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse(b"connect 0\n"), Some(0));
        assert_eq!(parse(b"Connect 4294967295\r\n"), Some(u32::MAX));
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
            b"passfd\n",
            b"CONNECT \xff\n",
        ];
        for line in lines {
            assert_eq!(parse(line), None, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn the_line_may_come_in_pieces_and_nothing_behind_it_is_taken() {
        let (mut host, mut handshake) = pair();
        assert_eq!(handshake.advance(), Progress::Waiting);
        host.write_all(b"conn").unwrap();
        assert_eq!(handshake.advance(), Progress::Waiting);
        host.write_all(b"ect 10").unwrap();
        assert_eq!(handshake.advance(), Progress::Waiting);
        host.write_all(b"24\nbytes for the guest").unwrap();
        assert_eq!(handshake.advance(), Progress::Port(1024));
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
        assert_eq!(handshake.advance(), Progress::Refused);
    }

    #[test]
    fn a_host_that_leaves_is_refused() {
        let (mut host, mut handshake) = pair();
        host.write_all(b"CONNECT 10").unwrap();
        drop(host);
        assert_eq!(handshake.advance(), Progress::Refused);
    }
}
