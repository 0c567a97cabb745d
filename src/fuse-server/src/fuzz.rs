// SPDX-License-Identifier: Apache-2.0
//! A guest that does anything, for fuzzers and for the random test below.
//!
//! Requests are valid by default, so that the operations are really entered, and now and then
//! corrupted. What must hold whatever the input: no panic, replies that are whole, and a witness
//! beside the shared directory that nothing touches.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that can't go on should stop"
)]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::protocol::{
    BatchForgetIn, CopyFileRangeIn, CreateIn, EntryOut, FallocateIn, ForgetIn, ForgetOne, FsyncIn,
    GetattrIn, GetxattrIn, InHeader, InitIn, LinkIn, LseekIn, MkdirIn, MknodIn, Opcode, OpenIn,
    OpenOut, OutHeader, ROOT_ID, ReadIn, ReleaseIn, Rename2In, RenameIn, SetattrIn, SetxattrIn,
    StatxIn, Wire, WriteIn,
};
use crate::test_client::{bytes, name};
use crate::{Cache, Options, ProcSelfFd, Server, Worker};

/// Requests of one run; a fuzzer finds short causes anyway.
const MAX_REQUESTS: usize = 200;

/// Names that collide often, and some that must get nowhere.
const NAMES: [&str; 12] = [
    "a",
    "b",
    "c",
    "d",
    "witness",
    "..",
    ".",
    "../witness",
    "a/b",
    "/",
    "",
    "../../etc/passwd",
];

/// The input as a supply of choices; zeroes when it has run out.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        let mut number = [0; 8];
        for byte in &mut number {
            *byte = self.byte();
        }
        u64::from_le_bytes(number)
    }

    /// True in one of 16 cases.
    fn rarely(&mut self) -> bool {
        self.byte() & 0xf == 0xf
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::from(self.byte()) % limit.max(1)
    }

    /// Mostly small, sometimes anything.
    fn size(&mut self) -> u64 {
        if self.rarely() {
            self.number()
        } else {
            u64::from(self.byte()) << (self.byte() & 0xf)
        }
    }

    fn name(&mut self) -> Vec<u8> {
        let most = if self.rarely() { NAMES.len() } else { 5 };
        name(NAMES[self.below(most)])
    }

    /// One that was given, or any.
    fn known(&mut self, given: &[u64]) -> u64 {
        if self.rarely() {
            return self.number();
        }
        given
            .get(self.below(given.len()))
            .copied()
            .unwrap_or(ROOT_ID)
    }
}

