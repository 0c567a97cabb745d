// SPDX-License-Identifier: Apache-2.0
//! Templates in a snapshotter's mounts: words in double braces that stand for where mounts before
//! are. containerd 2.2 and later leave them to a runtime that says it can resolve them.

use protocols::containerd::mount::Mount;
use thiserror::Error;

use crate::error::{Context, Kind, Result, ShimError};

/// Options that are for who mounts in containerd's place, not for the kernel.
const FOR_CONTAINERD: &str = "X-containerd.";
const VERITY: &str = "X-containerd.dmverity=";

/// EROFS's option for a file or disk that holds content of a layer's files, a blob.
pub(crate) const BLOB: &str = "device=";

/// What is to be done before a mount is its last word: `format/mkdir/overlay` is an overlay.
const STEPS: [&str; 3] = ["format", "mkdir", "mkfs"];

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece<'text> {
    Text(&'text str),
    /// The places of these mounts, with colons between them.
    Mounts(Vec<usize>),
}

/// Why a template stands for nothing.
#[derive(Debug, Error, PartialEq, Eq)]
enum TemplateError {
    #[error("a template without an end")]
    Open,
    #[error("{0:?} is none of the templates `mount N` and `overlay N N`")]
    Unknown(String),
    #[error("mount {0} is not one of the {1} before it")]
    Later(usize, usize),
}

/// The kind of file system of a mount, without what is to be done before.
pub(crate) fn kind(mount: &Mount) -> &str {
    let mut kind = mount.type_.as_str();
    while let Some((step, rest)) = kind.split_once('/')
        && STEPS.contains(&step)
    {
        kind = rest;
    }
    kind
}

/// Whether something is to be done before this mount.
pub(crate) fn has_steps(mount: &Mount) -> bool {
    kind(mount) != mount.type_
}

/// The options of the mount number `at` that are its file system's. That it is in a file is for who
/// mounts it.
pub(crate) fn options(mount: &Mount, at: usize) -> Result<impl Iterator<Item = &String>> {
    let mut theirs = mount.options.iter();
    if let Some(option) = theirs.find(|option| option.starts_with(FOR_CONTAINERD)) {
        let what = match option.starts_with(VERITY) {
            true => {
                "dm-verity is not supported: dmverity_mode = \"off\" of containerd's EROFS \
                 snapshotter goes without"
            }
            false => "this option is not supported",
        };
        let what = format!("{}: {option:?}: {what}", mount.source);
        return Err(unsupported(at, &what));
    }
    let own = |option: &&String| !option.is_empty() && *option != "loop";
    Ok(mount.options.iter().filter(own))
}

/// Takes a text of the mount number `at` apart.
pub(crate) fn pieces(text: &str, at: usize) -> Result<Vec<Piece<'_>>> {
    parse(text, at).context(Kind::InvalidArgument, || line(at, &format!("{text:?}")))
}

/// What is wrong with the mount number `at`.
pub(crate) fn wrong(at: usize, what: &str) -> ShimError {
    ShimError::new(Kind::InvalidArgument, line(at, what))
}

/// What of the mount number `at` is not taken here.
pub(crate) fn unsupported(at: usize, what: &str) -> ShimError {
    ShimError::new(Kind::Unimplemented, line(at, what))
}

fn line(at: usize, what: &str) -> String {
    format!("rootfs: mount {at}: {what}")
}

fn parse(text: &str, before: usize) -> Result<Vec<Piece<'_>>, TemplateError> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((plain, template)) = rest.split_once("{{") {
        let (words, after) = template.split_once("}}").ok_or(TemplateError::Open)?;
        if !plain.is_empty() {
            pieces.push(Piece::Text(plain));
        }
        let mounts =
            mounts(words).ok_or_else(|| TemplateError::Unknown(words.trim().to_owned()))?;
        if let Some(later) = mounts.iter().find(|mount| **mount >= before) {
            return Err(TemplateError::Later(*later, before));
        }
        pieces.push(Piece::Mounts(mounts));
        rest = after;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    Ok(pieces)
}

/// The mounts that a template stands for, in its order: `overlay 3 1` counts down.
fn mounts(words: &str) -> Option<Vec<usize>> {
    // No request has more, and a range is not to cost more than its text.
    let number = |word: &str| word.parse::<u8>().ok().map(usize::from);
    match *words.split_whitespace().collect::<Vec<_>>() {
        ["mount", only] => Some(vec![number(only)?]),
        ["overlay", first, last] => {
            let (first, last) = (number(first)?, number(last)?);
            Some(if first > last {
                (last..=first).rev().collect()
            } else {
                (first..=last).collect()
            })
        }
        _ => None,
    }
}

/// A mount as containerd describes it.
#[cfg(test)]
pub(crate) fn mount(kind: &str, source: impl AsRef<std::path::Path>, options: &[&str]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: source.as_ref().display().to_string(),
        options: options.iter().map(|&word| word.to_owned()).collect(),
        ..Mount::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mounts: &[usize]) -> Piece<'static> {
        Piece::Mounts(mounts.to_vec())
    }

    #[test]
    fn templates_stand_for_mounts_before() {
        for (text, expected) in [
            ("overlay", vec![Piece::Text("overlay")]),
            ("", vec![]),
            (
                "{{ mount 0 }}/upper",
                vec![all(&[0]), Piece::Text("/upper")],
            ),
            (
                "lowerdir={{overlay 1 3}}",
                vec![Piece::Text("lowerdir="), all(&[1, 2, 3])],
            ),
            ("{{ overlay 3 1 }}", vec![all(&[3, 2, 1])]),
            ("{{ overlay 2 2 }}", vec![all(&[2])]),
            (
                "{{ mount 1 }}:{{ mount 0 }}",
                vec![all(&[1]), Piece::Text(":"), all(&[0])],
            ),
        ] {
            assert_eq!(parse(text, 4).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_stands_for_nothing_is_told() {
        for (text, line) in [
            ("a{{ mount 0", "a template without an end"),
            ("{{ mount 4 }}", "mount 4 is not one of the 4 before it"),
            ("{{ overlay 1 9 }}", "mount 4 is not one of the 4 before it"),
            (
                "{{ overlay 255 0 }}",
                "mount 255 is not one of the 4 before it",
            ),
            ("{{ mount -1 }}", "\"mount -1\" is none of"),
            ("{{ mount 256 }}", "\"mount 256\" is none of"),
            ("{{ source 0 }}", "\"source 0\" is none of"),
            ("{{}}", "\"\" is none of"),
        ] {
            let error = parse(text, 4).unwrap_err().to_string();
            assert!(error.starts_with(line), "{text}: {error}");
        }
        let error = pieces("{{ mount 1 }}", 1).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        let line = "rootfs: mount 1: \"{{ mount 1 }}\": mount 1 is not one of the 1 before it";
        assert_eq!(error.chain(), line);
    }

    #[test]
    fn steps_before_a_mount_are_no_part_of_its_kind() {
        for (text, expected) in [
            ("format/mkdir/overlay", "overlay"),
            ("format/bind", "bind"),
            ("mkfs/ext4", "ext4"),
            ("erofs", "erofs"),
            ("fuse/format/x", "fuse/format/x"),
        ] {
            let mount = Mount {
                type_: text.to_owned(),
                ..Mount::default()
            };
            assert_eq!(kind(&mount), expected);
            assert_eq!(has_steps(&mount), text != expected);
        }
    }
}
