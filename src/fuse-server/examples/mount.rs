// SPDX-License-Identifier: Apache-2.0
//! Mounts a directory over FUSE on this machine, with the server that virtio-fs uses: any program
//! can then be run against it. Needs root and `/dev/fuse`; ends when the file system is unmounted.
//!
//! `cargo run -p fuse-server --example mount -- [--read-only] [--cache=never|auto|always]
//! [--writeback] [--posix-acl] [--announce-submounts] SOURCE TARGET`

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use fuse_server::{Cache, Options, ProcSelfFd, Server};
use rustix::mount::{MountFlags, mount};

/// A write of the largest size and its header.
const BUFFER: usize = 1024 * 1024 + 4096;
const THREADS: usize = 4;

fn main() -> Result<()> {
    let mut options = Options::default();
    let mut paths = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--read-only" => options.read_only = true,
            "--writeback" => options.writeback = true,
            "--posix-acl" => options.posix_acl = true,
            "--announce-submounts" => options.announce_submounts = true,
            "--cache=never" => options.cache = Cache::Never,
            "--cache=auto" => options.cache = Cache::Auto,
            "--cache=always" => options.cache = Cache::Always,
            flag if flag.starts_with('-') => bail!("unknown option {flag}"),
            path => paths.push(path.to_owned()),
        }
    }
    let [source, target] = paths.as_slice() else {
        bail!("usage: mount [OPTIONS] SOURCE TARGET");
    };
    let root = OwnedFd::from(File::open(source).with_context(|| format!("can't open {source}"))?);
    let server = Arc::new(Server::new(&root, ProcSelfFd::open()?, options)?);
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .context("can't open /dev/fuse")?;
    let device = Arc::new(device);
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=1048576",
        device.as_raw_fd()
    );
    mount(
        "nutshell",
        target.as_str(),
        "fuse",
        MountFlags::empty(),
        Some(std::ffi::CString::new(data)?.as_c_str()),
    )
    .with_context(|| format!("can't mount on {target}"))?;

    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (server, device) = (Arc::clone(&server), Arc::clone(&device));
            thread::spawn(move || serve(&server, &device))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a worker panicked"))??;
    }
    Ok(())
}

fn serve(server: &Server, mut device: &File) -> Result<()> {
    let mut worker = server.worker()?;
    let mut request = vec![0; BUFFER];
    let mut reply = vec![0; BUFFER];
    loop {
        let length = match device.read(&mut request) {
            Ok(length) => length,
            // ENODEV: unmounted.
            Err(error) if error.raw_os_error() == Some(19) => return Ok(()),
            // ENOENT: interrupted before it was taken.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context("can't read a request"),
        };
        let (request, _) = request.split_at(length);
        let answer = server.handle(&mut worker, &request, &mut reply.as_mut_slice());
        if answer == 0 {
            continue;
        }
        let (reply, _) = reply.split_at(answer);
        match device.write(reply) {
            // ENOENT: the caller was interrupted and no longer waits.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("can't write a reply"),
            Ok(_) => {}
        }
    }
}