/// What the guest was given.
#[derive(Default)]
struct Given {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Given {
    fn body(&self, opcode: Opcode, choices: &mut Choices<'_>) -> Vec<u8> {
        let fh = choices.known(&self.handles);
        let other = choices.known(&self.nodes);
        let flags = u32::from(choices.byte()) | u32::from(choices.byte()) << 8;
        let file = choices.name();
        match opcode {
            Opcode::Lookup | Opcode::Unlink | Opcode::Rmdir => file,
            Opcode::Forget => bytes(&ForgetIn {
                nlookup: u64::from(choices.byte() & 3),
            }),
            Opcode::BatchForget => {
                let one = ForgetOne {
                    nodeid: other,
                    nlookup: 1,
                };
                [
                    bytes(&BatchForgetIn { count: 2, dummy: 0 }),
                    bytes(&one),
                    bytes(&one),
                ]
                .concat()
            }
            Opcode::Getattr => bytes(&GetattrIn::default()),
            Opcode::Setattr => bytes(&SetattrIn {
                valid: flags,
                fh,
                size: choices.size(),
                mode: choices.number() as u32,
                uid: u32::from(choices.byte()),
                gid: u32::from(choices.byte()),
                atime: choices.number(),
                atimensec: choices.number() as u32,
                ..SetattrIn::default()
            }),
            Opcode::Statx => bytes(&StatxIn {
                sx_mask: flags,
                ..StatxIn::default()
            }),
            Opcode::Symlink => [file, choices.name()].concat(),
            Opcode::Mknod => {
                let mode = choices.number() as u32;
                let request = MknodIn {
                    mode,
                    rdev: flags,
                    ..MknodIn::default()
                };
                [bytes(&request), file].concat()
            }
            Opcode::Mkdir => [
                bytes(&MkdirIn {
                    mode: flags,
                    umask: 0o22,
                }),
                file,
            ]
            .concat(),
            Opcode::Create | Opcode::Tmpfile => {
                let request = CreateIn {
                    flags,
                    mode: 0o644,
                    ..CreateIn::default()
                };
                [bytes(&request), file].concat()
            }
            Opcode::Rename => [bytes(&RenameIn { newdir: other }), file, choices.name()].concat(),
            Opcode::Rename2 => {
                let flags = flags & 7;
                let request = Rename2In {
                    newdir: other,
                    flags,
                    padding: 0,
                };
                [bytes(&request), file, choices.name()].concat()
            }
            Opcode::Link => [bytes(&LinkIn { oldnodeid: other }), file].concat(),
            Opcode::Open | Opcode::Opendir => bytes(&OpenIn {
                flags,
                open_flags: flags & 1,
            }),
            Opcode::Read | Opcode::Readdir | Opcode::Readdirplus => {
                let (offset, size) = (choices.size(), choices.size() as u32);
                bytes(&ReadIn {
                    fh,
                    offset,
                    size,
                    ..ReadIn::default()
                })
            }
            Opcode::Write => {
                let data = vec![choices.byte(); choices.below(200)];
                let request = WriteIn {
                    fh,
                    // A sparse file costs nothing; many of them written full would.
                    offset: choices.size(),
                    size: data.len() as u32,
                    write_flags: flags & 7,
                    flags,
                    ..WriteIn::default()
                };
                [bytes(&request), data].concat()
            }
            Opcode::Release | Opcode::Releasedir => bytes(&ReleaseIn {
                fh,
                ..Default::default()
            }),
            Opcode::Flush | Opcode::Fsync | Opcode::Fsyncdir => bytes(&FsyncIn {
                fh,
                fsync_flags: flags,
                padding: 0,
            }),
            // No space of the host's is reserved in earnest.
            Opcode::Fallocate => bytes(&FallocateIn {
                fh,
                offset: u64::from(choices.byte()),
                length: u64::from(choices.byte()),
                mode: flags & 0xff,
                padding: 0,
            }),
            Opcode::Lseek => {
                let offset = choices.size();
                bytes(&LseekIn {
                    fh,
                    offset,
                    whence: flags & 7,
                    padding: 0,
                })
            }
            Opcode::CopyFileRange => bytes(&CopyFileRangeIn {
                fh_in: fh,
                off_in: u64::from(choices.byte()),
                fh_out: choices.known(&self.handles),
                off_out: u64::from(choices.byte()),
                len: u64::from(choices.byte()),
                ..CopyFileRangeIn::default()
            }),
            Opcode::Getxattr | Opcode::Listxattr => {
                let request = GetxattrIn {
                    size: flags,
                    padding: 0,
                };
                [&bytes(&request)[..], b"user.a\0"].concat()
            }
            Opcode::Setxattr => {
                let request = SetxattrIn {
                    size: 3,
                    flags: flags & 3,
                    ..SetxattrIn::default()
                };
                [&bytes(&request)[..], b"user.a\0abc"].concat()
            }
            Opcode::Removexattr => b"user.a\0".to_vec(),
            Opcode::Init => bytes(&InitIn {
                major: 7,
                minor: 38,
                ..InitIn::default()
            }),
            Opcode::Readlink
            | Opcode::Statfs
            | Opcode::Syncfs
            | Opcode::Destroy
            | Opcode::Interrupt => Vec::new(),
        }
    }

