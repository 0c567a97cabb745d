// SPDX-License-Identifier: Apache-2.0
//! What both sides of the machine agree on.

/// Gives back what it gets.
pub(crate) const ECHO: u32 = 7;
/// Reads to the end and answers with a `Digest`.
pub(crate) const SINK: u32 = 9;
/// Reads a length, 8 bytes in little endian, and sends that much of the pattern.
pub(crate) const SOURCE: u32 = 19;
/// Reads a line `PORT COUNT`, connects COUNT times to that port of the host at once, has a word
/// echoed on each, and answers with how many came back.
pub(crate) const DIAL: u32 = 20;
/// Writes until it fails, and then tells the host so on `PIPE_BROKE`.
pub(crate) const FLOOD: u32 = 21;
/// Nobody listens there.
pub(crate) const NOBODY: u32 = 4242;
/// The host's port for the end of `FLOOD`.
pub(crate) const PIPE_BROKE: u32 = 6000;
