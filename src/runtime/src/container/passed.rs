// SPDX-License-Identifier: Apache-2.0
//! One output of a process that the monitor writes into containerd's named pipe itself. What is left
//! for the runtime are the pipe's two ends: it holds one, so that clients may come and go, until the
//! stream has ended and is taken.

use rustix::io::ioctl_fionread;
use tokio::net::unix::pipe;
use tokio::select;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::output::{Flow, LOOK, STUCK, exited, taken};
use crate::sandbox::Passed;

/// Holds one output.
#[derive(Debug)]
pub(super) struct PassedOutput {
    pub(super) pipe: pipe::Sender,
    pub(super) stream: Passed,
    pub(super) exited: watch::Receiver<bool>,
    pub(super) flow: watch::Sender<Flow>,
}

impl PassedOutput {
    /// Holds the pipe to the stream's end.
    pub(super) async fn run(mut self) {
        let given_up = stuck(&self.pipe, &self.flow, self.exited.clone());
        select! {
            () = self.stream.ended() => {}
            // The monitor lets go of the stream, too.
            () = given_up => {}
        }
        taken(&self.pipe, &self.flow).await;
    }
}

/// After the process's end: a client that leaves the output where it is.
async fn stuck(pipe: &pipe::Sender, flow: &watch::Sender<Flow>, ended: watch::Receiver<bool>) {
    exited(ended).await;
    let mut left = 0;
    let mut since = Instant::now();
    while since.elapsed() < STUCK {
        let now = ioctl_fionread(pipe).unwrap_or(0);
        if now != left {
            (left, since) = (now, Instant::now());
            flow.send_replace(Flow::Client);
        }
        sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Duration;

    use rustix::fs::{Mode, mkfifoat};
    use tokio::net::UnixStream;
    use tokio::time::timeout;

    use super::*;
    use crate::container::output::settled;

    #[tokio::test]
    async fn an_end_is_told_once_all_is_taken_or_nobody_takes_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stdout");
        mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        for reads in [true, false] {
            let open = || pipe::OpenOptions::new().read_write(true).open_sender(&path);
            let pipe = open().unwrap();
            let mut client = std::fs::File::open(&path).unwrap();
            let (control, monitor) = UnixStream::pair().unwrap();
            let (end, exited) = watch::channel(false);
            let output = PassedOutput {
                pipe,
                stream: Passed::for_test(control),
                exited,
                flow: watch::Sender::new(Flow::Client),
            };
            let flow = output.flow.subscribe();
            let running = tokio::spawn(output.run());
            // What the monitor does.
            let mut writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            writer.write_all(&[7; 1000]).unwrap();
            drop(writer);
            drop(monitor);
            end.send_replace(true);
            let mut settling = Box::pin(settled(flow));
            let early = timeout(Duration::from_millis(200), &mut settling).await;
            assert!(early.is_err(), "settled with output in the pipe");
            if reads {
                let mut bytes = [0; 1000];
                client.read_exact(&mut bytes).unwrap();
            }
            timeout(Duration::from_secs(4), settling).await.unwrap();
            timeout(Duration::from_secs(4), running)
                .await
                .unwrap()
                .unwrap();
        }
    }
}
