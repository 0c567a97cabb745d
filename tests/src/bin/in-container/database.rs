// SPDX-License-Identifier: Apache-2.0
//! Writes as PostgreSQL does: a commit is a page of the log and `fdatasync(2)`; now and then the pages that have
//! changed go into the tables, each of which is synced, and a file that says how far this is takes its old
//! one's place.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const PAGE: usize = 8192;
const PAGE_BYTES: u64 = 8192;
/// Pages of a log's segment, which has its size from the start.
const SEGMENT: u64 = 128;
const TABLES: u64 = 4;
/// Pages of a table.
const ROWS: u64 = 64;
/// Commits between two checkpoints.
const CHECKPOINT: u64 = 64;
const CONTROL: &str = "control";

/// Makes so many commits in a new folder.
pub(super) fn commit(folder: &Path, commits: u64) -> Result<()> {
    fs::create_dir(folder).with_context(|| folder.display().to_string())?;
    let tables: Vec<_> = (0..TABLES)
        .map(|table| create(&table_path(folder, table), ROWS))
        .collect::<Result<_>>()?;
    let mut log = None;
    let mut dirty = BTreeMap::new();
    for number in 0..commits {
        if number % SEGMENT == 0 {
            log = Some(create(&segment_path(folder, number), SEGMENT)?);
            sync(folder)?;
        }
        let log = log.as_ref().context("no segment")?;
        log.write_all_at(&page(number), place(number % SEGMENT))?;
        log.sync_data()?;
        dirty.insert(row(number), number);
        let made = number.saturating_add(1);
        if made % CHECKPOINT == 0 || made == commits {
            for ((table, row), number) in &dirty {
                let table = usize::try_from(*table).ok().and_then(|at| tables.get(at));
                let table = table.context("no table")?;
                table.write_all_at(&page(*number), place(*row))?;
            }
            dirty.clear();
            tables.iter().try_for_each(File::sync_all)?;
            let fresh = folder.join("control.new");
            fs::write(&fresh, made.to_string())?;
            File::open(&fresh)?.sync_all()?;
            fs::rename(&fresh, folder.join(CONTROL))?;
            sync(folder)?;
        }
    }
    Ok(())
}

/// Finds all commits where they belong.
pub(super) fn check(folder: &Path, commits: u64) -> Result<()> {
    let control = fs::read_to_string(folder.join(CONTROL))?;
    ensure!(
        control == commits.to_string(),
        "the checkpoint is at {control:?}"
    );
    let mut last = BTreeMap::new();
    for number in 0..commits {
        let segment = File::open(segment_path(folder, number))?;
        expect(&segment, number % SEGMENT, number).with_context(|| format!("log of {number}"))?;
        last.insert(row(number), number);
    }
    for ((table, row), number) in last {
        let file = File::open(table_path(folder, table))?;
        expect(&file, row, number).with_context(|| format!("table {table}, row {row}"))?;
    }
    Ok(())
}

fn create(path: &Path, pages: u64) -> Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path)?;
    file.set_len(place(pages))?;
    Ok(file)
}

fn sync(folder: &Path) -> Result<()> {
    Ok(File::open(folder)?.sync_all()?)
}

fn expect(file: &File, at: u64, number: u64) -> Result<()> {
    let mut found = vec![0; PAGE];
    file.read_exact_at(&mut found, place(at))?;
    ensure!(found == page(number), "it is another page");
    Ok(())
}

fn segment_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("log-{}", number / SEGMENT))
}

fn table_path(folder: &Path, table: u64) -> PathBuf {
    folder.join(format!("table-{table}"))
}

/// Where a page begins.
fn place(page: u64) -> u64 {
    page.saturating_mul(PAGE_BYTES)
}

/// The table and row that a commit changes: all over them.
fn row(number: u64) -> (u64, u64) {
    let scattered = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (scattered % TABLES, scattered / TABLES % ROWS)
}

/// What a commit writes.
fn page(number: u64) -> Vec<u8> {
    let words = (0..PAGE_BYTES / 8).map(|word| number.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ word);
    words.flat_map(u64::to_le_bytes).collect()
}
