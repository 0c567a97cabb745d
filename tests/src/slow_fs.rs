// SPDX-License-Identifier: Apache-2.0
//! A file system with folders that a runtime waits for: a FUSE server of few words.
//!
//! containerd itself looks at a volume before it asks the runtime for it, and gets its answer. What a
//! runtime asks is answered once the test says so. Layouts: fuse(4), `linux/fuse.h`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::wait::until;

/// What the folders' names begin with.
const NAME: &[u8] = b"slow";
/// Programs that wait, by a part of their names.
const RUNTIMES: [&str; 2] = ["containerd-shim", "runc"];

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

const ROOT: u64 = 1;
const SLOW: u64 = 2;
const HEADER: usize = 40;

/// The mounted file system; gone with this value.
#[derive(Debug)]
pub struct SlowFs {
    point: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    device: File,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    /// Answers that wait.
    held: Vec<Vec<u8>>,
}

impl SlowFs {
    /// Mounts it on a new folder.
    pub fn mount(point: &Path) -> Result<Self> {
        fs::create_dir_all(point)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = open("/dev/fuse", flags, Mode::empty()).context("opening /dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_fd().as_raw_fd()
        );
        let options = std::ffi::CString::new(options)?;
        mount(
            "slow",
            point,
            "fuse",
            MountFlags::empty(),
            options.as_c_str(),
        )
        .context("mounting the slow file system")?;
        let shared = Arc::new(Shared {
            device: device.into(),
            state: Mutex::default(),
        });
        let server = Arc::clone(&shared);
        // It ends with the file system.
        thread::spawn(move || server.serve());
        Ok(Self {
            point: point.to_owned(),
            shared,
        })
    }

    /// The folder that runtimes wait for.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.point.join("slow")
    }

    /// Waits until a runtime waits; fails at once when `given_up` says that none will.
    pub fn wait_for_a_runtime(&self, limit: Duration, given_up: impl Fn() -> bool) -> Result<()> {
        until("a runtime at the slow file system", limit, || {
            let waits = self.waiting() > 0;
            ensure!(waits || !given_up(), "none will come");
            Ok(waits.then_some(()))
        })
    }

    /// How many requests of runtimes wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.state().held.len()
    }

    /// Answers those who wait, and everybody from now on.
    pub fn release(&self) {
        let mut state = self.shared.state();
        state.open = true;
        for answer in state.held.drain(..) {
            // Who asked may be gone.
            let _ = (&self.shared.device).write(&answer);
        }
    }
}

impl Drop for SlowFs {
    fn drop(&mut self) {
        self.release();
        let _ = unmount(&self.point, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.point);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(length) = (&self.device).read(&mut buffer) {
            let request = buffer.get(..length).unwrap_or_default();
            let Some((answer, waits)) = answer(request) else {
                continue;
            };
            let mut state = self.state();
            if waits && !state.open {
                state.held.push(answer);
            } else {
                let _ = (&self.device).write(&answer);
            }
        }
    }
}

/// The answer, if there is to be one, and whether it may have to wait.
fn answer(request: &[u8]) -> Option<(Vec<u8>, bool)> {
    let opcode = u32_at(request, 4)?;
    let unique = request.get(8..16)?;
    let node = u64::from_le_bytes(request.get(16..24)?.try_into().ok()?);
    let pid = u32_at(request, 32)?;
    let body = request.get(HEADER..)?;
    let mut waits = false;
    let outcome = match opcode {
        INIT => Ok(init()),
        LOOKUP if node == ROOT && body.starts_with(NAME) => {
            waits = is_runtime(pid);
            // The name is looked up each time: nothing about it may be kept.
            Ok([&SLOW.to_le_bytes()[..], &[0; 32], &attributes(SLOW)].concat())
        }
        LOOKUP => Err(ENOENT),
        GETATTR => Ok([&[0; 16][..], &attributes(node)].concat()),
        OPENDIR => Ok(vec![0; 16]),
        READDIR | RELEASEDIR => Ok(Vec::new()),
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        _ => Err(ENOSYS),
    };
    let (error, body) = match outcome {
        Ok(body) => (0, body),
        Err(error) => (error.wrapping_neg(), Vec::new()),
    };
    let length = u32::try_from(body.len()).ok()?.checked_add(16)?;
    let head = [&length.to_le_bytes()[..], &error.to_le_bytes(), unique].concat();
    Some(([head, body].concat(), waits))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

/// Version 7.31, and look-ups side by side (`FUSE_PARALLEL_DIROPS`).
fn init() -> Vec<u8> {
    let words = [7_u32, 31, 0, 1 << 18, 0x0010_0010, 4096, 1];
    let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    body.resize(64, 0);
    body
}

/// A folder's.
fn attributes(node: u64) -> Vec<u8> {
    let mut body = node.to_le_bytes().to_vec();
    body.resize(60, 0);
    for word in [0o040_755_u32, 2] {
        body.extend(word.to_le_bytes());
    }
    body.resize(88, 0);
    body
}

/// Whether a thread is a runtime's. It may have a name of its own, and runc runs from a copy.
fn is_runtime(thread: u32) -> bool {
    let process = Path::new("/proc").join(thread.to_string());
    let program = fs::read_link(process.join("exe")).unwrap_or_default();
    let program = program.file_name().unwrap_or_default().to_string_lossy();
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    RUNTIMES
        .iter()
        .any(|runtime| program.starts_with(runtime) || name.starts_with(runtime))
}
