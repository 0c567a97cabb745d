// SPDX-License-Identifier: Apache-2.0
//! What a hostile guest gets.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;

use crate::Options;
use crate::protocol::flags::setattr as valid;
use crate::protocol::{
    AttrOut, BatchForgetIn, CopyFileRangeIn, CreateIn, EntryOut, GetxattrIn, InHeader, InitIn,
    InitOut, LinkIn, MkdirIn, Opcode, OpenIn, OpenOut, OutHeader, ROOT_ID, ReadIn, ReleaseIn,
    RenameIn, SetattrIn, SetxattrIn, Wire, WriteIn,
};
use crate::test_client::{Client, bytes, name, take};

fn client() -> Client {
    Client::new(Options::default())
}

#[test]
fn names_that_are_no_single_component_reach_nothing() {
    let mut guest = client();
    fs::create_dir(guest.directory.path().join("d")).unwrap();
    fs::write(guest.directory.path().join("d/f"), "").unwrap();
    let before = fs::read_dir(guest.directory.path()).unwrap().count();
    let long = "x".repeat(256);
    let bad = [
        "",
        ".",
        "..",
        "/",
        "d/f",
        "/etc/passwd",
        "../x",
        "d/",
        "./d",
        &long,
    ];
    for text in bad {
        let component = name(text);
        let with = |prefix: Vec<u8>| [prefix, component.clone()].concat();
        let other = name("fine");
        let calls = [
            (Opcode::Lookup, component.clone()),
            (Opcode::Unlink, component.clone()),
            (Opcode::Rmdir, component.clone()),
            (
                Opcode::Mkdir,
                with(bytes(&MkdirIn {
                    mode: 0o755,
                    umask: 0,
                })),
            ),
            (
                Opcode::Mknod,
                with([&0o100_644_u32.to_le_bytes()[..], &[0; 12]].concat()),
            ),
            (
                Opcode::Create,
                with(bytes(&CreateIn {
                    mode: 0o644,
                    ..CreateIn::default()
                })),
            ),
            (Opcode::Link, with(bytes(&LinkIn { oldnodeid: ROOT_ID }))),
            (
                Opcode::Symlink,
                [component.clone(), name("target")].concat(),
            ),
            (
                Opcode::Rename,
                [with(bytes(&RenameIn { newdir: 1 })), other.clone()].concat(),
            ),
            (
                Opcode::Rename,
                [bytes(&RenameIn { newdir: 1 }), name("d"), component.clone()].concat(),
            ),
        ];
        for (opcode, body) in calls {
            let error = guest.call(opcode, ROOT_ID, &body).unwrap_err();
            let expected = if text.len() > 255 {
                Errno::NAMETOOLONG
            } else {
                Errno::INVAL
            };
            assert_eq!(error, expected, "{opcode:?} {text:?}");
        }
    }
    assert_eq!(
        fs::read_dir(guest.directory.path()).unwrap().count(),
        before
    );
}

#[test]
fn names_without_an_end_are_refused() {
    let mut guest = client();
    for opcode in [
        Opcode::Lookup,
        Opcode::Unlink,
        Opcode::Removexattr,
        Opcode::Symlink,
    ] {
        assert_eq!(
            guest.call(opcode, ROOT_ID, b"unterminated").unwrap_err(),
            Errno::INVAL
        );
        assert_eq!(guest.call(opcode, ROOT_ID, b"").unwrap_err(), Errno::INVAL);
    }
    // Two names are asked for, one is there.
    let body = [bytes(&RenameIn { newdir: 1 }), name("one")].concat();
    assert_eq!(
        guest.call(Opcode::Rename, ROOT_ID, &body).unwrap_err(),
        Errno::INVAL
    );
}

