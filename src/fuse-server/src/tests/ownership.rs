// SPDX-License-Identifier: Apache-2.0
//! Whose what is created is, and which bits survive. Acting for others takes root: without it the
//! server has to refuse, and these tests check that instead.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use rustix::io::Errno;

use crate::Options;
use crate::protocol::flags::{EXT_GROUPS, OPEN_KILL_SUIDGID, WRITE_KILL_SUIDGID, setattr as valid};
use crate::protocol::{ExtHeader, MkdirIn, Opcode, OpenIn, ROOT_ID, SetattrIn, SetxattrIn, Wire};
use crate::test_client::{Client, bytes, name};

const USER: u32 = 1234;
const GROUP: u32 = 77;
const DIRECTORY_GROUP: u32 = 50;

fn client() -> Client {
    Client::new(Options::default())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A directory, set-group-id, of a group that its users need not be in.
fn group_directory(guest: &mut Client) -> u64 {
    let path = guest.directory.path().join("shared");
    fs::create_dir(&path).unwrap();
    chown(&path, Some(0), Some(DIRECTORY_GROUP)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2755)).unwrap();
    guest.lookup(ROOT_ID, "shared").unwrap().nodeid
}

#[test]
fn without_root_only_our_own_files_are_made() {
    let mut guest = client();
    guest.uid = if is_root() { u32::MAX } else { 0 };
    let made = guest.create(ROOT_ID, "f", 0o644, 0, libc::O_RDWR);
    assert_eq!(made.unwrap_err(), Errno::PERM);
    assert!(!guest.directory.path().join("f").exists());
}

#[test]
fn what_is_created_belongs_to_the_caller() {
    if !is_root() {
        return without_root_only_our_own_files_are_made();
    }
    let mut guest = client();
    (guest.uid, guest.gid) = (USER, GROUP);
    // The directory is root's alone: whether the caller may is for the guest's kernel to say.
    let (entry, _) = guest
        .create(ROOT_ID, "f", 0o666, 0o027, libc::O_RDWR)
        .unwrap();
    let attr = entry.attr;
    assert_eq!(
        (attr.uid, attr.gid, attr.mode & 0o7777),
        (USER, GROUP, 0o640)
    );
    let mkdir = MkdirIn {
        mode: 0o777,
        umask: 0o002,
    };
    guest
        .call(Opcode::Mkdir, ROOT_ID, &[bytes(&mkdir), name("d")].concat())
        .unwrap();
    guest
        .call(Opcode::Symlink, ROOT_ID, &[name("l"), name("to")].concat())
        .unwrap();
    for (file, mode) in [("d", 0o775), ("l", 0o777)] {
        let host = fs::symlink_metadata(guest.directory.path().join(file)).unwrap();
        assert_eq!(
            (host.uid(), host.gid(), host.mode() & 0o7777),
            (USER, GROUP, mode)
        );
    }
    // The thread is itself again.
    (guest.uid, guest.gid) = (0, 0);
    let (entry, _) = guest.create(ROOT_ID, "r", 0o600, 0, libc::O_RDWR).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid), (0, 0));
}

/// CVE-2022-0358.
#[test]
fn a_stranger_to_the_group_makes_no_set_group_id_program() {
    if !is_root() {
        return without_root_only_our_own_files_are_made();
    }
    let mut guest = client();
    let directory = group_directory(&mut guest);
    (guest.uid, guest.gid) = (USER, GROUP);
    let (entry, _) = guest
        .create(directory, "stranger", 0o2755, 0, libc::O_RDWR)
        .unwrap();
    assert_eq!(
        (entry.attr.gid, entry.attr.mode & 0o7777),
        (DIRECTORY_GROUP, 0o755)
    );
    // A member may, and only the guest knows that it is one.
    let header = ExtHeader {
        size: 16,
        kind: EXT_GROUPS,
    };
    guest.extensions = [bytes(&header), bytes(&1_u32), bytes(&DIRECTORY_GROUP)].concat();
    let (entry, _) = guest
        .create(directory, "member", 0o2755, 0, libc::O_RDWR)
        .unwrap();
    assert_eq!(entry.attr.mode & 0o7777, 0o2755);
    // The group was for that request alone.
    guest.extensions.clear();
    let (entry, _) = guest
        .create(directory, "again", 0o2755, 0, libc::O_RDWR)
        .unwrap();
    assert_eq!(entry.attr.mode & 0o7777, 0o755);
}

