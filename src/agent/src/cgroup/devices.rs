// SPDX-License-Identifier: Apache-2.0
//! Which devices a container may use: the spec's rules as a BPF program on its cgroup.
//!
//! Everything that no rule names is forbidden. That keeps the guest's root disk away from
//! containers, whatever nodes they can make (CVE-2026-24834).

use std::os::fd::AsFd as _;

use protocols::agent::oci::{LinuxDevice, LinuxDeviceCgroup};

use super::Cgroup;
use crate::error::{AgentError, Context as _, Result};
use crate::sys::bpf::{Instruction, attach_device_filter, load_device_filter};

/// `BPF_DEVCG_ACC_*`.
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MAKE | READ | WRITE;

/// `BPF_DEVCG_DEV_*`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Rule {
    allow: bool,
    /// `None` for both kinds.
    kind: Option<i32>,
    /// `None` for all.
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Character devices that every container may use, whatever its rules say, by major and minor
/// number: null, zero, full, random, urandom, tty, console, ptmx, terminals, net/tun.
const DEFAULT: [(i32, Option<i32>); 10] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
    (10, Some(200)),
];

/// Restricts `cgroup` to `rules` (the last that matches decides), the default devices and
/// `nodes`, which are made in the container. The making of nodes gives no access and is allowed.
///
/// # Errors
///
/// A malformed rule, or the kernel's reason.
pub(super) fn restrict(
    cgroup: &Cgroup,
    rules: &[LinuxDeviceCgroup],
    nodes: &[LinuxDevice],
) -> Result<()> {
    let mut all = rules.iter().map(Rule::new).collect::<Result<Vec<_>>>()?;
    all.extend(nodes.iter().filter_map(Rule::of_node));
    all.push(Rule {
        allow: true,
        kind: None,
        major: None,
        minor: None,
        access: MAKE,
    });
    all.extend(DEFAULT.map(|(major, minor)| Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: ALL,
    }));
    let program = load_device_filter(&program(&all)).context(|| "load the device filter")?;
    attach_device_filter(cgroup.as_fd(), program.as_fd())
        .context(|| "attach the device filter to the container's cgroup")
}

#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(rules: &[LinuxDeviceCgroup], nodes: &[LinuxDevice]) {
    let Ok(mut all) = rules.iter().map(Rule::new).collect::<Result<Vec<_>>>() else {
        return;
    };
    all.extend(nodes.iter().filter_map(Rule::of_node));
    assert!(!program(&all).is_empty());
}

impl Rule {
    fn new(rule: &LinuxDeviceCgroup) -> Result<Self> {
        let wrong = |what: &str| {
            AgentError::invalid(format!("linux.resources.devices: {what} in {rule:?}"))
        };
        let mut access = 0;
        for letter in rule.Access.chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MAKE,
                _ => return Err(wrong("unknown access")),
            };
        }
        let kind = match rule.Type.as_str() {
            "" | "a" => None,
            "b" => Some(BLOCK),
            "c" => Some(CHARACTER),
            _ => return Err(wrong("unknown type")),
        };
        let number = |number: i64| match number {
            ..0 => Ok(None),
            _ => i32::try_from(number)
                .map(Some)
                .map_err(|_| wrong("number out of range")),
        };
        // No device has number 0:0; it is what "not given" becomes on the wire.
        let everything = kind.is_none() || (rule.Major, rule.Minor) == (0, 0);
        Ok(Self {
            allow: rule.Allow,
            kind,
            major: if everything {
                None
            } else {
                number(rule.Major)?
            },
            minor: if everything {
                None
            } else {
                number(rule.Minor)?
            },
            access: if access == 0 { ALL } else { access },
        })
    }

    fn of_node(node: &LinuxDevice) -> Option<Self> {
        let kind = match node.Type.as_str() {
            "b" => BLOCK,
            "c" | "u" => CHARACTER,
            _ => return None,
        };
        Some(Self {
            allow: true,
            kind: Some(kind),
            major: Some(i32::try_from(node.Major).ok()?),
            minor: Some(i32::try_from(node.Minor).ok()?),
            access: ALL,
        })
    }
}

/// Registers: r1 the request, r2 its kind, r3 its access, r4 and r5 its numbers, r6 scratch.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        load_word(2, 0),
        and(2, 0xffff),
        load_word(3, 0),
        shift_right(3, 16),
        load_word(4, 4),
        load_word(5, 8),
    ];
    for rule in rules.iter().rev() {
        program.extend(block(rule));
        // What follows could never run, and the kernel's verifier refuses such code.
        if rule.matches_everything() {
            return program;
        }
    }
    program.extend([answer(false), EXIT]);
    program
}

