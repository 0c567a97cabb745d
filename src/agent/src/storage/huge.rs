// SPDX-License-Identifier: Apache-2.0
//! Huge pages: a guest has none until they are asked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::error::{AgentError, Context as _, Kind, Result};

/// The pools, a folder a size (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// A pool's number is read and written: one at a time.
static CHANGING: Mutex<()> = Mutex::new(());

/// Pages that were set aside.
#[derive(Debug)]
pub(crate) struct HugePages {
    pool: PathBuf,
    count: u64,
}

impl HugePages {
    /// Sets aside what a hugetlbfs with these options, `pagesize` and `size`, can hold.
    ///
    /// # Errors
    ///
    /// No such options, a size of page that the processor lacks, or too little memory.
    pub(super) fn reserve(options: &[String]) -> Result<Self> {
        let wanted = |key: &str| {
            let value = options
                .iter()
                .find_map(|option| option.strip_prefix(key)?.strip_prefix('='));
            value.and_then(bytes).ok_or_else(|| {
                AgentError::invalid(format!("huge pages: option {key:?} is missing or no size"))
            })
        };
        Self::reserve_in(Path::new(POOLS), wanted("pagesize")?, wanted("size")?)
    }

    fn reserve_in(pools: &Path, page: u64, size: u64) -> Result<Self> {
        let kilobytes = page >> 10;
        let pool = pools.join(format!("hugepages-{kilobytes}kB"));
        if kilobytes == 0 || !pool.exists() {
            return Err(AgentError::unsupported(format!(
                "huge pages of {kilobytes} kB: the guest has none of that size"
            )));
        }
        let pages = Self {
            pool,
            count: size.div_ceil(page),
        };
        let _alone = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let before = pages.number()?;
        pages.set(before.saturating_add(pages.count))?;
        // The kernel takes what it finds, and says nothing.
        let got = pages.number()?.saturating_sub(before);
        if got < pages.count {
            pages.set(before)?;
            return Err(AgentError::new(
                Kind::FailedPrecondition,
                format!(
                    "huge pages of {kilobytes} kB: the guest has memory for {got} of {}",
                    pages.count
                ),
            ));
        }
        Ok(pages)
    }

    /// Gives them back.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn give_back(self) -> Result<()> {
        let _alone = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(self.number()?.saturating_sub(self.count))
    }

    fn file(&self) -> PathBuf {
        self.pool.join("nr_hugepages")
    }

    fn number(&self) -> Result<u64> {
        let file = self.file();
        let text = fs::read_to_string(&file).context(|| format!("read {file:?}"))?;
        let number = text.trim().parse();
        number.map_err(|_| AgentError::internal(format!("read {file:?}: {text:?}")))
    }

    fn set(&self, number: u64) -> Result<()> {
        let file = self.file();
        fs::write(&file, number.to_string()).context(|| format!("write {number} to {file:?}"))
    }
}

#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) {
    let _ = bytes(text);
}

/// A size as mount options have it: a number and perhaps K, M or G, with or without `i` or `B`.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let number: u64 = digits.parse().ok()?;
    let shift = match text.get(digits.len()..)? {
        "" => 0,
        "K" | "k" | "Ki" | "KB" => 10,
        "M" | "m" | "Mi" | "MB" => 20,
        "G" | "g" | "Gi" | "GB" => 30,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(bytes("4096"), Some(4096));
        assert_eq!(bytes("2M"), Some(2 << 20));
        assert_eq!(bytes("1Gi"), Some(1 << 30));
        for wrong in ["", "M", "2T", "-1", "1x2M"] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn pages_are_taken_and_given_back() {
        let pools = tempfile::tempdir().unwrap();
        let file = pools.path().join("hugepages-2048kB/nr_hugepages");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, "3\n").unwrap();
        let pages = HugePages::reserve_in(pools.path(), 2 << 20, (8 << 20) + 1).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "8");
        pages.give_back().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "3");
        let error = HugePages::reserve_in(pools.path(), 1 << 30, 1 << 30).unwrap_err();
        assert!(error.line().contains("1048576 kB"), "{}", error.line());
    }
}
