// SPDX-License-Identifier: Apache-2.0
//! What a well-behaved guest gets.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use rustix::io::Errno;

use crate::protocol::flags::{init, open_out, setattr as valid};
use crate::protocol::{
    AttrOut, BatchForgetIn, CopyFileRangeIn, CreateIn, Dirent, EntryOut, FallocateIn, ForgetOne,
    FsyncIn, GetattrIn, GetxattrIn, LinkIn, LseekIn, LseekOut, MkdirIn, MknodIn, Opcode, OpenIn,
    OpenOut, ROOT_ID, ReadIn, ReleaseIn, Rename2In, RenameIn, SetattrIn, SetxattrIn, StatfsOut,
    StatxIn, StatxOut, Wire, WriteIn, WriteOut,
};
use crate::test_client::{Client, bytes, name, take};
use crate::{Cache, Options};

fn client() -> Client {
    Client::new(Options::default())
}

#[test]
fn a_file_is_made_written_read_and_removed() {
    let mut guest = client();
    let (entry, fh) = guest
        .create(ROOT_ID, "file", 0o644, 0o022, libc::O_RDWR)
        .unwrap();
    let written: WriteOut = take(&guest.write(fh, 3, b"hello", 0).unwrap());
    assert_eq!(written.size, 5);
    assert_eq!(guest.read(fh, 0, 100).unwrap(), b"\0\0\0hello");
    let data_only = FsyncIn {
        fh,
        fsync_flags: 1,
        padding: 0,
    };
    guest
        .call(Opcode::Fsync, entry.nodeid, &bytes(&data_only))
        .unwrap();
    guest
        .call(
            Opcode::Flush,
            entry.nodeid,
            &[bytes(&fh), vec![0; 16]].concat(),
        )
        .unwrap();
    let attr: AttrOut = take(&guest.call(Opcode::Getattr, entry.nodeid, &[0; 16]).unwrap());
    assert_eq!((attr.attr.size, attr.attr.mode & 0o7777), (8, 0o644));
    guest.call(Opcode::Unlink, ROOT_ID, &name("file")).unwrap();
    // Gone by name, alive by handle and node.
    assert_eq!(guest.lookup(ROOT_ID, "file").unwrap_err(), Errno::NOENT);
    assert_eq!(guest.read(fh, 3, 5).unwrap(), b"hello");
    let release = ReleaseIn {
        fh,
        ..ReleaseIn::default()
    };
    guest
        .call(Opcode::Release, entry.nodeid, &bytes(&release))
        .unwrap();
    assert_eq!(guest.read(fh, 0, 1).unwrap_err(), Errno::BADF);
}

#[test]
fn appending_writes_go_to_the_end() {
    let mut guest = client();
    let (_, fh) = guest
        .create(ROOT_ID, "log", 0o600, 0, libc::O_WRONLY)
        .unwrap();
    guest.write(fh, 0, b"one", 0).unwrap();
    let request = WriteIn {
        fh,
        offset: 0,
        size: 3,
        flags: libc::O_APPEND.cast_unsigned(),
        ..WriteIn::default()
    };
    let append = [&bytes(&request)[..], b"two"].concat();
    guest.call(Opcode::Write, 0, &append).unwrap();
    assert_eq!(
        fs::read(guest.directory.path().join("log")).unwrap(),
        b"onetwo"
    );
}

#[test]
fn an_inode_lives_until_its_look_ups_are_forgotten() {
    let mut guest = client();
    fs::write(guest.directory.path().join("a"), "a").unwrap();
    let node = guest.lookup(ROOT_ID, "a").unwrap().nodeid;
    assert_eq!(guest.lookup(ROOT_ID, "a").unwrap().nodeid, node);
    guest.tell(Opcode::Forget, node, &bytes(&1_u64));
    assert!(guest.call(Opcode::Getattr, node, &[0; 16]).is_ok());
    let batch = BatchForgetIn { count: 1, dummy: 0 };
    let one = ForgetOne {
        nodeid: node,
        nlookup: 1,
    };
    guest.tell(
        Opcode::BatchForget,
        0,
        &[bytes(&batch), bytes(&one)].concat(),
    );
    let gone = guest.call(Opcode::Getattr, node, &[0; 16]);
    assert_eq!(gone.unwrap_err(), Errno::STALE);
    // The number isn't used again.
    assert_ne!(guest.lookup(ROOT_ID, "a").unwrap().nodeid, node);
}

