// SPDX-License-Identifier: Apache-2.0
//! The first serial port: a 16550 whose last output is always at hand for error messages. It has
//! no interrupt; Linux's console writes by polling, and its driver polls by timer.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt::{self, Debug};
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use crate::bus::BusDevice;

/// Bytes kept; what came before is forgotten (CVE-2020-27174: an unbounded buffer).
pub const TAIL: usize = 16 * 1024;

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Keeps the last output, and passes all of it on.
struct Output {
    tail: VecDeque<u8>,
    file: Option<File>,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let surplus = self
            .tail
            .len()
            .saturating_add(data.len())
            .saturating_sub(TAIL);
        self.tail.drain(..surplus.min(self.tail.len()));
        let kept = data.len().saturating_sub(TAIL);
        self.tail.extend(data.iter().skip(kept));
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(data)
        {
            tracing::warn!(%error, "the console's file is gone");
            self.file = None;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's registers.
pub struct SerialPort {
    serial: Mutex<Serial<NoInterrupt, NoEvents, Output>>,
}

impl SerialPort {
    /// A port that also writes to `file`.
    #[must_use]
    pub fn new(file: Option<File>) -> Self {
        let output = Output {
            tail: VecDeque::new(),
            file,
        };
        Self {
            serial: Mutex::new(Serial::new(NoInterrupt, output)),
        }
    }

    /// The last output, `TAIL` bytes at most; bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn tail(&self) -> String {
        let serial = self.lock();
        let tail: Vec<u8> = serial.writer().tail.iter().copied().collect();
        String::from_utf8_lossy(&tail).into_owned()
    }

    fn lock(&self) -> MutexGuard<'_, Serial<NoInterrupt, NoEvents, Output>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Debug for SerialPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            *byte = self.lock().read(register);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(register)) = (data, u8::try_from(offset)) {
            // Output and interrupt can't fail.
            let _ = self.lock().write(register, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn output_is_kept_and_written() {
        let mut file = tempfile::tempfile().unwrap();
        let port = SerialPort::new(Some(file.try_clone().unwrap()));
        for byte in b"panic\xff" {
            port.write(0, &[*byte]);
        }
        assert_eq!(port.tail(), "panic\u{fffd}");
        let mut written = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut written).unwrap();
        assert_eq!(written, b"panic\xff");
    }

    #[test]
    fn only_the_last_output_is_kept() {
        let port = SerialPort::new(None);
        for at in 0..TAIL + 100 {
            port.write(0, &[if at < 100 { b'a' } else { b'b' }]);
        }
        assert_eq!(port.tail(), "b".repeat(TAIL));
    }

    #[test]
    fn the_transmitter_is_always_ready_and_odd_accesses_do_no_harm() {
        let port = SerialPort::new(None);
        let mut status = [0];
        port.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60);
        port.write(0, &[1, 2, 3, 4]);
        port.write(u64::MAX, &[1]);
        let mut wide = [1; 4];
        port.read(5, &mut wide);
        assert_eq!(wide, [0; 4]);
        assert_eq!(port.tail(), "");
    }
}
