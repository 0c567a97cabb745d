// SPDX-License-Identifier: Apache-2.0
//! What a fuzzer's bytes decide, and the targets: one for each decoder of what others write — the
//! runtime's requests and specs, the kernel's messages and files, reports of a process that already
//! sees its container. Each takes any bytes and must do no more than refuse them.

pub use crate::container::fuzz::requests;
pub use crate::engine::fuzz::{frames, specs};
pub use crate::network::fuzz::netlink;

use crate::cmdline::Parameters;
use crate::container::fuzz as container;
use crate::network::fuzz as network;
use crate::{cgroup, forward, pci, storage};

/// Bytes from the fuzzer; zeros once they are used up.
#[derive(Debug)]
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// True once in `times`.
    pub(crate) fn rarely(&mut self, times: u8) -> bool {
        self.byte().checked_rem(times) == Some(1)
    }

    pub(crate) fn number(&mut self) -> i64 {
        let mut bytes = [0; 8];
        bytes.fill_with(|| self.byte());
        i64::from_le_bytes(bytes)
    }

    /// One of `words`, now and then something else.
    pub(crate) fn word(&mut self, words: &[&str]) -> String {
        if self.rarely(97) {
            return self.text();
        }
        let index = usize::from(self.byte()).checked_rem(words.len());
        index
            .and_then(|index| words.get(index))
            .map_or_else(String::new, |word| (*word).to_owned())
    }

    /// A few letters of any kind.
    pub(crate) fn text(&mut self) -> String {
        let length = usize::from(self.byte() % 24);
        let (text, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        String::from_utf8_lossy(text).into_owned()
    }

    /// Up to `most` of what `make` makes.
    pub(crate) fn list<T>(&mut self, most: u8, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.byte().checked_rem(most.saturating_add(1)).unwrap_or(0);
        (0..count).map(|_| make(self)).collect()
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

/// Texts: the kernel's command line and files, paths and sizes of requests.
pub fn texts(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let parameters = Parameters::from_cmdline(&text);
    let _ = parameters.console_port();
    if let Ok(path) = pci::Path::parse(&text) {
        // What is written is read as the same.
        assert_eq!(pci::Path::parse(&path.to_string()).ok(), Some(path));
    }
    cgroup::fuzz(&text);
    storage::fuzz(&text);
    forward::fuzz(bytes);
    container::texts(&text);
    network::texts(&text);
}

/// Feeds `target` with as many inputs, the same ones every time.
#[cfg(test)]
pub(crate) fn feed(inputs: usize, target: impl Fn(&[u8])) {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..inputs {
        let bytes: Vec<u8> = (0..600)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[4]
            })
            .collect();
        target(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_input_does_no_harm() {
        feed(300, texts);
        feed(300, requests);
        feed(300, specs);
        feed(100, frames);
        feed(300, netlink);
    }

    #[test]
    fn words_are_mostly_the_given_ones() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut input = Input::new(&bytes);
        let right = (0..100)
            .filter(|_| input.word(&["a", "b"]).len() == 1)
            .count();
        assert!(right > 80, "{right}");
    }
}
