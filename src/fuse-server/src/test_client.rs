// SPDX-License-Identifier: Apache-2.0
//! A guest's kernel for tests and fuzzing: makes requests by hand and takes replies apart.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that can't go on should stop"
)]

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use tempfile::TempDir;

use crate::protocol::{
    CreateIn, EntryOut, InHeader, InitIn, MINOR, Opcode, OpenIn, OpenOut, OutHeader, ReadIn, Wire,
    WriteIn,
};
use crate::{Options, ProcSelfFd, Server, Worker};

/// A request's outcome: the reply's body, or its error.
pub(crate) type Outcome = Result<Vec<u8>, Errno>;

/// A server over a new directory, and its guest.
pub(crate) struct Client {
    pub(crate) server: Server,
    pub(crate) worker: Worker,
    pub(crate) directory: TempDir,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Appended to each request, counted as its extensions.
    pub(crate) extensions: Vec<u8>,
    reply: Vec<u8>,
    unique: u64,
}

/// The bytes of a structure.
pub(crate) fn bytes(value: &impl Wire) -> Vec<u8> {
    let mut bytes = Vec::new();
    value.put(&mut bytes);
    bytes
}

/// A structure from the front of bytes.
pub(crate) fn take<T: Wire>(bytes: &[u8]) -> T {
    let mut bytes = bytes;
    T::take(&mut bytes).expect("the reply is too short")
}

/// A name with its NUL.
pub(crate) fn name(name: &str) -> Vec<u8> {
    CString::new(name).unwrap().into_bytes_with_nul()
}

impl Client {
    /// A guest that has not said INIT yet.
    pub(crate) fn silent(options: Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (folder, _) in &options.cache_below {
            fs::create_dir_all(directory.path().join(folder)).unwrap();
        }
        let root = OwnedFd::from(File::open(directory.path()).unwrap());
        let server = Server::new(&root, ProcSelfFd::open().unwrap(), options).unwrap();
        let worker = server.worker().unwrap();
        Self {
            server,
            worker,
            directory,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            extensions: Vec::new(),
            reply: vec![0; 0x11_0000],
            unique: 0,
        }
    }

    /// A guest with everything that Linux offers.
    pub(crate) fn new(options: Options) -> Self {
        let mut client = Self::silent(options);
        client.init().unwrap();
        client
    }

    pub(crate) fn init(&mut self) -> Outcome {
        self.init_with(u64::MAX)
    }

    /// INIT with these of all flags.
    pub(crate) fn init_with(&mut self, flags: u64) -> Outcome {
        let request = InitIn {
            major: 7,
            minor: MINOR,
            max_readahead: 0x2_0000,
            flags: flags as u32,
        };
        let mut body = bytes(&request);
        body.extend_from_slice(&((flags >> 32) as u32).to_le_bytes());
        body.extend_from_slice(&[0; 44]);
        self.call(Opcode::Init, 0, &body)
    }

    /// Sends bytes as they are; the reply, empty if there is none.
    pub(crate) fn send_raw(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        let room = room.min(self.reply.len());
        let mut reply = self.reply.get_mut(..room).unwrap_or_default();
        let length = self.server.handle(&mut self.worker, &request, &mut reply);
        self.reply.get(..length).unwrap_or_default().to_vec()
    }

    /// A request as it goes over the wire.
    pub(crate) fn request(&mut self, opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let header = InHeader {
            len: (InHeader::SIZE + body.len() + self.extensions.len()) as u32,
            opcode,
            unique: self.unique,
            nodeid,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            total_extlen: (self.extensions.len() / 8) as u16,
            padding: 0,
        };
        [&bytes(&header), body, &self.extensions].concat()
    }

    /// One request with `room` for its reply.
    pub(crate) fn call_with_room(
        &mut self,
        opcode: u32,
        nodeid: u64,
        body: &[u8],
        room: usize,
    ) -> Outcome {
        let request = self.request(opcode, nodeid, body);
        let reply = self.send_raw(&request, room);
        let mut rest = reply.as_slice();
        let header = OutHeader::take(&mut rest).expect("no reply");
        assert_eq!(header.len as usize, reply.len());
        assert_eq!(header.unique, self.unique);
        match header.error {
            0 => Ok(rest.to_vec()),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    pub(crate) fn call(&mut self, opcode: Opcode, nodeid: u64, body: &[u8]) -> Outcome {
        self.call_with_room(opcode as u32, nodeid, body, self.reply.len())
    }

    /// A request that has no reply.
    pub(crate) fn tell(&mut self, opcode: Opcode, nodeid: u64, body: &[u8]) {
        let request = self.request(opcode as u32, nodeid, body);
        assert!(self.send_raw(&request, 4096).is_empty());
    }

    pub(crate) fn lookup(&mut self, parent: u64, child: &str) -> Result<EntryOut, Errno> {
        let reply = self.call(Opcode::Lookup, parent, &name(child))?;
        Ok(take(&reply))
    }

    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let request = OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let reply = self.call(Opcode::Open, node, &bytes(&request))?;
        Ok(take::<OpenOut>(&reply).fh)
    }

    pub(crate) fn create(
        &mut self,
        parent: u64,
        child: &str,
        mode: u32,
        umask: u32,
        flags: i32,
    ) -> Result<(EntryOut, u64), Errno> {
        let request = CreateIn {
            flags: flags.cast_unsigned(),
            mode,
            umask,
            open_flags: 0,
        };
        let body = [bytes(&request), name(child)].concat();
        let reply = self.call(Opcode::Create, parent, &body)?;
        let (entry, open) = reply.split_at(EntryOut::SIZE);
        Ok((take(entry), take::<OpenOut>(open).fh))
    }

    pub(crate) fn read(&mut self, fh: u64, offset: u64, size: u32) -> Outcome {
        let request = ReadIn {
            fh,
            offset,
            size,
            ..ReadIn::default()
        };
        self.call(Opcode::Read, 0, &bytes(&request))
    }

    pub(crate) fn write(&mut self, fh: u64, offset: u64, data: &[u8], write_flags: u32) -> Outcome {
        let request = WriteIn {
            fh,
            offset,
            size: data.len() as u32,
            write_flags,
            ..WriteIn::default()
        };
        self.call(Opcode::Write, 0, &[&bytes(&request), data].concat())
    }
}
