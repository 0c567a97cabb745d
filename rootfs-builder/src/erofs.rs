// SPDX-License-Identifier: Apache-2.0
//! Writes an uncompressed EROFS image (Linux, `Documentation/filesystems/erofs.rst`).
//!
//! Block 0 holds the superblock at byte 1024; inodes follow it, each at a multiple of 32 bytes, and
//! an inode's number is its offset divided by 32. What fits beside its inode in one block (links,
//! directories) is stored there, so that looking a path up costs few reads; what doesn't gets blocks
//! of its own after the inodes.

#![expect(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "builds from our own tree, whose sizes `narrow16` and `narrow32` bound"
)]

use std::collections::BTreeMap;

use thiserror::Error;

use crate::crc32c::checksum;
use crate::tree::Node;

const BLOCK: usize = 4096;
const BLOCK_BITS: u8 = 12;
const SUPERBLOCK: usize = 1024;
const SUPERBLOCK_SIZE: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// `feature_compat`: the superblock carries a checksum.
const CHECKSUM_PRESENT: u32 = 1;
/// A compact inode's size; also the unit of inode numbers.
const INODE: usize = 32;
const DIRENT: usize = 12;
const LAYOUT_PLAIN: u16 = 0;
const LAYOUT_INLINE: u16 = 2;
const S_IFDIR: u16 = 0o040_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// Why a tree has no image.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ErofsError {
    /// The root isn't a directory.
    #[error("the root of an image must be a directory")]
    Root,
    /// A size, count or name passes what the compact format holds.
    #[error("{0} is too large for the image format")]
    TooLarge(&'static str),
}

/// One file, laid out: where its inode stands and what its data is.
struct Entry<'tree> {
    node: &'tree Node,
    parent: usize,
    /// Indices of a directory's entries, by name.
    children: BTreeMap<&'tree str, usize>,
    data_size: usize,
    offset: usize,
    /// First block of the data when it isn't inline.
    block: Option<usize>,
}

/// The image of `root`, a multiple of 4096 bytes long.
///
/// # Errors
/// The root is no directory, or something is too large for the format.
pub fn image(root: &Node) -> Result<Vec<u8>, ErofsError> {
    if !matches!(root, Node::Directory { .. }) {
        return Err(ErofsError::Root);
    }
    let mut entries = Vec::new();
    flatten(root, 0, &mut entries)?;
    let total = place(&mut entries)?;
    let mut image = vec![0; total];
    for index in 0..entries.len() {
        write_entry(&mut image, &entries, index)?;
    }
    write_superblock(&mut image, &entries)?;
    Ok(image)
}

/// Lists the tree depth first; returns the index of `node`.
fn flatten<'tree>(
    node: &'tree Node,
    parent: usize,
    list: &mut Vec<Entry<'tree>>,
) -> Result<usize, ErofsError> {
    let index = list.len();
    let data_size = match node {
        Node::Directory { entries, .. } => directory_size(entries)?,
        Node::File { content, .. } => content.len(),
        Node::Symlink { target } => target.len(),
    };
    list.push(Entry {
        node,
        parent,
        children: BTreeMap::new(),
        data_size,
        offset: 0,
        block: None,
    });
    if let Node::Directory { entries, .. } = node {
        for (name, child) in entries {
            let child = flatten(child, index, list)?;
            list[index].children.insert(name, child);
        }
    }
    Ok(index)
}

/// A directory's size: its entries and their names, which must share one block.
fn directory_size(entries: &BTreeMap<String, Node>) -> Result<usize, ErofsError> {
    let names: usize = entries.keys().map(String::len).sum::<usize>() + ".".len() + "..".len();
    let size = names + (entries.len() + 2) * DIRENT;
    if size > BLOCK || entries.keys().any(|name| name.len() > 255) {
        return Err(ErofsError::TooLarge("a directory"));
    }
    Ok(size)
}

