// SPDX-License-Identifier: Apache-2.0
//! What a program that reloads its configuration hears.

use std::io::{Write, stdout};
use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};

/// Prints `up`, then each event: what has happened, and the name that it has happened to.
pub(super) fn run(folder: &Path) -> Result<()> {
    let inotify = init(CreateFlags::CLOEXEC)?;
    let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE | WatchFlags::MODIFY;
    add_watch(&inotify, folder, flags).with_context(|| format!("watching {}", folder.display()))?;
    let mut out = stdout().lock();
    writeln!(out, "up")?;
    let mut buffer = [const { MaybeUninit::uninit() }; 4096];
    let mut reader = Reader::new(&inotify, &mut buffer);
    loop {
        let event = reader.next()?;
        let name = event.file_name().unwrap_or_default().to_string_lossy();
        let events = event.events();
        let what = if events.contains(ReadFlags::CREATE) {
            "create"
        } else if events.contains(ReadFlags::MOVED_TO) {
            "moved"
        } else if events.contains(ReadFlags::MOVED_FROM) {
            "away"
        } else if events.contains(ReadFlags::DELETE) {
            "delete"
        } else {
            "other"
        };
        writeln!(out, "{what} {name}")?;
        out.flush()?;
    }
}
