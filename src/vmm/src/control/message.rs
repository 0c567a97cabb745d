// SPDX-License-Identifier: Apache-2.0
//! The messages themselves: one enum for requests, one for events.

use serde::{Deserialize, Serialize};

/// Both sides are one binary; the number guards against a stale process after an upgrade.
pub const PROTOCOL_VERSION: u32 = 10;

/// Position of a file among the descriptors that came with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIndex(pub u32);

/// What the owner asks of the VMM. Each request is answered by exactly one event: `Event::Done`,
/// or `Event::Plugged` where that is said, or `Event::Failed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Builds the machine and starts it. The first request, once.
    Boot(Box<VmConfig>),
    /// Stops all vCPUs where they are.
    Pause,
    /// Lets paused vCPUs go on.
    Resume,
    /// Adds a network device to the running machine. Done means that the guest has been told, not
    /// that its driver is there yet: the owner sees that by what the guest says of its interfaces.
    AttachNet(Net),
    /// Takes a network device away, whether it came with `Boot` or with `AttachNet`. Done means
    /// that the guest's driver has let go of it and its taps are closed.
    DetachNet {
        /// Its `Net::id`.
        id: String,
    },
    /// Offers the guest memory, or wants some back, so that it has this much in all: between what
    /// it booted with and `VmConfig::most_memory_mib`. Done means that it has been told; what it
    /// then takes or gives, which may be less, `Event::Size` tells.
    ResizeMemory {
        /// In MiB.
        mib: u32,
    },
    /// Plugs or unplugs vCPUs, so that there are this many in all: between those that it booted
    /// with and `VmConfig::most_vcpus`. Done means that the guest has been told. A plugged one is
    /// there at once, for the guest to bring up; one to go counts until the guest has let go of
    /// it, which `Event::Size` tells.
    ResizeVcpus {
        /// How many.
        count: u8,
    },
    /// Adds a disk to the running machine. The answer is the slot that it is in; as with a network
    /// device, the guest's driver may not be there yet.
    AttachBlock(Block),
    /// Takes a disk away that came with `AttachBlock`. Done means that the guest's driver has let
    /// go of it and its file is closed. The guest loses it whether it is mounted or not: that
    /// nobody uses it any more is for the owner to see to.
    DetachBlock {
        /// Its `Block::id`.
        id: String,
    },
    /// The file of a disk has grown: the guest is to see all of it. Done means that it has been told.
    GrowBlock {
        /// Its `Block::id`.
        id: String,
    },
    /// Gives the machine another generation ID, as one has that was made of another's state. Done
    /// means that the guest has been told.
    RenewGeneration,
    /// Ends the VM at once. `Event::Exited` follows.
    Stop,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// `PROTOCOL_VERSION` of the sender.
    pub version: u32,
    /// An open `/dev/kvm`.
    pub kvm: FileIndex,
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u8,
    /// As many as it may have later; no fewer than it boots with.
    pub most_vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// As much as it may have later; no less than it boots with.
    pub most_memory_mib: u32,
    /// Kernel and its command line.
    pub boot: Boot,
    /// Block devices that stay, in order; the first is `/dev/vda`.
    pub blocks: Vec<Block>,
    /// Shared file systems.
    pub filesystems: Vec<Filesystem>,
    /// Network devices, in the order in which the guest finds them.
    pub nets: Vec<Net>,
    /// The socket device, if any.
    pub vsock: Option<Vsock>,
    /// Whether there is a virtio-rng.
    pub rng: bool,
    /// Whether there is a virtio-balloon, by which the guest gives back the memory that it frees.
    pub balloon: bool,
    /// What becomes of the serial port.
    pub console: Console,
}

/// How the machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// An uncompressed x86-64 ELF kernel with a PVH note.
    pub kernel: FileIndex,
    /// Kernel command line; the VMM adds nothing to it.
    pub cmdline: String,
}

/// A virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Name in logs, and the serial number that the guest sees (20 bytes at most).
    pub id: String,
    /// The backing file, raw. With O_DIRECT it goes past the host's page cache.
    pub file: FileIndex,
    /// Writes are refused by the device itself.
    pub read_only: bool,
    /// Its queues, 1 to `MAX_BLOCK_QUEUES`: a thread each. More than one is of use where several
    /// vCPUs keep a disk busy.
    pub queues: u16,
    /// Requests go on beside each other, where the host's kernel has io_uring; else in turn.
    pub io_uring: bool,
    /// The most that it does.
    pub limits: RateLimits,
}

