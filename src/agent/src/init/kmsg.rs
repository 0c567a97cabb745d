// SPDX-License-Identifier: Apache-2.0
//! Logging. PID 1 writes to the kernel's log, where the host finds it on the console or in the
//! last lines of a failed boot; elsewhere the agent writes to stderr.

use std::fs::File;
use std::io::{self, Write};
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Longer records are cut by the kernel.
const RECORD: usize = 976;

/// Where the lines go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// `/dev/kmsg`.
    Kernel,
    /// Standard error.
    Stderr,
}

/// Starts logging of `level` and worse.
pub(crate) fn start(target: Target, level: LevelFilter) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false);
    // The kernel stamps and levels the lines itself. A second call changes nothing.
    let _ = match target {
        Target::Kernel => builder
            .with_level(false)
            .without_time()
            .with_writer(Lines)
            .try_init(),
        Target::Stderr => builder.with_writer(io::stderr).try_init(),
    };
}

/// Writes one line at level `err`, which reaches the console of a quiet kernel too.
pub(crate) fn fatal(text: &str) {
    let _ = Line { severity: 3 }.write_all(text.as_bytes());
    let _ = writeln!(io::stderr(), "kata-agent: {text}");
}

struct Lines;

/// One record of the kernel's log.
#[derive(Debug)]
struct Line {
    /// As in syslog(3).
    severity: u8,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { severity: 6 }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line {
        let severity = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        Line { severity }
    }
}

impl Write for Line {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        static DEVICE: OnceLock<File> = OnceLock::new();
        let device = match DEVICE.get() {
            Some(device) => device,
            // /dev may not be there yet: another line tries again.
            None => match File::options().write(true).open("/dev/kmsg") {
                Ok(device) => DEVICE.get_or_init(|| device),
                Err(error) => return Err(error),
            },
        };
        let mut record = format!("<{}>kata-agent: ", self.severity).into_bytes();
        record.extend(text.iter().take(RECORD));
        (&mut &*device).write_all(&record)?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