#[test]
fn names_are_moved_linked_and_exchanged() {
    let mut guest = client();
    let path = guest.directory.path().to_owned();
    fs::write(path.join("a"), "a").unwrap();
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    let sub: EntryOut = take(
        &guest
            .call(
                Opcode::Mkdir,
                ROOT_ID,
                &[bytes(&mkdir), name("sub")].concat(),
            )
            .unwrap(),
    );
    let rename = RenameIn { newdir: sub.nodeid };
    let body = [bytes(&rename), name("a"), name("b")].concat();
    guest.call(Opcode::Rename, ROOT_ID, &body).unwrap();
    let file = guest.lookup(sub.nodeid, "b").unwrap();
    let link = LinkIn {
        oldnodeid: file.nodeid,
    };
    let linked: EntryOut = take(
        &guest
            .call(Opcode::Link, ROOT_ID, &[bytes(&link), name("c")].concat())
            .unwrap(),
    );
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2));
    fs::write(path.join("d"), "d").unwrap();
    let exchange = |flags| Rename2In {
        newdir: ROOT_ID,
        flags,
        padding: 0,
    };
    let body = |flags| [bytes(&exchange(flags)), name("c"), name("d")].concat();
    guest
        .call(Opcode::Rename2, ROOT_ID, &body(libc::RENAME_EXCHANGE))
        .unwrap();
    assert_eq!(fs::read(path.join("c")).unwrap(), b"d");
    let kept = guest.call(Opcode::Rename2, ROOT_ID, &body(libc::RENAME_NOREPLACE));
    assert_eq!(kept.unwrap_err(), Errno::EXIST);
    let odd = guest.call(Opcode::Rename2, ROOT_ID, &body(1 << 7));
    assert_eq!(odd.unwrap_err(), Errno::INVAL);
    let busy = guest.call(Opcode::Rmdir, ROOT_ID, &name("sub"));
    assert_eq!(busy.unwrap_err(), Errno::NOTEMPTY);
}

