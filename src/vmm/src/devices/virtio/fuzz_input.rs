// SPDX-License-Identifier: Apache-2.0
//! What a fuzzer's bytes decide.

/// Bytes from the fuzzer; zeros once they are used up.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub(crate) fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }
}

/// Feeds `target` with as many inputs of 1000 bytes, the same ones every time.
#[cfg(test)]
pub(crate) fn feed(inputs: usize, target: impl Fn(&[u8])) {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..inputs {
        let bytes: Vec<u8> = (0..1000)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect();
        target(&bytes);
    }
}