/// Gives every entry its place; returns the image's size.
fn place(entries: &mut [Entry<'_>]) -> Result<usize, ErofsError> {
    let mut end = SUPERBLOCK + SUPERBLOCK_SIZE;
    for entry in entries.iter_mut() {
        let inline = INODE + entry.data_size <= BLOCK && !matches!(entry.node, Node::File { .. });
        let length = if inline {
            INODE + entry.data_size
        } else {
            INODE
        };
        // Neither an inode nor its inline data may cross a block's end.
        if end % BLOCK + length > BLOCK {
            end = end.next_multiple_of(BLOCK);
        }
        entry.offset = end;
        end = (end + length).next_multiple_of(INODE);
        if !inline {
            entry.block = Some(0);
        }
    }
    let mut block = end.div_ceil(BLOCK);
    for entry in entries.iter_mut().filter(|entry| entry.block.is_some()) {
        entry.block = Some(block);
        block += entry.data_size.div_ceil(BLOCK);
    }
    u32::try_from(block).map_err(|_| ErofsError::TooLarge("the image"))?;
    Ok(block * BLOCK)
}

fn write_entry(image: &mut [u8], entries: &[Entry<'_>], index: usize) -> Result<(), ErofsError> {
    let entry = &entries[index];
    let (mode, links, data) = match entry.node {
        Node::Directory { mode, .. } => {
            let subdirectories = entry
                .children
                .values()
                .filter(|child| matches!(entries[**child].node, Node::Directory { .. }))
                .count();
            (
                S_IFDIR | mode,
                subdirectories + 2,
                directory_data(entries, index)?,
            )
        }
        Node::File { mode, content } => (S_IFREG | mode, 1, content.clone()),
        Node::Symlink { target } => (S_IFLNK | 0o777, 1, target.clone().into_bytes()),
    };
    let layout = if entry.block.is_some() {
        LAYOUT_PLAIN
    } else {
        LAYOUT_INLINE
    };
    let block = entry.block.unwrap_or(0);
    let mut inode = Vec::with_capacity(INODE);
    inode.extend((layout << 1).to_le_bytes());
    inode.extend(0_u16.to_le_bytes()); // no extended attributes
    inode.extend(mode.to_le_bytes());
    inode.extend(narrow16(links, "a link count")?.to_le_bytes());
    inode.extend(narrow32(data.len(), "a file")?.to_le_bytes());
    inode.extend(0_u32.to_le_bytes());
    inode.extend(narrow32(block, "the image")?.to_le_bytes());
    inode.extend(narrow32(index + 1, "the number of files")?.to_le_bytes());
    inode.extend([0; 8]); // owner and group root, reserved
    put(image, entry.offset, &inode);
    match entry.block {
        Some(block) => put(image, block * BLOCK, &data),
        None => put(image, entry.offset + INODE, &data),
    }
    Ok(())
}

/// Entries in byte order of their names, `.` and `..` among them, then the names.
fn directory_data(entries: &[Entry<'_>], index: usize) -> Result<Vec<u8>, ErofsError> {
    let entry = &entries[index];
    let mut names = entry.children.clone();
    names.insert(".", index);
    names.insert("..", entry.parent);
    let mut name_offset = names.len() * DIRENT;
    let mut data = Vec::with_capacity(entry.data_size);
    for (name, target) in &names {
        let target = &entries[*target];
        let file_type: u8 = match target.node {
            Node::File { .. } => 1,
            Node::Directory { .. } => 2,
            Node::Symlink { .. } => 7,
        };
        data.extend(inode_number(target).to_le_bytes());
        data.extend(narrow16(name_offset, "a directory")?.to_le_bytes());
        data.extend([file_type, 0]);
        name_offset += name.len();
    }
    names.keys().for_each(|name| data.extend(name.as_bytes()));
    Ok(data)
}

fn inode_number(entry: &Entry<'_>) -> u64 {
    (entry.offset / INODE) as u64
}

fn write_superblock(image: &mut [u8], entries: &[Entry<'_>]) -> Result<(), ErofsError> {
    let blocks = narrow32(image.len() / BLOCK, "the image")?;
    let root = narrow16(entries[0].offset / INODE, "the root's number")?;
    let mut superblock = Vec::with_capacity(SUPERBLOCK_SIZE);
    superblock.extend(MAGIC.to_le_bytes());
    superblock.extend(0_u32.to_le_bytes()); // the checksum, below
    superblock.extend(CHECKSUM_PRESENT.to_le_bytes());
    superblock.extend([BLOCK_BITS, 0]);
    superblock.extend(root.to_le_bytes());
    superblock.extend((entries.len() as u64).to_le_bytes());
    superblock.extend([0; 12]); // build time
    superblock.extend(blocks.to_le_bytes());
    superblock.resize(SUPERBLOCK_SIZE, 0); // meta_blkaddr 0: inode numbers count from the start
    put(image, SUPERBLOCK, &superblock);
    let sum = checksum(&image[SUPERBLOCK..BLOCK]);
    put(image, SUPERBLOCK + 4, &sum.to_le_bytes());
    Ok(())
}

fn put(image: &mut [u8], offset: usize, bytes: &[u8]) {
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn narrow16(value: usize, what: &'static str) -> Result<u16, ErofsError> {
    u16::try_from(value).map_err(|_| ErofsError::TooLarge(what))
}

fn narrow32(value: usize, what: &'static str) -> Result<u32, ErofsError> {
    u32::try_from(value).map_err(|_| ErofsError::TooLarge(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::guest_image;

    #[test]
    fn the_same_agent_gives_the_same_bytes() {
        let agent: Vec<u8> = (0..20_000_u32).flat_map(u32::to_le_bytes).collect();
        let one = image(&guest_image(agent.clone()).unwrap()).unwrap();
        let other = image(&guest_image(agent).unwrap()).unwrap();
        assert_eq!(one, other);
        assert_eq!(one.len() % BLOCK, 0);
    }

    #[test]
    fn refuses_a_root_that_is_no_directory_and_a_directory_past_a_block() {
        let file = Node::File {
            mode: 0o644,
            content: vec![],
        };
        assert_eq!(image(&file), Err(ErofsError::Root));
        let mut root = Node::directory(0o755);
        for number in 0..400 {
            root.insert(&format!("/file-{number}"), file.clone())
                .unwrap();
        }
        assert_eq!(image(&root), Err(ErofsError::TooLarge("a directory")));
    }
}
