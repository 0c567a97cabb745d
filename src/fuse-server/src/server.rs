// SPDX-License-Identifier: Apache-2.0
//! From a request to its operation, and from the outcome to a reply.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use rustix::fs::{FileType, Mode, OFlags, openat2};
use rustix::io::Errno;

use crate::arguments::Arguments;
use crate::buffer::{ReplyBuffer, RequestBuffer};
use crate::call::{Answer, Call};
use crate::complaints::Complaints;
use crate::error::ServerError;
use crate::handle::Handles;
use crate::inode::{Found, Inodes, Key};
use crate::operations::{RESOLVE, stat};
use crate::options::{Cache, Options};
use crate::proc::ProcSelfFd;
use crate::protocol::flags::init;
use crate::protocol::{
    AttrOut, EntryOut, InHeader, InitIn, InitOut, LseekOut, MAJOR, MIN_MINOR, Opcode, OpenOut,
    OutHeader, StatfsOut, StatxOut, Wire, WriteIn, WriteOut,
};
use crate::quota::Quota;
use crate::removals::Removals;
use crate::session::{Session, joined};
use crate::worker::{MAX_ARGUMENTS, Worker};

/// Serves one directory to one guest. Any number of workers may call it at a time.
#[derive(Debug)]
pub struct Server {
    pub(crate) options: Options,
    pub(crate) proc: ProcSelfFd,
    pub(crate) inodes: Inodes,
    /// Folders below which the guest caches otherwise.
    pub(crate) cache_below: Vec<(Key, Cache)>,
    pub(crate) handles: Handles,
    pub(crate) quota: Quota,
    pub(crate) removals: Removals,
    session: RwLock<Option<Session>>,
    complaints: Complaints,
}

/// What names the folder at `path` below `root`.
fn key_below(root: &OwnedFd, path: &Path) -> Result<Key, ServerError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), RESOLVE)
        .and_then(|folder| stat(&folder))
        .map(|stat| Key::new(&stat))
        .map_err(|source| ServerError::Folder {
            path: path.to_owned(),
            source,
        })
}

impl Server {
    /// Serves `root`, an open directory (`O_PATH` is enough).
    ///
    /// # Errors
    /// `root` is no directory, or `proc` is not this process's.
    pub fn new(root: &OwnedFd, proc: ProcSelfFd, options: Options) -> Result<Self, ServerError> {
        let path = proc.reopen(root.as_fd(), OFlags::PATH | OFlags::DIRECTORY);
        let path = path.map_err(|errno| match errno {
            Errno::NOTDIR => ServerError::NotADirectory,
            Errno::NOENT => ServerError::ForeignProc,
            other => ServerError::Root(other),
        })?;
        let given = stat(root).map_err(ServerError::Root)?;
        let stat = stat(&path).map_err(ServerError::Root)?;
        if Key::new(&given) != Key::new(&stat) {
            return Err(ServerError::ForeignProc);
        }
        if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::Directory {
            return Err(ServerError::NotADirectory);
        }
        let cache_below = options
            .cache_below
            .iter()
            .map(|(folder, cache)| Ok((key_below(&path, folder)?, *cache)))
            .collect::<Result<_, ServerError>>()?;
        let quota = Quota::new(options.max_open_files.max(1));
        let root = Found {
            path,
            stat,
            cache: options.cache,
            permit: quota.take().map_err(ServerError::Root)?,
        };
        Ok(Self {
            options,
            proc,
            inodes: Inodes::new(root),
            cache_below,
            handles: Handles::default(),
            quota,
            removals: Removals::default(),
            session: RwLock::default(),
            complaints: Complaints::default(),
        })
    }

    /// Makes the calling thread a worker of this server.
    ///
    /// # Errors
    /// The thread can't have a working directory and umask of its own.
    pub fn worker(&self) -> rustix::io::Result<Worker> {
        Worker::enter(&self.proc)
    }

