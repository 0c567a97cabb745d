// SPDX-License-Identifier: Apache-2.0
//! Names of directory entries. Nothing that the guest sends becomes part of a host path before it
//! has passed here: a name is one component, so it can neither climb nor descend
//! (crosvm b/508645172: names with separators reached the host).

use std::ffi::CStr;

use rustix::io::Errno;

use crate::protocol::NAME_MAX;

/// Accepts one plain component: 1 to 255 bytes, without `/`, neither `.` nor `..`.
///
/// # Errors
/// `NAMETOOLONG` for a long one, `INVAL` for everything else that is no name.
pub(crate) fn validated(name: &CStr) -> Result<&CStr, Errno> {
    let bytes = name.to_bytes();
    if bytes.len() > NAME_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    if bytes.contains(&b'/') || matches!(bytes, b"" | b"." | b"..") {
        return Err(Errno::INVAL);
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    #[test]
    fn only_plain_components_pass() {
        for bad in [c"", c".", c"..", c"/", c"a/b", c"/etc", c"../etc", c"a/"] {
            assert_eq!(validated(bad), Err(Errno::INVAL), "{bad:?}");
        }
        for good in [c"a", c"...", c"..a", c".hidden", c"a b", c"\xff\xfe", c"\n"] {
            assert_eq!(validated(good), Ok(good));
        }
        let long = CString::new([b'x'; 256]).unwrap();
        assert_eq!(validated(&long), Err(Errno::NAMETOOLONG));
        let longest = CString::new([b'x'; 255]).unwrap();
        assert!(validated(&longest).is_ok());
    }
}