#[test]
fn links_lead_nowhere_on_the_host() {
    let mut guest = client();
    let path = guest.directory.path().to_owned();
    symlink("/", path.join("root")).unwrap();
    symlink("/etc/passwd", path.join("passwd")).unwrap();
    symlink("/proc/self/fd", path.join("magic")).unwrap();
    for link in ["root", "passwd", "magic"] {
        let entry = guest.lookup(ROOT_ID, link).unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(
            guest.lookup(entry.nodeid, "etc").unwrap_err(),
            Errno::NOTDIR
        );
        assert_eq!(guest.open(entry.nodeid, 0).unwrap_err(), Errno::LOOP);
        let opened = guest.call(Opcode::Opendir, entry.nodeid, &[0; 8]);
        assert_eq!(opened.unwrap_err(), Errno::NOTDIR);
        let truncate = SetattrIn {
            valid: valid::SIZE,
            ..SetattrIn::default()
        };
        let cut = guest.call(Opcode::Setattr, entry.nodeid, &bytes(&truncate));
        assert_eq!(cut.unwrap_err(), Errno::INVAL);
        let create = CreateIn {
            flags: libc::O_WRONLY.cast_unsigned(),
            mode: 0o644,
            ..CreateIn::default()
        };
        let body = [bytes(&create), name(link)].concat();
        assert_eq!(
            guest.call(Opcode::Create, ROOT_ID, &body).unwrap_err(),
            Errno::STALE
        );
    }
    // A directory swapped for a link after its look-up is still the directory.
    fs::create_dir(path.join("dir")).unwrap();
    let node = guest.lookup(ROOT_ID, "dir").unwrap().nodeid;
    fs::rename(path.join("dir"), path.join("moved")).unwrap();
    symlink("/etc", path.join("dir")).unwrap();
    assert_eq!(guest.lookup(node, "passwd").unwrap_err(), Errno::NOENT);
}

/// CVE-2020-35517.
#[test]
fn special_files_are_never_opened() {
    let mut guest = client();
    let path = guest.directory.path().to_owned();
    mknodat(
        CWD,
        path.join("fifo"),
        FileType::Fifo,
        Mode::from_raw_mode(0o666),
        0,
    )
    .unwrap();
    let _listener = UnixListener::bind(path.join("socket")).unwrap();
    for file in ["fifo", "socket"] {
        let entry = guest.lookup(ROOT_ID, file).unwrap();
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            // Opening the FIFO would block for ever.
            assert_eq!(guest.open(entry.nodeid, flags).unwrap_err(), Errno::NXIO);
            let made = guest.create(ROOT_ID, file, 0o644, 0, flags);
            // The guest looks again, and opens what it finds.
            assert_eq!(made.unwrap_err(), Errno::STALE);
        }
    }
    // The failed creations have not left look-ups behind.
    let entry = guest.lookup(ROOT_ID, "fifo").unwrap();
    guest.tell(Opcode::Forget, entry.nodeid, &bytes(&2_u64));
    let gone = guest.call(Opcode::Getattr, entry.nodeid, &[0; 16]);
    assert_eq!(gone.unwrap_err(), Errno::STALE);
}

#[test]
fn nothing_is_served_before_init() {
    let mut guest = Client::silent(Options::default());
    for number in 0..60 {
        let Some(opcode) = Opcode::from_number(number) else {
            continue;
        };
        if matches!(
            opcode,
            Opcode::Init | Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt
        ) {
            continue;
        }
        let early = guest.call(opcode, ROOT_ID, &[0; 128]);
        assert_eq!(early.unwrap_err(), Errno::INVAL, "{opcode:?}");
    }
}

#[test]
fn opcodes_that_are_none_are_not_implemented() {
    let mut guest = client();
    // The holes of the numbering, operations not offered, and beyond.
    for number in [
        0,
        7,
        19,
        31,
        34,
        37,
        39,
        40,
        48,
        49,
        53,
        4096,
        436_207_616,
        u32::MAX,
    ] {
        let answer = guest.call_with_room(number, ROOT_ID, &[0; 200], 4096);
        assert_eq!(answer.unwrap_err(), Errno::NOSYS, "{number}");
    }
}

#[test]
fn versions_are_agreed_on_or_refused() {
    let mut guest = Client::silent(Options::default());
    let mut init = |major, minor| {
        let request = InitIn {
            major,
            minor,
            ..InitIn::default()
        };
        guest.call(Opcode::Init, 0, &bytes(&request))
    };
    assert_eq!(init(6, 40).unwrap_err(), Errno::PROTO);
    assert_eq!(init(7, 30).unwrap_err(), Errno::PROTO);
    assert_eq!(take::<InitOut>(&init(8, 0).unwrap()).major, 7);
    assert_eq!(take::<InitOut>(&init(7, 31).unwrap()).minor, 41);
    // INIT_EXT promises a second flag word.
    let short = InitIn {
        major: 7,
        minor: 38,
        flags: 1 << 30,
        ..InitIn::default()
    };
    let answer = guest.call(Opcode::Init, 0, &bytes(&short));
    assert_eq!(answer.unwrap_err(), Errno::INVAL);
}

