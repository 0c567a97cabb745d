// SPDX-License-Identifier: Apache-2.0
//! The log as a stream that the host reads (`agent.log_vport`): a JSON object a line, with the keys
//! of Kata's agents.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncWriteExt as _;
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::ports::{Door, Stream};

/// Lines that wait for a reader; the oldest go first.
const MOST: usize = 1000;

/// Starts logging of `level` and worse to whoever connects to `door`.
pub(crate) fn start(door: Door, level: LevelFilter) {
    let lines = Arc::new(Lines::default());
    // A second call changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(Json)
        .with_writer(Handle(Arc::clone(&lines)))
        .try_init();
    tokio::spawn(async move {
        loop {
            let (stream, _) = door.next().await;
            lines.send(stream).await;
        }
    });
}

#[derive(Debug, Default)]
struct Lines {
    waiting: Mutex<VecDeque<Vec<u8>>>,
    more: Notify,
}

impl Lines {
    fn add(&self, line: &[u8]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MOST {
            waiting.pop_front();
        }
        waiting.push_back(line.to_vec());
        drop(waiting);
        self.more.notify_one();
    }

    fn next(&self) -> Option<Vec<u8>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    }

    /// One reader at a time, until it hangs up.
    async fn send(&self, mut stream: Box<dyn Stream>) {
        loop {
            while let Some(line) = self.next() {
                if stream.write_all(&line).await.is_err() {
                    return;
                }
            }
            self.more.notified().await;
        }
    }
}

#[derive(Debug)]
struct Handle(Arc<Lines>);

impl<'a> MakeWriter<'a> for Handle {
    type Writer = &'a Handle;

    fn make_writer(&'a self) -> &'a Handle {
        self
    }
}

impl io::Write for &Handle {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Kata's form of a line.
struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let level = match *event.metadata().level() {
            Level::ERROR => "ERRO",
            Level::WARN => "WARN",
            Level::INFO => "INFO",
            Level::DEBUG => "DEBG",
            Level::TRACE => "TRCE",
        };
        let target = event.metadata().target();
        let subsystem = target.split("::").nth(1).unwrap_or("agent");
        let mut fields = Fields::default();
        for (key, value) in [
            ("ts", time.as_str()),
            ("level", level),
            ("name", "kata-agent"),
            ("source", "agent"),
            ("subsystem", subsystem),
            ("pid", &std::process::id().to_string()),
            ("version", env!("CARGO_PKG_VERSION")),
        ] {
            fields.add(key, value);
        }
        event.record(&mut fields);
        writeln!(writer, "{{{}}}", fields.0)
    }
}

/// `"key":"value"`, with commas.
#[derive(Default)]
struct Fields(String);

impl Fields {
    fn add(&mut self, key: &str, value: &str) {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        quote(&mut self.0, key);
        self.0.push(':');
        quote(&mut self.0, value);
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(name(field), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(name(field), &format!("{value:?}"));
    }
}

fn name(field: &Field) -> &str {
    match field.name() {
        "message" => "msg",
        other => other,
    }
}

/// A JSON string (RFC 8259, section 7).
fn quote(text: &mut String, value: &str) {
    text.push('"');
    for letter in value.chars() {
        match letter {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            control if u32::from(control) < 0x20 => {
                let _ = write!(text, "\\u{:04x}", u32::from(control));
            }
            other => text.push(other),
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_json() {
        let mut text = String::new();
        quote(&mut text, "a\"b\\c\nd\u{1}é");
        assert_eq!(text, r#""a\"b\\c\u000ad\u0001é""#);
    }

    #[test]
    fn the_oldest_lines_go_first() {
        let lines = Lines::default();
        for number in 0..MOST + 2 {
            lines.add(number.to_string().as_bytes());
        }
        assert_eq!(lines.next().unwrap(), b"2");
    }
}
