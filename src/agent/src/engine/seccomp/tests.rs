// SPDX-License-Identifier: Apache-2.0
#![expect(clippy::arithmetic_side_effects, reason = "a program's own counter")]

use super::*;
use crate::error::Kind;

fn profile(default: &str, calls: &[(&str, &str)]) -> LinuxSeccomp {
    LinuxSeccomp {
        DefaultAction: default.to_owned(),
        Architectures: vec!["SCMP_ARCH_X86_64".to_owned(), "SCMP_ARCH_X86".to_owned()],
        Syscalls: calls
            .iter()
            .map(|(name, action)| LinuxSyscall {
                Names: vec![(*name).to_owned()],
                Action: (*action).to_owned(),
                ..LinuxSyscall::default()
            })
            .collect(),
        ..LinuxSeccomp::default()
    }
}

/// What a filter answers to a call, computed as the kernel would.
fn run(filter: &Filter, architecture: u32, number: u32) -> u32 {
    let mut at = 0;
    let mut a = 0;
    loop {
        let op = filter.program[at];
        at += 1;
        let mut branch = |taken: bool| at += usize::from(if taken { op.jt } else { op.jf });
        match op.code {
            0x20 => {
                a = match op.k {
                    0 => number,
                    4 => architecture,
                    _ => 0,
                }
            }
            0x15 => branch(a == op.k),
            0x25 => branch(a > op.k),
            0x35 => branch(a >= op.k),
            0x05 => at += op.k as usize,
            0x06 => return op.k,
            other => panic!("code {other:#x}"),
        }
    }
}

const NATIVE: u32 = 0xc000_003e;
const ALLOW: u32 = 0x7fff_0000;
const FORBIDDEN: u32 = SECCOMP_RET_ERRNO | 1;

#[test]
fn newer_calls_are_unknown_not_forbidden() {
    let calls = [
        ("read", "SCMP_ACT_ALLOW"),
        ("openat2", "SCMP_ACT_ALLOW"),
        ("a_call_of_the_future", "SCMP_ACT_ALLOW"),
    ];
    let filter = Profile::new(&profile("SCMP_ACT_ERRNO", &calls))
        .unwrap()
        .compile()
        .unwrap();
    assert_eq!(run(&filter, NATIVE, 0), ALLOW);
    assert_eq!(run(&filter, NATIVE, 437), ALLOW);
    assert_eq!(run(&filter, NATIVE, 1), FORBIDDEN);
    assert_eq!(run(&filter, NATIVE, 438), SECCOMP_RET_ERRNO | ENOSYS);
    // openat2 has the same number on i386, read has not.
    assert_eq!(run(&filter, 0x4000_0003, 3), ALLOW);
    assert_eq!(run(&filter, 0x4000_0003, 438), SECCOMP_RET_ERRNO | ENOSYS);
}

#[test]
fn a_profile_that_allows_by_default_stays_open() {
    let filter = Profile::new(&profile(
        "SCMP_ACT_ALLOW",
        &[("read", "SCMP_ACT_KILL_PROCESS")],
    ))
    .unwrap()
    .compile()
    .unwrap();
    assert_eq!(run(&filter, NATIVE, 9999), ALLOW);
    assert_eq!(run(&filter, NATIVE, 0), 0x8000_0000);
}

#[test]
fn what_is_not_supported_is_refused() {
    let error = Profile::new(&profile("SCMP_ACT_NOTIFY", &[])).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.line().contains("SCMP_ACT_NOTIFY"));
    Profile::new(&profile("SCMP_ACT_DANCE", &[])).unwrap_err();
    let mut flagged = profile("SCMP_ACT_ALLOW", &[]);
    flagged.Flags = vec!["SECCOMP_FILTER_FLAG_NEW_LISTENER".to_owned()];
    Profile::new(&flagged).unwrap_err();
}

#[test]
fn an_argument_named_twice_means_either() {
    let condition = |value| Condition {
        argument: 0,
        operator: Operator::Equal,
        value,
        expected: 0,
    };
    let rule = Rule {
        names: Vec::new(),
        action: Action::Allow,
        conditions: vec![condition(1), condition(2)],
    };
    assert_eq!(rule.alternatives().len(), 2);
}