/// The most that a device does in a second; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimits {
    /// Bytes.
    pub bytes: u64,
    /// Requests, whatever their size.
    pub operations: u64,
}

/// Most queues of a block device: as many as a function has doorbells for.
pub const MAX_BLOCK_QUEUES: u16 = 16;

/// A virtio-fs device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// Mount tag, 36 bytes at most.
    pub tag: String,
    /// An open directory: the root of what the guest sees.
    pub directory: FileIndex,
    /// Writes are refused by the server.
    pub read_only: bool,
    /// How long the guest may trust what it has seen.
    pub cache: FsCache,
    /// Folders, as paths from the directory, below which something else holds.
    pub cache_below: Vec<(String, FsCache)>,
}

/// How a guest caches a shared file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum FsCache {
    /// Not at all. For directories that both sides change and compare.
    Never,
    /// Names and attributes for a second, data until the file is seen changed.
    #[default]
    Auto,
    /// Until the guest forgets. Only for a tree that nobody but this guest changes.
    Always,
}

/// A virtio-net device on a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Name in logs and in `DetachNet`.
    pub id: String,
    /// The guest interface's hardware address.
    pub mac: [u8; 6],
    /// The largest packet that the link carries, if the guest is to be told.
    pub mtu: Option<u16>,
    /// An open `/dev/net/tun` for each queue pair, 1 to `MAX_QUEUE_PAIRS`, attached to one
    /// interface with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` where there are
    /// several. The VMM sets the tap's offloads and the size of its header itself.
    pub queues: Vec<FileIndex>,
    /// Empty: the VMM moves the packets. Else an open `/dev/vhost-net` for each queue pair.
    pub vhost: Vec<FileIndex>,
    /// The most that comes to the guest; its operations are packets. Not with vhost.
    pub receive: RateLimits,
    /// The most that the guest sends.
    pub transmit: RateLimits,
}

/// Most queue pairs of a network device.
pub const MAX_QUEUE_PAIRS: usize = 4;

/// The virtio-vsock device, hybrid: Unix sockets on the host's side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's context ID, 3 or more.
    pub cid: u32,
    /// A listening Unix stream socket; a client writes `CONNECT port\n` and reads `OK port\n`.
    pub listener: FileIndex,
}

/// The 16550 at port 0x3f8. The last lines that the guest wrote are kept in every case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Console {
    /// Kept for error messages only.
    Quiet,
    /// Also written to this file as it comes.
    File(FileIndex),
}

/// What the VMM tells its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The request was carried out.
    Done,
    /// The request was carried out, and the device is in this slot of PCI bus 0.
    Plugged {
        /// Its device number.
        slot: u8,
    },
    /// The request failed; the text is the whole chain of causes, naming the object.
    Failed(String),
    /// The machine came to this point.
    Milestone {
        /// Which point.
        milestone: Milestone,
        /// `CLOCK_MONOTONIC` in microseconds, taken where it happened.
        at_us: u64,
    },
    /// A guest process connected to a host port (CID 2). The packet holds the host's end of the
    /// stream; to refuse, close it.
    Connection {
        /// The port that the guest asked for.
        port: u32,
    },
    /// The machine's size has changed.
    Size(Size),
    /// The guest has ended. The last event: the devices write what they hold, then the process ends.
    Exited {
        /// Why.
        reason: ExitReason,
        /// The last that the guest wrote to its console (16 KiB at most), lossy UTF-8.
        console: String,
    },
}

/// Memory is plugged and unplugged by so many MiB, and more of them.
pub const MEMORY_STEP: u32 = 2;

/// What a machine has now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// vCPUs that the guest may run on.
    pub vcpus: u8,
    /// Memory that the guest may use, in MiB.
    pub memory_mib: u32,
}

/// Points of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Milestone {
    /// The VMM process began.
    ProcessStart,
    /// KVM made the VM, its memory and its vCPUs.
    VmCreated,
    /// The kernel is in memory.
    KernelLoaded,
    /// The first vCPU enters the guest.
    FirstInstruction,
    /// PID 1 of the guest wrote its code to the progress port.
    Init,
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// `Request::Stop`, or the owner closed the channel.
    Stopped,
    /// The guest powered off.
    Shutdown,
    /// The guest asked for a reboot; this VMM never reboots in place.
    Reboot,
    /// A fault that the guest's kernel could not handle.
    TripleFault,
    /// The guest's kernel panicked.
    Panic,
    /// KVM or the host failed; the text says how.
    Failure(String),
}