    /// Serves one request. Returns the length of the reply that is now in `reply`: 0 for requests
    /// that have none, or whose reply has no room.
    pub fn handle(
        &self,
        worker: &mut Worker,
        request: &dyn RequestBuffer,
        reply: &mut dyn ReplyBuffer,
    ) -> usize {
        let mut bytes = [0; InHeader::SIZE];
        if request.copy_to(0, &mut bytes).is_err() {
            return 0;
        }
        let Some(header) = InHeader::take(&mut bytes.as_slice()) else {
            return 0;
        };
        let opcode = Opcode::from_number(header.opcode);
        let outcome = match opcode {
            Some(opcode) => self.removals.with_room(
                || opcode.takes_room(),
                || self.serve(opcode, header, worker, request, reply),
            ),
            None => Err(Errno::NOSYS),
        };
        if matches!(
            opcode,
            Some(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt)
        ) {
            return 0;
        }
        let (length, error) = match outcome {
            Ok(body) => (body.saturating_add(OutHeader::SIZE), 0),
            Err(errno) => {
                self.complain(errno, header.nodeid);
                (OutHeader::SIZE, errno.raw_os_error().saturating_neg())
            }
        };
        let Ok(wire_length) = u32::try_from(length) else {
            return 0;
        };
        let head = OutHeader {
            len: wire_length,
            error,
            unique: header.unique,
        };
        worker.scratch.clear();
        head.put(&mut worker.scratch);
        match reply.copy_from(0, &worker.scratch) {
            Ok(()) => length,
            Err(_) => 0,
        }
    }

    fn serve(
        &self,
        opcode: Opcode,
        header: InHeader,
        worker: &mut Worker,
        request: &dyn RequestBuffer,
        reply: &mut dyn ReplyBuffer,
    ) -> Answer {
        let session = *self.session.read().unwrap_or_else(PoisonError::into_inner);
        let session = match (session, opcode) {
            (_, Opcode::Init) => Session::negotiate(0, &self.options),
            (Some(session), _) => session,
            (None, _) => return Err(Errno::INVAL),
        };
        // An operation that has happened must not fail for want of room to say so.
        let needed = OutHeader::SIZE.saturating_add(least_body(opcode));
        if least_body(opcode) != 0 && reply.length() < needed {
            return Err(Errno::INVAL);
        }
        if self.options.read_only && opcode.modifies() {
            return Err(Errno::ROFS);
        }
        let length = usize::try_from(header.len).map_err(|_| Errno::INVAL)?;
        if length > request.length() {
            return Err(Errno::INVAL);
        }
        let mut length = length.checked_sub(InHeader::SIZE).ok_or(Errno::INVAL)?;
        if opcode == Opcode::Write {
            length = length.min(WriteIn::SIZE);
        }
        if length > MAX_ARGUMENTS {
            return Err(Errno::TOOBIG);
        }
        worker.arguments.resize(length, 0);
        request.copy_to(InHeader::SIZE, &mut worker.arguments)?;
        let extended = usize::from(header.total_extlen).saturating_mul(8);
        let (arguments, extensions) = match opcode {
            Opcode::Write => (worker.arguments.as_slice(), &[][..]),
            _ => {
                let plain = length.checked_sub(extended).ok_or(Errno::INVAL)?;
                worker
                    .arguments
                    .split_at_checked(plain)
                    .ok_or(Errno::INVAL)?
            }
        };
        let mut call = Call {
            header,
            arguments: Arguments::new(arguments),
            extensions,
            session,
            credentials: &worker.credentials,
            request,
            reply,
            scratch: &mut worker.scratch,
            host: &mut worker.host,
        };
        self.dispatch(opcode, &mut call)
    }