#[test]
fn requests_cut_short_are_refused_by_every_operation() {
    let mut guest = client();
    for number in 0..60 {
        let Some(opcode) = Opcode::from_number(number) else {
            continue;
        };
        for length in [0, 1, 7, 8, 15, 16, 39] {
            let request = guest.request(number, ROOT_ID, &vec![0xff; length]);
            // Whatever comes back is a whole reply or none.
            let reply = guest.send_raw(&request, 4096);
            assert!(
                reply.is_empty() || reply.len() >= OutHeader::SIZE,
                "{opcode:?}"
            );
            // The same with a length that claims more than there is.
            let mut request = request;
            request[..4].copy_from_slice(&u32::MAX.to_le_bytes());
            let reply = guest.send_raw(&request, 4096);
            if !reply.is_empty() {
                let header: OutHeader = take(&reply);
                assert_eq!((header.error, reply.len()), (-22, 16), "{opcode:?}");
            }
        }
    }
    for length in 0..InHeader::SIZE {
        assert!(guest.send_raw(&vec![0xff; length], 4096).is_empty());
    }
}

#[test]
fn an_operation_without_room_for_its_reply_does_not_happen() {
    let mut guest = client();
    let path = guest.directory.path().to_owned();
    let mkdir = [
        bytes(&MkdirIn {
            mode: 0o755,
            umask: 0,
        }),
        name("d"),
    ]
    .concat();
    let least = OutHeader::SIZE + EntryOut::SIZE;
    for room in [OutHeader::SIZE, least - 1] {
        let answer = guest.call_with_room(Opcode::Mkdir as u32, ROOT_ID, &mkdir, room);
        assert_eq!(answer.unwrap_err(), Errno::INVAL);
        assert!(!path.join("d").exists());
    }
    let request = guest.request(Opcode::Mkdir as u32, ROOT_ID, &mkdir);
    assert!(guest.send_raw(&request, 15).is_empty());
    assert!(!path.join("d").exists());
    guest
        .call_with_room(Opcode::Mkdir as u32, ROOT_ID, &mkdir, least)
        .unwrap();
    // A read gets what fits, a listing without room for a name an error.
    fs::write(path.join("f"), [1; 100]).unwrap();
    let node = guest.lookup(ROOT_ID, "f").unwrap().nodeid;
    let fh = guest.open(node, 0).unwrap();
    let read = bytes(&ReadIn {
        fh,
        size: u32::MAX,
        ..ReadIn::default()
    });
    let part = guest
        .call_with_room(Opcode::Read as u32, node, &read, 16 + 10)
        .unwrap();
    assert_eq!(part, [1; 10]);
    let open = guest.call(Opcode::Opendir, ROOT_ID, &[0; 8]).unwrap();
    let fh = take::<OpenOut>(&open).fh;
    let list = bytes(&ReadIn {
        fh,
        size: u32::MAX,
        ..ReadIn::default()
    });
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        let answer = guest.call_with_room(opcode as u32, ROOT_ID, &list, 16 + 24);
        assert_eq!(answer.unwrap_err(), Errno::INVAL);
        assert!(guest.call(opcode, ROOT_ID, &list).unwrap().len() <= 64 * 1024);
    }
}

