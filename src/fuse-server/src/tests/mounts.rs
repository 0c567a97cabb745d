// SPDX-License-Identifier: Apache-2.0
//! Mounts below the shared directory, and many threads at once.

use std::collections::HashSet;
use std::fs;
use std::thread;

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::mount::{mount, mount_change, unmount};
use rustix::thread::UnshareFlags;

use crate::Options;
use crate::protocol::flags::ATTR_SUBMOUNT;
use crate::protocol::{EntryOut, InHeader, Opcode, ROOT_ID, Wire};
use crate::test_client::{Client, bytes, name, take};

/// Lets the calling thread mount for itself; false if it may not, for want of root.
#[expect(
    deprecated,
    reason = "safe for namespaces, and the crate has its unsafe code elsewhere"
)]
fn own_mounts() -> bool {
    if rustix::thread::unshare(UnshareFlags::NEWNS | UnshareFlags::FS).is_err() {
        assert!(!rustix::process::geteuid().is_root());
        return false;
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).unwrap();
    true
}

#[test]
fn mounts_made_later_are_seen_and_told_apart() {
    if !own_mounts() {
        return;
    }
    for announce in [false, true] {
        let mut guest = Client::new(Options {
            announce_submounts: announce,
            ..Options::default()
        });
        let path = guest.directory.path().to_owned();
        for sub in ["a", "b"] {
            fs::create_dir(path.join(sub)).unwrap();
            let none = MountFlags::empty();
            mount("none", path.join(sub), "tmpfs", none, None).unwrap();
            fs::write(path.join(sub).join("file"), sub).unwrap();
        }
        let mut numbers = HashSet::new();
        for sub in ["a", "b"] {
            let mount = guest.lookup(ROOT_ID, sub).unwrap();
            // At the next look another may be there, or none.
            assert_eq!((mount.entry_valid, mount.attr_valid), (0, 1));
            assert_eq!(mount.attr.flags & ATTR_SUBMOUNT != 0, announce);
            let file = guest.lookup(mount.nodeid, "file").unwrap();
            assert_eq!(file.attr.flags, 0);
            let fh = guest.open(file.nodeid, libc::O_RDONLY).unwrap();
            assert_eq!(guest.read(fh, 0, 9).unwrap(), sub.as_bytes());
            numbers.insert(file.attr.ino);
            // What getattr says is what lookup said.
            let attr = guest.call(Opcode::Getattr, file.nodeid, &[0; 16]).unwrap();
            assert_eq!(attr[16..24], file.attr.ino.to_le_bytes());
            guest.call(Opcode::Syncfs, ROOT_ID, &[0; 8]).unwrap();
        }
        // Two files of one number on two new tmpfs: links of each other, if nothing tells them
        // apart.
        assert_eq!(numbers.len(), if announce { 1 } else { 2 });
        for sub in ["a", "b"] {
            unmount(path.join(sub), UnmountFlags::DETACH).unwrap();
            assert_eq!(fs::read_dir(path.join(sub)).unwrap().count(), 0);
        }
    }
}

#[test]
fn look_ups_are_counted_exactly_by_many_threads() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 2000;
    let guest = Client::new(Options::default());
    for index in 0..3 {
        fs::write(guest.directory.path().join(index.to_string()), "").unwrap();
    }
    let server = &guest.server;
    thread::scope(|scope| {
        for number in 0..THREADS {
            scope.spawn(move || {
                let mut worker = server.worker().unwrap();
                let mut reply = vec![0; 4096];
                for round in 0..ROUNDS {
                    let file = ((number + round) % 3).to_string();
                    let request = request(Opcode::Lookup, ROOT_ID, &name(&file));
                    let mut room = reply.as_mut_slice();
                    let length = server.handle(&mut worker, &request.as_slice(), &mut room);
                    assert_eq!(length, 144);
                    let node = take::<EntryOut>(&reply[16..]).nodeid;
                    // Never forgotten by another thread: this one holds a look-up.
                    let request = self::request(Opcode::Getattr, node, &[0; 16]);
                    let mut room = reply.as_mut_slice();
                    let length = server.handle(&mut worker, &request.as_slice(), &mut room);
                    assert_eq!(length, 120);
                    let request = self::request(Opcode::Forget, node, &bytes(&1_u64));
                    let mut room = reply.as_mut_slice();
                    server.handle(&mut worker, &request.as_slice(), &mut room);
                }
            });
        }
    });
    // All look-ups are forgotten, so all inodes are gone.
    for node in 2..u64::try_from(THREADS * ROUNDS + 2).unwrap() {
        assert_eq!(server.inodes.get(node).unwrap_err(), Errno::STALE);
    }
}

fn request(opcode: Opcode, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: u32::try_from(InHeader::SIZE.saturating_add(body.len())).unwrap(),
        opcode: opcode as u32,
        nodeid,
        ..Default::default()
    };
    [bytes(&header), body.to_vec()].concat()
}
