// SPDX-License-Identifier: Apache-2.0
//! Bytes that both sides of a machine can check.

use std::io::{Read, Result, Write};

const CHUNK: usize = 64 * 1024;

/// A sequence of bytes that does not repeat in a hurry.
#[derive(Debug)]
pub struct Pattern(u64);

impl Default for Pattern {
    fn default() -> Self {
        Self::new()
    }
}

impl Pattern {
    /// From its beginning.
    #[must_use]
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let value = self.0.to_le_bytes();
            for (byte, new) in word.iter_mut().zip(value) {
                *byte = new;
            }
        }
    }

    /// Writes `len` bytes of it, a multiple of 8.
    ///
    /// # Errors
    /// `to` takes no more.
    pub fn send(mut self, to: &mut impl Write, len: u64) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        let mut left = len;
        while left > 0 {
            let here = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
            let bytes = chunk.get_mut(..here).unwrap_or_default();
            self.fill(bytes);
            to.write_all(bytes)?;
            left = left.saturating_sub(u64::try_from(here).unwrap_or(left));
        }
        Ok(())
    }
}

/// How many bytes came, and which: FNV-1a over their words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    /// How many.
    pub len: u64,
    hash: u64,
}

impl Digest {
    /// Of the pattern's first `len` bytes.
    #[must_use]
    pub fn of_pattern(len: u64) -> Self {
        let mut digester = Digester::default();
        // A digester takes everything.
        let _ = Pattern::new().send(&mut digester, len);
        digester.end()
    }

    /// Of all that comes.
    ///
    /// # Errors
    /// Reading failed.
    pub fn of(from: &mut impl Read) -> Result<Self> {
        let mut digester = Digester::default();
        let mut chunk = vec![0; CHUNK];
        loop {
            match from.read(&mut chunk)? {
                0 => return Ok(digester.end()),
                count => digester.write_all(chunk.get(..count).unwrap_or_default())?,
            }
        }
    }

    /// For the way to the other side.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let value = u128::from(self.len) << 64 | u128::from(self.hash);
        value.to_le_bytes()
    }
}

/// Takes bytes in whatever pieces they come.
#[derive(Debug, Default)]
struct Digester {
    len: u64,
    hash: u64,
    word: u64,
    filled: u32,
}

impl Digester {
    const PRIME: u64 = 0x0000_0100_0000_01b3;

    fn end(mut self) -> Digest {
        self.turn_over();
        Digest {
            len: self.len,
            hash: self.hash,
        }
    }

    fn turn_over(&mut self) {
        self.hash = (self.hash ^ self.word).wrapping_mul(Self::PRIME);
        self.word = 0;
        self.filled = 0;
    }
}

impl Write for Digester {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        for byte in bytes {
            self.word = self.word << 8 | u64::from(*byte);
            self.filled = self.filled.wrapping_add(1);
            self.len = self.len.wrapping_add(1);
            if self.filled == 8 {
                self.turn_over();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Reads a line, byte by byte: what follows it belongs to others.
///
/// # Errors
/// Reading failed.
pub fn read_line(from: &mut impl Read) -> Result<String> {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') && from.read(&mut byte)? == 1 {
        line.extend(byte.map(char::from));
    }
    Ok(line)
}