#[test]
fn numbers_that_were_never_given_are_refused() {
    let mut guest = client();
    let (file, fh) = guest.create(ROOT_ID, "f", 0o600, 0, libc::O_RDWR).unwrap();
    for number in [99, 1 << 32, u64::MAX] {
        assert_eq!(guest.lookup(number, "f").unwrap_err(), Errno::STALE);
        assert_eq!(guest.open(number, 0).unwrap_err(), Errno::STALE);
        assert_eq!(guest.read(number, 0, 1).unwrap_err(), Errno::BADF);
        assert_eq!(guest.write(number, 0, b"x", 0).unwrap_err(), Errno::BADF);
        let release = ReleaseIn {
            fh: number,
            ..ReleaseIn::default()
        };
        let answer = guest.call(Opcode::Release, 0, &bytes(&release));
        assert_eq!(answer.unwrap_err(), Errno::BADF);
        // Nothing to answer, nothing to break.
        guest.tell(Opcode::Forget, number, &bytes(&u64::MAX));
    }
    // A file is no directory and the other way round.
    let list = bytes(&ReadIn {
        fh,
        size: 4096,
        ..ReadIn::default()
    });
    assert_eq!(
        guest.call(Opcode::Readdir, ROOT_ID, &list).unwrap_err(),
        Errno::NOTDIR
    );
    let open = guest.call(Opcode::Opendir, ROOT_ID, &[0; 8]).unwrap();
    let directory = take::<OpenOut>(&open).fh;
    assert_eq!(guest.read(directory, 0, 1).unwrap_err(), Errno::ISDIR);
    assert_eq!(guest.write(directory, 0, b"x", 0).unwrap_err(), Errno::BADF);
    assert_eq!(guest.open(ROOT_ID, 0).unwrap_err(), Errno::ISDIR);
    // The root can't be forgotten, a file not more often than it was looked up.
    guest.tell(Opcode::Forget, ROOT_ID, &bytes(&u64::MAX));
    guest.tell(Opcode::Forget, file.nodeid, &bytes(&u64::MAX));
    guest.tell(Opcode::Forget, file.nodeid, &bytes(&1_u64));
    assert!(guest.lookup(ROOT_ID, "f").is_ok());
    let batch = BatchForgetIn {
        count: u32::MAX,
        dummy: 0,
    };
    guest.tell(Opcode::BatchForget, 0, &bytes(&batch));
}

#[test]
fn offsets_and_sizes_beyond_any_file_are_refused() {
    let mut guest = client();
    let (node, fh) = guest.create(ROOT_ID, "f", 0o600, 0, libc::O_RDWR).unwrap();
    for offset in [u64::MAX, u64::MAX - 3, 1 << 63, (1 << 63) - 1] {
        assert_eq!(guest.read(fh, offset, 4).unwrap_err(), Errno::INVAL);
        assert_eq!(
            guest.write(fh, offset, b"data", 0).unwrap_err(),
            Errno::INVAL
        );
    }
    // More data claimed than sent.
    let claim = |size| {
        bytes(&WriteIn {
            fh,
            size,
            ..WriteIn::default()
        })
    };
    let short = guest.call(Opcode::Write, 0, &[claim(5), b"data".to_vec()].concat());
    assert_eq!(short.unwrap_err(), Errno::FAULT);
    assert_eq!(
        guest.call(Opcode::Write, 0, &claim(u32::MAX)).unwrap_err(),
        Errno::INVAL
    );
    let size = SetattrIn {
        valid: valid::SIZE,
        size: u64::MAX,
        ..SetattrIn::default()
    };
    assert!(
        guest
            .call(Opcode::Setattr, node.nodeid, &bytes(&size))
            .is_err()
    );
    let copy = CopyFileRangeIn {
        fh_in: fh,
        fh_out: fh,
        off_in: u64::MAX,
        off_out: u64::MAX,
        len: u64::MAX,
        ..CopyFileRangeIn::default()
    };
    assert!(guest.call(Opcode::CopyFileRange, 0, &bytes(&copy)).is_err());
    let attr: AttrOut = take(&guest.call(Opcode::Getattr, node.nodeid, &[0; 16]).unwrap());
    assert_eq!(attr.attr.size, 0);
    // A request that would have to be copied whole.
    let huge = vec![b'x'; 128 * 1024];
    assert_eq!(
        guest.call(Opcode::Lookup, ROOT_ID, &huge).unwrap_err(),
        Errno::TOOBIG
    );
}