#[test]
fn set_id_bits_go_when_the_guest_says_so() {
    if !is_root() {
        return without_root_only_our_own_files_are_made();
    }
    let mut guest = client();
    let path = guest.directory.path().join("f");
    let set = |path: &std::path::Path| {
        fs::write(path, "data").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o6755)).unwrap();
    };
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().mode() & 0o7777;
    set(&path);
    let node = guest.lookup(ROOT_ID, "f").unwrap().nodeid;
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    for (kill, expected) in [(0, 0o6755), (WRITE_KILL_SUIDGID, 0o755)] {
        set(&path);
        guest.write(fh, 0, b"x", kill).unwrap();
        assert_eq!(mode(&path), expected, "write");
    }
    for (kill, expected) in [(0, 0o6755), (valid::KILL_SUIDGID, 0o755)] {
        for (by_handle, fh) in [(0, 0), (valid::FH, fh)] {
            set(&path);
            let request = SetattrIn {
                valid: valid::SIZE | kill | by_handle,
                size: 2,
                fh,
                ..SetattrIn::default()
            };
            guest.call(Opcode::Setattr, node, &bytes(&request)).unwrap();
            assert_eq!(mode(&path), expected, "truncate");
        }
    }
    for (kill, expected) in [(0, 0o6755), (OPEN_KILL_SUIDGID, 0o755)] {
        set(&path);
        let request = OpenIn {
            flags: (libc::O_WRONLY | libc::O_TRUNC).cast_unsigned(),
            open_flags: kill,
        };
        guest.call(Opcode::Open, node, &bytes(&request)).unwrap();
        assert_eq!(mode(&path), expected, "open");
    }
}

/// CVE-2021-20263.
#[test]
fn a_write_drops_file_capabilities_whoever_writes() {
    if !is_root() {
        return without_root_only_our_own_files_are_made();
    }
    let mut guest = client();
    let (entry, fh) = guest.create(ROOT_ID, "f", 0o755, 0, libc::O_RDWR).unwrap();
    // Version 2, CAP_NET_RAW permitted (linux/capability.h).
    let words = [0x0200_0001_u32, 1 << 13, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let request = SetxattrIn {
        size: u32::try_from(value.len()).unwrap(),
        ..SetxattrIn::default()
    };
    let attribute = name("security.capability");
    let body = [bytes(&request), attribute.clone(), value.clone()].concat();
    guest.call(Opcode::Setxattr, entry.nodeid, &body).unwrap();
    let get = [&[64, 0, 0, 0, 0, 0, 0, 0][..], &attribute].concat();
    assert_eq!(guest.call(Opcode::Getxattr, entry.nodeid, &get), Ok(value));
    guest.write(fh, 0, b"other code", 0).unwrap();
    let gone = guest.call(Opcode::Getxattr, entry.nodeid, &get);
    assert_eq!(gone, Err(Errno::NODATA));
}

#[test]
fn extensions_that_lie_stop_the_request() {
    let mut guest = client();
    guest.extensions = [
        bytes(&ExtHeader {
            size: 64,
            kind: EXT_GROUPS,
        }),
        vec![0; 8],
    ]
    .concat();
    let made = guest.create(ROOT_ID, "f", 0o644, 0, libc::O_RDWR);
    assert_eq!(made.unwrap_err(), Errno::INVAL);
    // Longer than the whole request.
    let mut request = guest.request(Opcode::Lookup as u32, ROOT_ID, &name("f"));
    request[36..38].copy_from_slice(&u16::MAX.to_le_bytes());
    let reply = guest.send_raw(&request, 4096);
    assert_eq!(reply[4..8], (-22_i32).to_le_bytes());
    assert!(!guest.directory.path().join("f").exists());
    assert_eq!(ExtHeader::SIZE, 8);
}
