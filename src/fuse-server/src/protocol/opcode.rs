// SPDX-License-Identifier: Apache-2.0
//! Operation codes.

macro_rules! opcodes {
    ($($name:ident = $number:literal,)*) => {
        /// What a request asks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the names are the protocol's own")]
        #[repr(u32)]
        pub enum Opcode {
            $($name = $number,)*
        }

        impl Opcode {
            /// The operation of a number that came from the guest; the numbers have holes, so
            /// only a match may turn one into the type.
            #[must_use]
            pub fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Create = 35,
    Interrupt = 36,
    Destroy = 38,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    Syncfs = 50,
    Tmpfile = 51,
    Statx = 52,
}

impl Opcode {
    /// Whether the operation changes the file system whatever its arguments say. `Open` is not
    /// among them: its flags decide.
    #[must_use]
    pub fn modifies(self) -> bool {
        matches!(
            self,
            Self::Setattr
                | Self::Symlink
                | Self::Mknod
                | Self::Mkdir
                | Self::Unlink
                | Self::Rmdir
                | Self::Rename
                | Self::Rename2
                | Self::Link
                | Self::Write
                | Self::Setxattr
                | Self::Removexattr
                | Self::Create
                | Self::Fallocate
                | Self::CopyFileRange
                | Self::Tmpfile
        )
    }

    /// Whether the operation takes room, at once, and does nothing at all if there is none.
    #[must_use]
    pub fn takes_room(self) -> bool {
        matches!(
            self,
            Self::Symlink
                | Self::Mknod
                | Self::Mkdir
                | Self::Link
                | Self::Setxattr
                | Self::Create
                | Self::Tmpfile
        )
    }
}