#[test]
fn attributes_of_the_host_are_out_of_reach() {
    let mut guest = client();
    fs::write(guest.directory.path().join("f"), "").unwrap();
    let node = guest.lookup(ROOT_ID, "f").unwrap().nodeid;
    let set = |size: u32, text: &str, value: &[u8]| {
        let request = SetxattrIn {
            size,
            ..SetxattrIn::default()
        };
        [&bytes(&request)[..], &name(text), value].concat()
    };
    for text in [
        "trusted.overlay.opaque",
        "security.selinux",
        "system.posix_acl_access",
        "x",
    ] {
        let answer = guest.call(Opcode::Setxattr, node, &set(1, text, b"y"));
        assert_eq!(answer.unwrap_err(), Errno::OPNOTSUPP, "{text}");
        let get = [
            bytes(&GetxattrIn {
                size: 9,
                padding: 0,
            }),
            name(text),
        ]
        .concat();
        let answer = guest.call(Opcode::Getxattr, node, &get);
        assert_eq!(answer.unwrap_err(), Errno::OPNOTSUPP, "{text}");
        let answer = guest.call(Opcode::Removexattr, node, &name(text));
        assert_eq!(answer.unwrap_err(), Errno::OPNOTSUPP, "{text}");
    }
    let long = format!("user.{}", "x".repeat(251));
    let answer = guest.call(Opcode::Setxattr, node, &set(1, &long, b"y"));
    assert_eq!(answer.unwrap_err(), Errno::RANGE);
    let large = vec![0; 65_537];
    let answer = guest.call(Opcode::Setxattr, node, &set(65_537, "user.a", &large));
    assert_eq!(answer.unwrap_err(), Errno::TOOBIG);
    let answer = guest.call(Opcode::Setxattr, node, &set(2, "user.a", b"y"));
    assert_eq!(answer.unwrap_err(), Errno::INVAL);
}

/// CVE-2020-10717.
#[test]
fn a_guest_runs_out_of_files_before_the_process_does() {
    let mut guest = Client::new(Options {
        max_open_files: 10,
        ..Options::default()
    });
    for index in 0..20 {
        fs::write(guest.directory.path().join(index.to_string()), "").unwrap();
    }
    let nodes: Vec<_> = (0..9)
        .map(|index| guest.lookup(ROOT_ID, &index.to_string()).unwrap().nodeid)
        .collect();
    for known_or_not in ["0", "9"] {
        let refused = guest.lookup(ROOT_ID, known_or_not).unwrap_err();
        assert_eq!(refused, Errno::NOMEM, "{known_or_not}");
    }
    assert_eq!(guest.open(nodes[0], 0).unwrap_err(), Errno::NFILE);
    let made = guest.create(ROOT_ID, "new", 0o600, 0, libc::O_RDWR);
    assert_eq!(made.unwrap_err(), Errno::NFILE);
    // What fails for want of files has not happened.
    assert!(!guest.directory.path().join("new").exists());
    guest.tell(Opcode::Forget, nodes[0], &bytes(&1_u64));
    let fh = guest.open(nodes[1], 0).unwrap();
    assert_eq!(guest.open(nodes[1], 0).unwrap_err(), Errno::NFILE);
    let release = ReleaseIn {
        fh,
        ..ReleaseIn::default()
    };
    guest
        .call(Opcode::Release, nodes[1], &bytes(&release))
        .unwrap();
    // A listing still names what it can't look up.
    guest.lookup(ROOT_ID, "0").unwrap();
    guest.tell(Opcode::Forget, nodes[2], &bytes(&1_u64));
    let open = guest
        .call(Opcode::Opendir, ROOT_ID, &bytes(&OpenIn::default()))
        .unwrap();
    let fh = take::<OpenOut>(&open).fh;
    let list = ReadIn {
        fh,
        size: 65_536,
        ..ReadIn::default()
    };
    let listing = guest
        .call(Opcode::Readdirplus, ROOT_ID, &bytes(&list))
        .unwrap();
    assert!(listing.len() > 20 * (EntryOut::SIZE + 24));
}

/// CVE-2020-28914: the guest's own mount flags are no protection.
#[test]
fn a_read_only_share_is_read_only_here() {
    let mut guest = Client::new(Options {
        read_only: true,
        ..Options::default()
    });
    fs::write(guest.directory.path().join("f"), "keep").unwrap();
    let node = guest.lookup(ROOT_ID, "f").unwrap().nodeid;
    for number in 0..60 {
        let Some(opcode) = Opcode::from_number(number).filter(|opcode| opcode.modifies()) else {
            continue;
        };
        let answer = guest.call(opcode, node, &[0; 256]);
        assert_eq!(answer.unwrap_err(), Errno::ROFS, "{opcode:?}");
    }
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags).unwrap_err(), Errno::ROFS);
    }
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(fh, 0, 4).unwrap(), b"keep");
}
