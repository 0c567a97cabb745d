// SPDX-License-Identifier: Apache-2.0
//! Structures to and from bytes, without a cast: every field is read by its own length.
//!
//! The protocol uses the guest's byte order, which on every machine that this project builds for
//! is little-endian.

/// A value with one fixed form on the wire.
pub trait Wire: Sized {
    /// Its length in bytes.
    const SIZE: usize;

    /// Takes the value off the front of `bytes`; `None` if they are too few.
    fn take(bytes: &mut &[u8]) -> Option<Self>;

    /// Appends the value to `out`.
    fn put(&self, out: &mut Vec<u8>);
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Wire for $type {
            const SIZE: usize = size_of::<$type>();

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                let (value, rest) = bytes.split_first_chunk()?;
                *bytes = rest;
                Some(Self::from_le_bytes(*value))
            }

            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

integers!(u16, u32, i32, u64, i64);

/// Declares structures whose wire form is their fields in order; the protocol's own layouts have
/// explicit padding, so nothing lies between two fields.
macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the fields are the protocol's own, by its names")]
        pub struct $name {
            $(pub $field: $type,)*
        }

        impl $crate::protocol::Wire for $name {
            const SIZE: usize = 0 $(+ <$type as $crate::protocol::Wire>::SIZE)*;

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                Some(Self { $($field: <$type as $crate::protocol::Wire>::take(bytes)?,)* })
            }

            fn put(&self, out: &mut Vec<u8>) {
                $($crate::protocol::Wire::put(&self.$field, out);)*
            }
        }
    )*};
}

pub(super) use wire;