    fn dispatch(&self, opcode: Opcode, call: &mut Call<'_>) -> Answer {
        match opcode {
            Opcode::Init => self.init(call),
            Opcode::Destroy => {
                self.forget_session();
                Ok(0)
            }
            // Nothing here waits for long enough that an interrupt could help.
            Opcode::Interrupt => Ok(0),
            Opcode::Lookup => self.lookup(call),
            Opcode::Forget => self.forget(call),
            Opcode::BatchForget => self.batch_forget(call),
            Opcode::Getattr => self.getattr(call),
            Opcode::Setattr => self.setattr(call),
            Opcode::Statx => self.statx(call),
            Opcode::Statfs => self.statfs(call),
            Opcode::Readlink => self.readlink(call),
            Opcode::Symlink => self.symlink(call),
            Opcode::Mknod => self.mknod(call),
            Opcode::Mkdir => self.mkdir(call),
            Opcode::Create => self.create(call),
            Opcode::Tmpfile => self.tmpfile(call),
            Opcode::Unlink => self.unlink(call, false),
            Opcode::Rmdir => self.unlink(call, true),
            Opcode::Rename => self.rename(call),
            Opcode::Rename2 => self.rename2(call),
            Opcode::Link => self.link(call),
            Opcode::Open => self.open(call),
            Opcode::Read => self.read(call),
            Opcode::Write => self.write(call),
            Opcode::Flush => self.flush(call),
            Opcode::Fsync | Opcode::Fsyncdir => self.fsync(call),
            Opcode::Release | Opcode::Releasedir => self.release(call),
            Opcode::Fallocate => self.fallocate(call),
            Opcode::Lseek => self.lseek(call),
            Opcode::CopyFileRange => self.copy_file_range(call),
            Opcode::Opendir => self.opendir(call),
            Opcode::Readdir => self.readdir(call, false),
            Opcode::Readdirplus => self.readdir(call, true),
            Opcode::Syncfs => self.syncfs(call),
            Opcode::Getxattr => self.getxattr(call),
            Opcode::Setxattr => self.setxattr(call),
            Opcode::Listxattr => self.listxattr(call),
            Opcode::Removexattr => self.removexattr(call),
        }
    }

    /// Tells the operator where the host fails: the guest has the error as well, but can't help it.
    fn complain(&self, errno: Errno, node: u64) {
        if !matches!(errno, Errno::NOSPC | Errno::DQUOT | Errno::IO) || !self.complaints.are_due() {
            return;
        }
        let inode = self.inodes.get(node);
        let file = inode.and_then(|inode| self.proc.path(inode.as_fd()));
        // Its name is the guest's choice.
        let file = file.unwrap_or_default();
        tracing::warn!(?file, error = %std::io::Error::from(errno), "the host can't do what the guest asks of a shared file");
    }

    fn init(&self, call: &mut Call<'_>) -> Answer {
        let request: InitIn = call.arguments.take()?;
        if request.major > MAJOR {
            // The guest is newer: it asks again with the version that this reply names.
            return call.answer(&InitOut {
                major: MAJOR,
                ..InitOut::default()
            });
        }
        if request.major < MAJOR || request.minor < MIN_MINOR {
            return Err(Errno::PROTO);
        }
        let extended = u64::from(request.flags) & init::INIT_EXT != 0;
        let high: u32 = if extended { call.arguments.take()? } else { 0 };
        let session = Session::negotiate(joined(request.flags, high), &self.options);
        // A guest that starts over, say by kexec, knows nothing of what it held before.
        self.forget_session();
        *self.session.write().unwrap_or_else(PoisonError::into_inner) = Some(session);
        call.answer(&session.reply(&request))
    }

    /// Closes everything that the guest holds and waits for the next INIT. For a guest that said
    /// DESTROY, and for a device that was reset.
    pub fn forget_session(&self) {
        *self.session.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.handles.clear();
        self.inodes.clear();
    }
}

/// The least room for a body that a request must come with.
fn least_body(opcode: Opcode) -> usize {
    match opcode {
        Opcode::Init => InitOut::SIZE,
        Opcode::Lookup | Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link => {
            EntryOut::SIZE
        }
        Opcode::Create | Opcode::Tmpfile => EntryOut::SIZE.saturating_add(OpenOut::SIZE),
        Opcode::Getattr | Opcode::Setattr => AttrOut::SIZE,
        Opcode::Statx => StatxOut::SIZE,
        Opcode::Statfs => StatfsOut::SIZE,
        Opcode::Open | Opcode::Opendir => OpenOut::SIZE,
        Opcode::Write | Opcode::CopyFileRange => WriteOut::SIZE,
        Opcode::Lseek => LseekOut::SIZE,
        _ => 0,
    }
}