    /// Notes what a reply gives.
    fn note(&mut self, opcode: Opcode, body: &[u8]) {
        let mut rest = body;
        let entry = matches!(
            opcode,
            Opcode::Lookup
                | Opcode::Mkdir
                | Opcode::Mknod
                | Opcode::Symlink
                | Opcode::Link
                | Opcode::Create
                | Opcode::Tmpfile
        );
        if entry && let Some(entry) = EntryOut::take(&mut rest) {
            self.nodes.push(entry.nodeid);
        }
        let open = matches!(
            opcode,
            Opcode::Open | Opcode::Opendir | Opcode::Create | Opcode::Tmpfile
        );
        if open && let Some(open) = OpenOut::take(&mut rest) {
            self.handles.push(open.fh);
        }
    }
}

/// One request; corrupted in rare cases, where that can't cost the host disk space.
fn request(given: &Given, unique: u64, choices: &mut Choices<'_>) -> Option<(Opcode, Vec<u8>)> {
    let number = u32::from(choices.byte()) % 54;
    let opcode = Opcode::from_number(number).unwrap_or(Opcode::Create);
    // The host's disks are not to be synchronized a thousand times a second.
    if matches!(opcode, Opcode::Syncfs | Opcode::Fsync | Opcode::Fsyncdir) {
        return None;
    }
    let body = given.body(opcode, choices);
    let header = InHeader {
        len: (InHeader::SIZE + body.len()) as u32,
        opcode: opcode as u32,
        unique,
        nodeid: choices.known(&given.nodes),
        uid: u32::from(choices.byte() & 1) * 1000,
        gid: u32::from(choices.byte() & 1) * 1000,
        ..InHeader::default()
    };
    let mut request = [bytes(&header), body].concat();
    if choices.rarely() && !matches!(opcode, Opcode::Fallocate | Opcode::CopyFileRange) {
        // The opcode stays, or it would become one of those.
        let at = choices.below(request.len());
        if !(4..8).contains(&at) {
            request[at] ^= choices.byte();
        }
    }
    Some((opcode, request))
}

/// Plays one guest.
///
/// # Panics
/// The server did something that it must not do.
pub fn fuzz_one(data: &[u8]) {
    let place = tempfile::tempdir().unwrap();
    let witness = place.path().join("witness");
    fs::write(&witness, "untouched").unwrap();
    let shared = place.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let mut choices = Choices(data);
    play(&shared, &mut choices);
    assert_eq!(fs::read(&witness).unwrap(), b"untouched");
    let beside = fs::read_dir(place.path()).unwrap().count();
    assert_eq!(beside, 2, "something appeared beside the shared directory");
}

fn play(shared: &Path, choices: &mut Choices<'_>) {
    let root = OwnedFd::from(File::open(shared).unwrap());
    let cache = [Cache::Never, Cache::Auto, Cache::Always];
    let options = Options {
        cache: cache[choices.below(3)],
        writeback: choices.byte() & 1 == 1,
        posix_acl: choices.byte() & 1 == 1,
        announce_submounts: choices.byte() & 1 == 1,
        read_only: choices.rarely(),
        cache_below: Vec::new(),
        max_open_files: 64,
    };
    let server = Server::new(&root, ProcSelfFd::open().unwrap(), options).unwrap();
    let mut worker = server.worker().unwrap();
    let mut given = Given {
        nodes: vec![ROOT_ID],
        ..Given::default()
    };
    let mut reply = vec![0; 256 * 1024];
    let init = InitIn {
        major: 7,
        minor: 38,
        flags: choices.number() as u32 & !(1 << 30),
        ..InitIn::default()
    };
    let header = InHeader {
        len: (InHeader::SIZE + InitIn::SIZE) as u32,
        opcode: Opcode::Init as u32,
        ..InHeader::default()
    };
    let first = [bytes(&header), bytes(&init)].concat();
    exchange(&server, &mut worker, &first, &mut reply);
    for unique in 1..MAX_REQUESTS {
        if choices.0.is_empty() {
            break;
        }
        let Some((opcode, request)) = request(&given, unique as u64, choices) else {
            continue;
        };
        let room = if choices.rarely() {
            choices.below(256)
        } else {
            reply.len()
        };
        let body = exchange(&server, &mut worker, &request, &mut reply[..room]);
        given.note(opcode, &body);
    }
}

/// One request and its reply, which must be whole; the body if it is no error.
fn exchange(server: &Server, worker: &mut Worker, request: &[u8], reply: &mut [u8]) -> Vec<u8> {
    let mut room = &mut *reply;
    let length = server.handle(worker, &request, &mut room);
    let mut whole = &reply[..length];
    if whole.is_empty() {
        return Vec::new();
    }
    let header = OutHeader::take(&mut whole).unwrap();
    assert_eq!(header.len as usize, length);
    assert!((-4095..=0).contains(&header.error));
    assert!(header.error == 0 || whole.is_empty());
    if header.error == 0 {
        whole.to_vec()
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next of a fixed sequence (xorshift64*).
    fn next(state: &mut u64) -> u64 {
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    #[test]
    fn random_guests_do_no_harm() {
        let rounds = std::env::var("FUSE_FUZZ_ROUNDS").map_or(60, |text| text.parse().unwrap());
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for _ in 0..rounds {
            let data: Vec<u8> = (0..1024)
                .flat_map(|_| next(&mut state).to_le_bytes())
                .collect();
            fuzz_one(&data);
        }
    }
}