#[test]
fn symbolic_links_are_text_and_can_be_linked() {
    let mut guest = client();
    let body = [name("link"), name("../../etc/passwd")].concat();
    let entry: EntryOut = take(&guest.call(Opcode::Symlink, ROOT_ID, &body).unwrap());
    let text = guest.call(Opcode::Readlink, entry.nodeid, &[]).unwrap();
    assert_eq!(text, b"../../etc/passwd");
    let link = LinkIn {
        oldnodeid: entry.nodeid,
    };
    let other: EntryOut = take(
        &guest
            .call(
                Opcode::Link,
                ROOT_ID,
                &[bytes(&link), name("other")].concat(),
            )
            .unwrap(),
    );
    // The link itself, not what it points at.
    assert_eq!(other.nodeid, entry.nodeid);
    assert_eq!(other.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(
        guest.open(entry.nodeid, libc::O_RDONLY).unwrap_err(),
        Errno::LOOP
    );
}

#[test]
fn attributes_are_set_one_by_one() {
    let mut guest = client();
    let path = guest.directory.path().join("f");
    fs::write(&path, "0123456789").unwrap();
    let node = guest.lookup(ROOT_ID, "f").unwrap().nodeid;
    let set = SetattrIn {
        valid: valid::SIZE | valid::MODE | valid::MTIME,
        size: 4,
        mode: libc::S_IFREG | 0o4711,
        mtime: 1_000_000_000,
        mtimensec: 5,
        ..SetattrIn::default()
    };
    let reply: AttrOut = take(&guest.call(Opcode::Setattr, node, &bytes(&set)).unwrap());
    assert_eq!((reply.attr.size, reply.attr.mode & 0o7777), (4, 0o4711));
    let host = fs::metadata(&path).unwrap();
    assert_eq!((host.mtime(), host.mtime_nsec()), (1_000_000_000, 5));
    let now = SetattrIn {
        valid: valid::ATIME | valid::ATIME_NOW,
        ..SetattrIn::default()
    };
    guest.call(Opcode::Setattr, node, &bytes(&now)).unwrap();
    let touched = fs::metadata(&path).unwrap();
    assert_eq!(touched.mtime(), 1_000_000_000);
    assert!(touched.atime() > 1_000_000_000);
    let request = StatxIn {
        sx_mask: 0xfff,
        ..StatxIn::default()
    };
    let statx: StatxOut = take(&guest.call(Opcode::Statx, node, &bytes(&request)).unwrap());
    assert_eq!((statx.stat.ino, statx.stat.size), (host.ino(), 4));
    let statfs: StatfsOut = take(&guest.call(Opcode::Statfs, node, &[]).unwrap());
    assert_eq!(statfs.namelen, 255);
}

/// Names of a listing, its end position, and the nodes that came with it.
fn listed(reply: &[u8], plus: bool) -> (Vec<String>, u64, Vec<u64>) {
    let (mut rest, mut names, mut last, mut nodes) = (reply, Vec::new(), 0, Vec::new());
    while !rest.is_empty() {
        if plus {
            nodes.push(EntryOut::take(&mut rest).unwrap().nodeid);
        }
        let entry = Dirent::take(&mut rest).unwrap();
        let length = entry.namelen as usize;
        names.push(String::from_utf8(rest[..length].to_vec()).unwrap());
        rest = &rest[length.next_multiple_of(8)..];
        last = entry.off;
    }
    (names, last, nodes)
}

#[test]
fn a_large_directory_is_listed_piece_by_piece() {
    for plus in [false, true] {
        let mut guest = client();
        let mut expected = BTreeSet::from([".".to_owned(), "..".to_owned()]);
        for index in 0..500 {
            let name = format!("{index}-{}", "n".repeat(index % 60));
            fs::write(guest.directory.path().join(&name), "").unwrap();
            expected.insert(name);
        }
        let open = guest.call(Opcode::Opendir, ROOT_ID, &bytes(&OpenIn::default()));
        let fh = take::<OpenOut>(&open.unwrap()).fh;
        let opcode = if plus {
            Opcode::Readdirplus
        } else {
            Opcode::Readdir
        };
        let mut page = |offset| {
            let request = ReadIn {
                fh,
                offset,
                size: 4096,
                ..ReadIn::default()
            };
            let reply = guest.call(opcode, ROOT_ID, &bytes(&request)).unwrap();
            assert!(reply.len() <= 4096);
            listed(&reply, plus)
        };
        let (mut offset, mut seen, mut pages) = (0, Vec::new(), Vec::new());
        loop {
            let (names, next, nodes) = page(offset);
            if names.is_empty() {
                break;
            }
            for (name, node) in names.iter().zip(&nodes) {
                assert_eq!(*node == 0, name.starts_with('.'), "{name}");
            }
            pages.push(offset);
            seen.extend(names);
            offset = next;
        }
        assert!(pages.len() > 3);
        assert_eq!(seen.len(), expected.len(), "no name twice");
        assert_eq!(seen.iter().cloned().collect::<BTreeSet<_>>(), expected);
        // Any page can be asked for again.
        let (names, ..) = page(pages[2]);
        assert_eq!(
            names[0],
            seen[seen.iter().position(|name| *name == names[0]).unwrap()]
        );
        assert_eq!(page(0).0[..], seen[..page(0).0.len()]);
    }
}

#[test]
fn extended_attributes_of_the_user_are_kept() {
    let mut guest = client();
    symlink("x", guest.directory.path().join("l")).unwrap();
    fs::write(guest.directory.path().join("f"), "").unwrap();
    let node = guest.lookup(ROOT_ID, "f").unwrap().nodeid;
    let set = SetxattrIn {
        size: 3,
        ..SetxattrIn::default()
    };
    let body = [&bytes(&set)[..], b"user.a\0", b"val"].concat();
    guest.call(Opcode::Setxattr, node, &body).unwrap();
    let get = |size| [&bytes(&GetxattrIn { size, padding: 0 })[..], b"user.a\0"].concat();
    assert_eq!(
        guest.call(Opcode::Getxattr, node, &get(100)).unwrap(),
        b"val"
    );
    assert_eq!(
        guest.call(Opcode::Getxattr, node, &get(0)).unwrap(),
        [3, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        guest.call(Opcode::Getxattr, node, &get(2)).unwrap_err(),
        Errno::RANGE
    );
    let list = bytes(&GetxattrIn {
        size: 100,
        padding: 0,
    });
    assert_eq!(
        guest.call(Opcode::Listxattr, node, &list).unwrap(),
        b"user.a\0"
    );
    guest.call(Opcode::Removexattr, node, b"user.a\0").unwrap();
    assert_eq!(
        guest.call(Opcode::Getxattr, node, &get(9)).unwrap_err(),
        Errno::NODATA
    );
    let link = guest.lookup(ROOT_ID, "l").unwrap().nodeid;
    assert_eq!(guest.call(Opcode::Listxattr, link, &list).unwrap(), b"");
}

#[test]
fn space_is_reserved_searched_and_copied() {
    let mut guest = client();
    let (_, fh) = guest.create(ROOT_ID, "f", 0o600, 0, libc::O_RDWR).unwrap();
    guest.write(fh, 1 << 20, b"data", 0).unwrap();
    let seek = LseekIn {
        fh,
        whence: 3,
        ..LseekIn::default()
    };
    let found: LseekOut = take(&guest.call(Opcode::Lseek, 0, &bytes(&seek)).unwrap());
    assert_eq!(found.offset, 1 << 20);
    let end = LseekIn { whence: 2, ..seek };
    assert_eq!(
        guest.call(Opcode::Lseek, 0, &bytes(&end)).unwrap_err(),
        Errno::INVAL
    );
    let reserve = FallocateIn {
        fh,
        length: 2 << 20,
        ..FallocateIn::default()
    };
    guest.call(Opcode::Fallocate, 0, &bytes(&reserve)).unwrap();
    assert_eq!(
        fs::metadata(guest.directory.path().join("f"))
            .unwrap()
            .len(),
        2 << 20
    );
    let collapse = FallocateIn { mode: 8, ..reserve };
    let refused = guest.call(Opcode::Fallocate, 0, &bytes(&collapse));
    assert_eq!(refused.unwrap_err(), Errno::OPNOTSUPP);
    let copy = CopyFileRangeIn {
        fh_in: fh,
        off_in: 1 << 20,
        fh_out: fh,
        len: 4,
        ..CopyFileRangeIn::default()
    };
    let copied: WriteOut = take(&guest.call(Opcode::CopyFileRange, 0, &bytes(&copy)).unwrap());
    assert_eq!(copied.size, 4);
    assert_eq!(guest.read(fh, 0, 4).unwrap(), b"data");
}

#[test]
fn an_unnamed_file_can_be_given_a_name() {
    let mut guest = client();
    let request = CreateIn {
        flags: libc::O_RDWR.cast_unsigned(),
        mode: libc::S_IFREG | 0o640,
        ..CreateIn::default()
    };
    // The name that Linux sends along is "/".
    let body = [&bytes(&request)[..], b"/\0"].concat();
    let reply = match guest.call(Opcode::Tmpfile, ROOT_ID, &body) {
        // Not every file system of a host has them.
        Err(errno) => return assert_eq!(errno, Errno::OPNOTSUPP),
        Ok(reply) => reply,
    };
    let entry: EntryOut = take(&reply);
    let fh = take::<OpenOut>(&reply[EntryOut::SIZE..]).fh;
    guest.write(fh, 0, b"tmp", 0).unwrap();
    let link = LinkIn {
        oldnodeid: entry.nodeid,
    };
    guest
        .call(
            Opcode::Link,
            ROOT_ID,
            &[bytes(&link), name("named")].concat(),
        )
        .unwrap();
    assert_eq!(
        fs::read(guest.directory.path().join("named")).unwrap(),
        b"tmp"
    );
}

#[test]
fn caches_are_trusted_as_far_as_the_option_says() {
    for (cache, seconds) in [(Cache::Never, 0), (Cache::Auto, 1), (Cache::Always, 86_400)] {
        let mut guest = Client::new(Options {
            cache,
            ..Options::default()
        });
        fs::write(guest.directory.path().join("f"), "1").unwrap();
        let entry = guest.lookup(ROOT_ID, "f").unwrap();
        assert_eq!((entry.entry_valid, entry.attr_valid), (seconds, seconds));
        let mut flags = || {
            let reply = guest.call(Opcode::Open, entry.nodeid, &[0; 8]).unwrap();
            take::<OpenOut>(&reply).open_flags
        };
        let (first, second) = (flags(), flags());
        let kept = |flags| flags & open_out::KEEP_CACHE != 0;
        assert_eq!(kept(first), cache == Cache::Always);
        assert_eq!(kept(second), cache != Cache::Never);
        assert_eq!(first & open_out::DIRECT_IO != 0, cache == Cache::Never);
        fs::write(guest.directory.path().join("f"), "22").unwrap();
        let reply = guest.call(Opcode::Open, entry.nodeid, &[0; 8]).unwrap();
        let third = take::<OpenOut>(&reply).open_flags;
        assert_eq!(
            kept(third),
            cache == Cache::Always,
            "changed behind the guest"
        );
        // Only a guest that is alone with its files may remember what isn't there.
        let missing = guest.lookup(ROOT_ID, "none").map(|entry| entry.nodeid);
        let expected = if cache == Cache::Always {
            Ok(0)
        } else {
            Err(Errno::NOENT)
        };
        assert_eq!(missing, expected);
    }
}

#[test]
fn files_of_other_types_are_made_but_devices_only_where_they_are_harmless() {
    let mut guest = client();
    let mut make = |mode: u32, rdev: u32, file: &str| {
        let request = MknodIn {
            mode,
            rdev,
            ..MknodIn::default()
        };
        guest.call(
            Opcode::Mknod,
            ROOT_ID,
            &[bytes(&request), name(file)].concat(),
        )
    };
    for (mode, file) in [
        (libc::S_IFIFO, "p"),
        (libc::S_IFSOCK, "s"),
        (libc::S_IFREG, "r"),
    ] {
        let entry: EntryOut = take(&make(mode | 0o600, 0, file).unwrap());
        assert_eq!(entry.attr.mode, mode | 0o600);
    }
    for mode in [libc::S_IFDIR, libc::S_IFLNK, 0o170_000] {
        assert_eq!(make(mode, 0, "x").unwrap_err(), Errno::INVAL);
    }
    let nodev = rustix::fs::statvfs(guest.directory.path()).unwrap().f_flag;
    if !nodev.contains(rustix::fs::StatVfsMountFlags::NODEV) {
        let request = MknodIn {
            mode: libc::S_IFBLK | 0o666,
            rdev: 0x801,
            ..MknodIn::default()
        };
        let body = [bytes(&request), name("disk")].concat();
        let refused = guest.call(Opcode::Mknod, ROOT_ID, &body);
        assert_eq!(refused.unwrap_err(), Errno::PERM);
    }
}

#[test]
fn a_guest_that_starts_over_holds_nothing() {
    let mut guest = client();
    let (entry, fh) = guest.create(ROOT_ID, "f", 0o600, 0, libc::O_RDWR).unwrap();
    guest.call(Opcode::Destroy, 0, &[]).unwrap();
    let getattr = bytes(&GetattrIn::default());
    assert_eq!(
        guest.call(Opcode::Getattr, ROOT_ID, &getattr).unwrap_err(),
        Errno::INVAL
    );
    guest.init().unwrap();
    assert_eq!(
        guest
            .call(Opcode::Getattr, entry.nodeid, &getattr)
            .unwrap_err(),
        Errno::STALE
    );
    assert_eq!(guest.read(fh, 0, 1).unwrap_err(), Errno::BADF);
}

#[test]
fn what_is_only_written_goes_past_the_guests_cache() {
    let flags = |guest: &mut Client, mode: i32| {
        let request = CreateIn {
            flags: mode.cast_unsigned(),
            mode: 0o644,
            ..CreateIn::default()
        };
        let body = [bytes(&request), name("f")].concat();
        let made = guest.call(Opcode::Create, ROOT_ID, &body).unwrap();
        let (entry, made) = made.split_at(EntryOut::SIZE);
        let request = OpenIn {
            flags: mode.cast_unsigned(),
            open_flags: 0,
        };
        let node = take::<EntryOut>(entry).nodeid;
        let opened = guest.call(Opcode::Open, node, &bytes(&request)).unwrap();
        let past = |reply: &[u8]| take::<OpenOut>(reply).open_flags & open_out::DIRECT_IO != 0;
        (past(made), past(&opened))
    };
    let modes = [
        (libc::O_WRONLY, true),
        (libc::O_RDWR, false),
        (libc::O_RDONLY, false),
    ];
    for (mode, past) in modes {
        assert_eq!(flags(&mut client(), mode), (past, past), "{mode}");
        // An older guest would go on reading what it has cached of the file.
        let mut old = Client::silent(Options::default());
        old.init_with(!init::DIRECT_IO_ALLOW_MMAP).unwrap();
        assert_eq!(flags(&mut old, mode), (false, false), "{mode}");
    }
}

#[test]
fn below_some_folders_the_guest_caches_otherwise() {
    let mut guest = Client::new(Options {
        cache_below: vec![
            ("a/live".into(), Cache::Never),
            ("a/own".into(), Cache::Always),
        ],
        ..Options::default()
    });
    for folder in ["a/live", "a/own", "a/other"] {
        let sub = guest.directory.path().join(folder).join("sub");
        fs::create_dir_all(&sub).unwrap();
        fs::write(sub.join("f"), "1").unwrap();
    }
    let a = guest.lookup(ROOT_ID, "a").unwrap();
    for (folder, below, missing, past) in [
        ("live", 0, Err(Errno::NOENT), true),
        ("own", 86_400, Ok(86_400), false),
        ("other", 1, Err(Errno::NOENT), false),
    ] {
        // Of the folder itself the host changes the names.
        let it = guest.lookup(a.nodeid, folder).unwrap();
        assert_eq!((it.entry_valid, it.attr_valid), (1, 1), "{folder}");
        let none = guest.lookup(it.nodeid, "none");
        assert_eq!(none.map(|_| ()), Err(Errno::NOENT), "{folder}");
        let sub = guest.lookup(it.nodeid, "sub").unwrap();
        let file = guest.lookup(sub.nodeid, "f").unwrap();
        for entry in [&sub, &file] {
            let valid = (entry.entry_valid, entry.attr_valid);
            assert_eq!(valid, (below, below), "{folder}");
        }
        let none = guest.lookup(sub.nodeid, "none");
        assert_eq!(none.map(|entry| entry.entry_valid), missing, "{folder}");
        let reply = guest.call(Opcode::Open, file.nodeid, &[0; 8]).unwrap();
        let flags = take::<OpenOut>(&reply).open_flags;
        assert_eq!(flags & open_out::DIRECT_IO != 0, past, "{folder}");
        let kept = flags & open_out::KEEP_CACHE != 0;
        assert_eq!(kept, folder == "own", "{folder}");
    }
}
