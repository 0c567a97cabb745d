// SPDX-License-Identifier: Apache-2.0
//! An open directory's stream of entries.
//!
//! A guest's kernel drops the end of a reply that its reader has no room for, and asks again from there. The
//! host could seek back, but where positions are counted (tmpfs before Linux 6.6) entries that went meanwhile
//! shift the others, and a guest that removes what it lists would miss some. So what was read since the position
//! of the last request is kept, and the host's stream only ever goes on, as it does for a reader on the host.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{RawDir, RawDirEntry, SeekFrom, seek};
use rustix::io::Errno;

/// The most that all listings of a server keep, in bytes: a guest can open many directories.
const MOST_KEPT: usize = 16 * 1024 * 1024;

/// The least buffer for the host's entries: one with the longest name fits.
const MIN_HOST_BUFFER: usize = 1024;

/// An entry of a directory.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The position behind it.
    pub(crate) next: u64,
    pub(crate) ino: u64,
    /// The type as in `d_type`.
    pub(crate) kind: u32,
    name: CString,
}

impl Entry {
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    fn size(&self) -> usize {
        size_of::<Self>().saturating_add(self.name.count_bytes())
    }
}

impl From<&RawDirEntry<'_>> for Entry {
    fn from(entry: &RawDirEntry<'_>) -> Self {
        Self {
            next: entry.next_entry_cookie(),
            ino: entry.ino(),
            kind: entry.file_type().as_raw_mode() >> 12 & 0xf,
            name: entry.file_name().to_owned(),
        }
    }
}

/// Bytes that all listings keep.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept(Arc<AtomicUsize>);

/// The stream of one open directory.
#[derive(Debug)]
pub(crate) struct Listing {
    /// The position before the first entry, if it is known.
    start: Option<u64>,
    /// From there to where the host's stream stands.
    entries: VecDeque<Entry>,
    /// Bytes of them.
    size: usize,
    kept: Kept,
}

impl Listing {
    /// At the start of a directory that was just opened.
    pub(crate) fn new(kept: Kept) -> Self {
        Self {
            start: Some(0),
            entries: VecDeque::new(),
            size: 0,
            kept,
        }
    }

    /// Goes to a position; what lies before it is not kept any more.
    ///
    /// # Errors
    /// The host knows no such position.
    pub(crate) fn go_to(&mut self, directory: impl AsFd, position: u64) -> Result<(), Errno> {
        let fresh = self.entries.is_empty();
        // The start is where a reader goes to see what has changed.
        if self.start == Some(position) && (fresh || position != 0) {
            return Ok(());
        }
        let passed = self.entries.iter().position(|entry| entry.next == position);
        match passed.filter(|_| position != 0) {
            Some(last) => {
                self.entries.drain(..=last);
                self.count();
            }
            None => {
                self.forget();
                seek(directory, SeekFrom::Start(position))?;
            }
        }
        self.start = Some(position);
        Ok(())
    }

    /// The entry that is as many behind the position; none at the end. Reads from the host, with `buffer` and
    /// about `room` bytes at a time, what was not read yet.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn get(
        &mut self,
        directory: impl AsFd,
        index: usize,
        buffer: &mut Vec<u8>,
        room: usize,
    ) -> Result<Option<&Entry>, Errno> {
        if index >= self.entries.len() {
            buffer.clear();
            buffer.reserve(room.max(MIN_HOST_BUFFER));
            let mut read = RawDir::new(directory, buffer.spare_capacity_mut());
            while let Some(entry) = read.next() {
                self.entries.push_back(Entry::from(&entry?));
                if read.is_buffer_empty() {
                    break;
                }
            }
            self.count();
        }
        Ok(self.entries.get(index))
    }

    /// Ends a request: where all listings keep too much, this one keeps nothing.
    pub(crate) fn rest(&mut self) {
        if self.kept.0.load(Ordering::Relaxed) > MOST_KEPT {
            self.forget();
        }
    }

    /// Where the stream stands is not known from now on.
    fn forget(&mut self) {
        self.start = None;
        self.entries = VecDeque::new();
        self.count();
    }

    /// Sees to it that what is kept is what was counted.
    fn count(&mut self) {
        let before = self.size;
        let sizes = self.entries.iter().map(Entry::size);
        self.size = sizes.fold(0, usize::saturating_add);
        self.kept.0.fetch_add(self.size, Ordering::Relaxed);
        self.kept.0.fetch_sub(before, Ordering::Relaxed);
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.kept.0.fetch_sub(self.size, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;

    use super::*;

    struct Reader {
        file: File,
        listing: Listing,
    }

    impl Reader {
        fn new(path: &Path, kept: &Kept) -> Self {
            Self {
                file: File::open(path).unwrap(),
                listing: Listing::new(kept.clone()),
            }
        }

        /// Up to `count` names from a position on, and the positions behind each.
        fn read(&mut self, position: u64, count: usize) -> Vec<(String, u64)> {
            self.listing.go_to(&self.file, position).unwrap();
            let mut names = Vec::new();
            for index in 0..count {
                let entry = self.listing.get(&self.file, index, &mut Vec::new(), 0);
                let Some(entry) = entry.unwrap() else {
                    break;
                };
                names.push((entry.name().to_str().unwrap().to_owned(), entry.next));
            }
            self.listing.rest();
            names
        }
    }

    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for index in 0..100 {
            fs::write(directory.path().join(format!("file-{index}")), "").unwrap();
        }
        directory
    }

    #[test]
    fn what_was_read_can_be_asked_for_again_when_it_is_gone() {
        let directory = directory();
        let kept = Kept::default();
        let mut reader = Reader::new(directory.path(), &kept);
        let first = reader.read(0, 20);
        for (name, _) in &first {
            let _ = fs::remove_file(directory.path().join(name));
        }
        // As often as the guest likes, but not what it has taken.
        assert_eq!(reader.read(first[4].1, 15), first[5..]);
        assert_eq!(reader.read(first[9].1, 10), first[10..]);
        assert_eq!(reader.read(first[9].1, 3), first[10..13]);
        // From the start, what there is now.
        let left = reader.read(0, 200);
        let gone = first.iter().filter(|(name, _)| name.starts_with("file"));
        assert_eq!(left.len(), 102 - gone.count());
        assert!(kept.0.load(Ordering::Relaxed) > 0);
        drop(reader);
        assert_eq!(kept.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn all_is_listed_once_whoever_reads_how_much() {
        let directory = directory();
        for count in [1, 7, 50, 200] {
            let mut reader = Reader::new(directory.path(), &Kept::default());
            let (mut names, mut position) = (Vec::new(), 0);
            loop {
                let page = reader.read(position, count);
                let Some((_, next)) = page.last() else {
                    break;
                };
                position = *next;
                names.extend(page.into_iter().map(|(name, _)| name));
            }
            assert_eq!(names.len(), 102);
            names.sort();
            names.dedup();
            assert_eq!(names.len(), 102, "{count}");
        }
    }

    #[test]
    fn listings_that_keep_too_much_keep_nothing() {
        let directory = directory();
        let kept = Kept::default();
        kept.0.store(MOST_KEPT, Ordering::Relaxed);
        let mut reader = Reader::new(directory.path(), &kept);
        let first = reader.read(0, 20);
        assert_eq!(kept.0.load(Ordering::Relaxed), MOST_KEPT);
        assert_eq!(reader.read(first[4].1, 15), first[5..]);
    }
}
