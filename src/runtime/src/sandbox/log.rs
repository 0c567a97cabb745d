// SPDX-License-Identifier: Apache-2.0
//! The agent's log: a JSON object a line, from its own port, told on in the runtime's log.
//!
//! What a guest says is read with bounds: the length of a line, and how many come in a second. The
//! agent keeps the newest of what isn't read in time.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::sleep;
use tracing::{Level, debug, error, info, trace, warn};

use super::dial::dial;
use crate::logging::GUEST;

/// The agent's vsock port of its log.
pub(super) const LOG_PORT: u32 = 1025;

/// The longest line that is read as a whole.
const MAX_LINE: u64 = 16 << 10;

/// So many lines are taken in one go, and then none for a while.
const TURN: usize = 100;
const PAUSE: Duration = Duration::from_millis(100);

/// Keys that are on every line, and say nothing here.
const USUAL: [&str; 6] = ["ts", "level", "name", "source", "pid", "version"];

/// A line, understood.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    level: Level,
    subsystem: String,
    text: String,
}

/// Tells on what the agent of a sandbox logs, to the machine's end.
pub(super) async fn relay(sandbox: String, vsock: PathBuf) {
    match dial(&vsock, LOG_PORT).await {
        Ok(stream) => relay_from(&sandbox, stream).await,
        Err(error) => debug!(sandbox, error = error.chain(), "no log of the agent"),
    }
}

async fn relay_from(sandbox: &str, stream: UnixStream) {
    let mut stream = BufReader::new(stream);
    let mut bytes = Vec::new();
    loop {
        for _ in 0..TURN {
            bytes.clear();
            let mut bounded = (&mut stream).take(MAX_LINE);
            match bounded.read_until(b'\n', &mut bytes).await {
                Ok(1..) => tell(sandbox, &understood(&bytes)),
                _ => return,
            }
        }
        sleep(PAUSE).await;
    }
}

fn tell(sandbox: &str, line: &Line) {
    let Line {
        level,
        subsystem,
        text,
    } = line;
    // Each level is a place of its own in the program.
    match *level {
        Level::ERROR => error!(target: GUEST, sandbox, subsystem, "{text}"),
        Level::WARN => warn!(target: GUEST, sandbox, subsystem, "{text}"),
        Level::INFO => info!(target: GUEST, sandbox, subsystem, "{text}"),
        Level::DEBUG => debug!(target: GUEST, sandbox, subsystem, "{text}"),
        Level::TRACE => trace!(target: GUEST, sandbox, subsystem, "{text}"),
    }
}

/// A line of the agent's; what is no such line is told as it is.
fn understood(bytes: &[u8]) -> Line {
    let Ok(mut fields) = serde_json::from_slice::<Map<String, Value>>(bytes) else {
        return Line {
            level: Level::INFO,
            subsystem: String::new(),
            text: printable(&String::from_utf8_lossy(bytes)),
        };
    };
    let mut take = |key| fields.remove(key).as_ref().map(text_of).unwrap_or_default();
    let level = level(&take("level"));
    let (subsystem, mut text) = (take("subsystem"), take("msg"));
    for key in USUAL {
        take(key);
    }
    for (key, value) in &fields {
        // Writing to a string can't fail.
        let _ = write!(text, " {key}={}", text_of(value));
    }
    Line {
        level,
        subsystem: printable(&subsystem),
        text: printable(&text),
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// As the agent names its levels, in Kata's words.
fn level(name: &str) -> Level {
    match name {
        "CRIT" | "ERRO" => Level::ERROR,
        "WARN" => Level::WARN,
        "DEBG" => Level::DEBUG,
        "TRCE" => Level::TRACE,
        _ => Level::INFO,
    }
}

/// In one line, and without what moves a terminal's cursor.
fn printable(text: &str) -> String {
    let text = text.trim_end();
    text.chars()
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_their_level_and_their_fields() {
        let bytes = br#"{"ts":"2026-01-01T00:00:00Z","level":"DEBG","name":"kata-agent",
            "source":"agent","subsystem":"rpc","pid":"1","version":"0","msg":"created",
            "container":"a","count":3}"#;
        let line = understood(bytes);
        assert_eq!(line.level, Level::DEBUG);
        assert_eq!(line.subsystem, "rpc");
        assert_eq!(line.text, "created container=a count=3");
        assert_eq!(level("CRIT"), Level::ERROR);
        assert_eq!(level("TRCE"), Level::TRACE);
    }

    #[test]
    fn a_hostile_line_is_one_line_of_letters() {
        let line = understood(b"not \x1b[2J json\n");
        assert_eq!(
            (line.level, line.text.as_str()),
            (Level::INFO, "not  [2J json")
        );
        let line = understood(br#"{"level":7,"msg":"a\nb","k\u001b":["\r"]}"#);
        assert_eq!(line.text, "a b k =[\"\\r\"]");
        understood(&[0xff; 100]);
    }

    #[tokio::test]
    async fn an_endless_line_is_read_in_parts() {
        use tokio::io::AsyncWriteExt;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let relaying = tokio::spawn(async move { relay_from("s", ours).await });
        theirs.write_all(&vec![b'x'; 1 << 20]).await.unwrap();
        drop(theirs);
        relaying.await.unwrap();
    }
}