impl Rule {
    fn matches_everything(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

/// Returns the rule's answer when it matches, else goes on behind the block.
fn block(rule: &Rule) -> Vec<Instruction> {
    let mut block = Vec::new();
    for (register, wanted) in [(2, rule.kind), (4, rule.major), (5, rule.minor)] {
        if let Some(wanted) = wanted {
            block.push(skip_unless_equal(register, wanted));
        }
    }
    if rule.access != ALL {
        block.push(copy(6, 3));
        if rule.allow {
            // Every access that is asked must be in the rule.
            block.extend([and(6, !rule.access & ALL), skip_unless_equal(6, 0)]);
        } else {
            // One access that is forbidden is enough.
            block.extend([and(6, rule.access), skip_if_equal(6, 0)]);
        }
    }
    block.extend([answer(rule.allow), EXIT]);
    // A failed test skips what is left of the block.
    let length = block.len();
    for (index, instruction) in block.iter_mut().enumerate() {
        if matches!(instruction.code, JUMP_IF_EQUAL | JUMP_UNLESS_EQUAL) {
            let rest = length.saturating_sub(index).saturating_sub(1);
            instruction.offset = i16::try_from(rest).unwrap_or(i16::MAX);
        }
    }
    block
}

/// Operation codes: class, operation and operand kind in one byte.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const COPY: u8 = 0xbc;
const SET: u8 = 0xb7;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const EXIT: Instruction = instruction(0x95, 0, 0, 0);

const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

fn load_word(to: u8, offset: i16) -> Instruction {
    instruction(LOAD_WORD, to | (1 << 4), offset, 0)
}

fn and(register: u8, mask: i32) -> Instruction {
    instruction(AND, register, 0, mask)
}

fn shift_right(register: u8, bits: i32) -> Instruction {
    instruction(SHIFT_RIGHT, register, 0, bits)
}

fn copy(to: u8, from: u8) -> Instruction {
    instruction(COPY, to | (from << 4), 0, 0)
}

fn skip_unless_equal(register: u8, value: i32) -> Instruction {
    instruction(JUMP_UNLESS_EQUAL, register, 0, value)
}

fn skip_if_equal(register: u8, value: i32) -> Instruction {
    instruction(JUMP_IF_EQUAL, register, 0, value)
}

fn answer(allow: bool) -> Instruction {
    instruction(SET, 0, 0, i32::from(allow))
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "a program's own counter")]
mod tests {
    use super::*;

    /// What a program answers, computed as the kernel would.
    fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0_i32; 7];
        let mut at = 0;
        loop {
            let op = program[at];
            at += 1;
            let to = usize::from(op.registers & 0xf);
            let mut skip = |taken: bool| {
                if taken {
                    at += usize::try_from(op.offset).unwrap();
                }
            };
            match op.code {
                LOAD_WORD => {
                    registers[to] = match op.offset {
                        0 => kind | access << 16,
                        4 => major,
                        _ => minor,
                    }
                }
                AND => registers[to] &= op.immediate,
                SHIFT_RIGHT => registers[to] >>= op.immediate,
                COPY => registers[to] = registers[usize::from(op.registers >> 4)],
                SET => registers[to] = op.immediate,
                JUMP_IF_EQUAL => skip(registers[to] == op.immediate),
                JUMP_UNLESS_EQUAL => skip(registers[to] != op.immediate),
                0x95 => return registers[0] == 1,
                other => panic!("code {other:#x}"),
            }
        }
    }

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> Rule {
        Rule::new(&LinuxDeviceCgroup {
            Allow: allow,
            Type: kind.to_owned(),
            Major: major,
            Minor: minor,
            Access: access.to_owned(),
            ..LinuxDeviceCgroup::default()
        })
        .unwrap()
    }

    #[test]
    fn nothing_is_allowed_without_a_rule() {
        assert!(!run(&program(&[]), BLOCK, READ, 254, 0));
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let rules = [
            rule(true, "a", -1, -1, "rwm"),
            rule(false, "b", -1, -1, "rwm"),
            rule(true, "b", 8, 1, "r"),
        ];
        let program = program(&rules);
        assert!(run(&program, CHARACTER, WRITE, 1, 3));
        assert!(!run(&program, BLOCK, READ, 254, 0));
        assert!(run(&program, BLOCK, READ, 8, 1));
        assert!(!run(&program, BLOCK, READ | WRITE, 8, 1));
    }

    #[test]
    fn one_forbidden_access_is_enough() {
        let rules = [
            rule(true, "c", 10, -1, "rwm"),
            rule(false, "c", 10, 229, "w"),
        ];
        let program = program(&rules);
        assert!(run(&program, CHARACTER, READ, 10, 229));
        assert!(!run(&program, CHARACTER, READ | WRITE, 10, 229));
        assert!(run(&program, CHARACTER, READ | WRITE, 10, 200));
    }

    #[test]
    fn a_rule_without_numbers_means_all() {
        assert_eq!(rule(false, "", 0, 0, "rwm").major, None);
        assert_eq!(rule(true, "c", 0, 0, "m").minor, None);
        assert_eq!(rule(true, "c", 5, 0, "m").minor, Some(0));
    }
}
