// SPDX-License-Identifier: Apache-2.0
//! Who asks: `kata-ctl`. Nothing says which sandbox has a volume but the sandboxes themselves, so
//! that nothing can be wrong about it: each is asked in turn.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{RESIZE, STATS, Volume, kind};
use crate::error::{Context, Kind, Result, ShimError};
use crate::paths;

/// How long a sandbox may take for an answer: a guest may have to make a file system larger.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the volume's file system holds.
pub(crate) fn stats(volume: &Path) -> Result<String> {
    ask_all(paths::sandboxes(), STATS, volume, None)
}

/// The volume's file system takes `size` bytes of its disk.
pub(crate) fn resize(volume: &Path, size: u64) -> Result<()> {
    ask_all(paths::sandboxes(), RESIZE, volume, Some(size)).map(drop)
}

/// The answer of the sandbox that has the volume.
fn ask_all(sandboxes: &Path, path: &str, volume: &Path, size: Option<u64>) -> Result<String> {
    let request = Volume {
        volume_path: volume.to_owned(),
        size,
    };
    let body = serde_json::to_string(&request).internal(|| "request".to_owned())?;
    let folders = match fs::read_dir(sandboxes) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        folders => Some(folders.internal(|| format!("read {}", sandboxes.display()))?),
    };
    for folder in folders.into_iter().flatten().flatten() {
        let socket = folder.path().join(paths::MONITOR);
        let (status, answer) = match ask(&socket, path, &body) {
            // It has just ended, or was killed and not cleaned up yet.
            Err(error) if is_gone(&error) => continue,
            answer => answer.context(Kind::Unavailable, || format!("ask {}", socket.display()))?,
        };
        match (status, kind(status)) {
            (200, _) => return Ok(answer),
            (_, Kind::NotFound) => {}
            (_, kind) => return Err(ShimError::new(kind, answer)),
        }
    }
    Err(ShimError::new(
        Kind::NotFound,
        format!(
            "no running sandbox has the direct-assigned volume {}",
            volume.display()
        ),
    ))
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// Status and body of the answer.
fn ask(socket: &Path, path: &str, body: &str) -> io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let length = body.len();
    // At once: who refuses a request may not wait for the rest of it.
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let parsed = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    });
    parsed.ok_or_else(|| io::Error::other(format!("{answer:?} is no answer")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// A sandbox that answers once; what it was asked.
    fn sandbox(root: &Path, name: &str, answer: &'static str) -> thread::JoinHandle<String> {
        let folder = root.join(name);
        fs::create_dir(&folder).unwrap();
        let listener = UnixListener::bind(folder.join(paths::MONITOR)).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).unwrap();
            request.truncate(length);
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(request).unwrap()
        })
    }

    #[test]
    fn the_sandbox_that_has_the_volume_answers() {
        let root = tempfile::tempdir().unwrap();
        let volume = Path::new("/v");
        let ask = |size| ask_all(root.path(), "/p", volume, size);
        assert_eq!(ask(None).unwrap_err().kind(), Kind::NotFound);
        // A shim that was killed.
        fs::create_dir(root.path().join("dead")).unwrap();
        drop(UnixListener::bind(root.path().join("dead").join(paths::MONITOR)).unwrap());
        assert_eq!(ask(None).unwrap_err().kind(), Kind::NotFound);
        let one = sandbox(root.path(), "a", "HTTP/1.1 200 OK\r\n\r\nyes");
        assert_eq!(ask(Some(7)).unwrap(), "yes");
        let asked = one.join().unwrap();
        assert!(asked.starts_with("POST /p HTTP/1.1\r\n"), "{asked}");
        assert!(
            asked.ends_with("\r\n\r\n{\"volume_path\":\"/v\",\"size\":7}"),
            "{asked}"
        );
        let other = sandbox(root.path(), "b", "HTTP/1.1 409 Error\r\n\r\nsmall");
        let error = ask(None).unwrap_err();
        assert_eq!(
            (error.kind(), error.chain()),
            (Kind::FailedPrecondition, "small".to_owned())
        );
        other.join().unwrap();
    }
}
