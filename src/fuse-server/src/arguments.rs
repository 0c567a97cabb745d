// SPDX-License-Identifier: Apache-2.0
//! A request's arguments, taken off its bytes from front to back.

use std::ffi::CStr;

use rustix::io::Errno;

use crate::name;
use crate::protocol::flags::EXT_GROUPS;
use crate::protocol::{ExtHeader, Wire};

/// Supplementary groups taken over from one request; Linux sends at most one.
const MAX_GROUPS: usize = 32;

/// What is left of the arguments.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arguments<'a> {
    bytes: &'a [u8],
}

impl<'a> Arguments<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Takes a structure.
    ///
    /// # Errors
    /// `INVAL` if too few bytes are left.
    pub(crate) fn take<T: Wire>(&mut self) -> Result<T, Errno> {
        T::take(&mut self.bytes).ok_or(Errno::INVAL)
    }

    /// Takes a string that ends in NUL.
    ///
    /// # Errors
    /// `INVAL` if there is no NUL.
    pub(crate) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.bytes).map_err(|_| Errno::INVAL)?;
        self.bytes = self
            .bytes
            .get(string.count_bytes().saturating_add(1)..)
            .ok_or(Errno::INVAL)?;
        Ok(string)
    }

    /// Takes the name of a directory entry.
    ///
    /// # Errors
    /// `INVAL` or `NAMETOOLONG` if it isn't one.
    pub(crate) fn name(&mut self) -> Result<&'a CStr, Errno> {
        name::validated(self.string()?)
    }

    /// Takes `length` bytes.
    ///
    /// # Errors
    /// `INVAL` if fewer are left.
    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(Errno::INVAL)?;
        self.bytes = rest;
        Ok(taken)
    }
}

/// The supplementary groups among a request's extensions.
///
/// # Errors
/// `INVAL` if the extensions don't add up.
pub(crate) fn supplementary_groups(extensions: &[u8]) -> Result<Vec<u32>, Errno> {
    let mut rest = Arguments::new(extensions);
    let mut groups = Vec::new();
    while !rest.bytes.is_empty() {
        let header: ExtHeader = rest.take()?;
        let size = usize::try_from(header.size).map_err(|_| Errno::INVAL)?;
        let length = size.checked_sub(ExtHeader::SIZE).ok_or(Errno::INVAL)?;
        let mut body = Arguments::new(rest.bytes(length)?);
        if header.kind != EXT_GROUPS {
            continue;
        }
        let count: u32 = body.take()?;
        for _ in 0..count {
            if groups.len() == MAX_GROUPS {
                return Err(Errno::INVAL);
            }
            groups.push(body.take()?);
        }
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_end_at_their_nul() {
        let mut arguments = Arguments::new(b"one\0two\0rest");
        assert_eq!(arguments.name(), Ok(c"one"));
        assert_eq!(arguments.name(), Ok(c"two"));
        assert_eq!(arguments.name(), Err(Errno::INVAL));
        assert_eq!(arguments.bytes(5), Err(Errno::INVAL));
        assert_eq!(arguments.bytes(4), Ok(&b"rest"[..]));
    }

    #[test]
    fn groups_come_from_their_extension_only() {
        let mut bytes = Vec::new();
        for word in [16_u32, 0, 1, 2, 16, EXT_GROUPS, 1, 50] {
            word.put(&mut bytes);
        }
        assert_eq!(supplementary_groups(&bytes), Ok(vec![50]));
        assert_eq!(supplementary_groups(&[]), Ok(vec![]));
    }

    #[test]
    fn extensions_that_lie_about_their_size_are_refused() {
        for words in [
            [7_u32, EXT_GROUPS, 0, 0],
            [0, 0, 0, 0],
            [64, 32, 1, 5],
            [16, 32, 2, 5],
        ] {
            let mut bytes = Vec::new();
            for word in words {
                word.put(&mut bytes);
            }
            assert_eq!(supplementary_groups(&bytes), Err(Errno::INVAL), "{words:?}");
        }
    }
}
