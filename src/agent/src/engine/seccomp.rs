// SPDX-License-Identifier: Apache-2.0
//! Seccomp profiles of the OCI spec, compiled by libseccomp and installed by ourselves.
//!
//! libseccomp may be older than the kernel or the profile. Names that it does not know are left
//! out of the filter, and calls with numbers above all that the profile names fail with ENOSYS:
//! a C library then takes its older way, where EPERM would be final.

use std::os::fd::OwnedFd;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use protocols::agent::oci::linux_syscall::ErrnoRet;
use protocols::agent::oci::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use serde::{Deserialize, Serialize};

use crate::error::{AgentError, Context as _, Result};
use crate::sys::process::{FilterInstruction, install_filter};

/// A checked profile.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Profile {
    default: Action,
    architectures: Vec<String>,
    flags: u32,
    rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
enum Action {
    Allow,
    Log,
    Errno(u16),
    Trap,
    Trace(u16),
    KillThread,
    KillProcess,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Rule {
    names: Vec<String>,
    action: Action,
    conditions: Vec<Condition>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Condition {
    argument: u32,
    operator: Operator,
    value: u64,
    /// The second operand of a masked comparison.
    expected: u64,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
enum Operator {
    NotEqual,
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
    MaskedEqual,
}

impl Profile {
    /// # Errors
    ///
    /// Actions, flags, architectures and operators that are unknown or not supported.
    pub(crate) fn new(profile: &LinuxSeccomp) -> Result<Self> {
        let mut flags = 0;
        for flag in &profile.Flags {
            flags |= match flag.as_str() {
                "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                // The filter is installed in a process with one thread.
                "SECCOMP_FILTER_FLAG_TSYNC" => 0,
                other => {
                    return Err(AgentError::unsupported(format!(
                        "linux.seccomp.flags: {other:?} is not supported"
                    )));
                }
            };
        }
        for name in &profile.Architectures {
            architecture(name)?;
        }
        Ok(Self {
            default: Action::new(&profile.DefaultAction, None)?,
            architectures: profile.Architectures.clone(),
            flags: u32::try_from(flags).unwrap_or_default(),
            rules: profile
                .Syscalls
                .iter()
                .map(Rule::new)
                .collect::<Result<_>>()?,
        })
    }

    /// Compiles the profile.
    ///
    /// # Errors
    ///
    /// libseccomp's.
    pub(crate) fn compile(&self) -> Result<Filter> {
        let context = self.context()?;
        let memory = memfd_create("seccomp", MemfdFlags::CLOEXEC).context(|| "memfd")?;
        context
            .export_bpf(&memory)
            .map_err(|error| AgentError::internal(format!("seccomp: {error}")))?;
        let mut program = self.unknown_calls()?;
        program.extend(read_program(&memory)?);
        Ok(Filter {
            program,
            flags: self.flags,
        })
    }

    fn context(&self) -> Result<ScmpFilterContext> {
        let wrong = |error| AgentError::internal(format!("seccomp: {error}"));
        let mut context = ScmpFilterContext::new(self.default.into()).map_err(wrong)?;
        for name in &self.architectures {
            context.add_arch(architecture(name)?).map_err(wrong)?;
        }
        for rule in &self.rules {
            // libseccomp refuses rules that change nothing.
            if rule.action == self.default {
                continue;
            }
            for name in &rule.names {
                let Ok(call) = ScmpSyscall::from_name(name) else {
                    continue;
                };
                for conditions in rule.alternatives() {
                    context
                        .add_rule_conditional(rule.action.into(), call, &conditions)
                        .map_err(|error| {
                            AgentError::invalid(format!(
                                "linux.seccomp: rule for {name:?}: {error}"
                            ))
                        })?;
                }
            }
        }
        Ok(context)
    }

    /// Instructions that answer ENOSYS to calls newer than all that the profile names.
    fn unknown_calls(&self) -> Result<Vec<FilterInstruction>> {
        if !matches!(self.default, Action::Errno(_)) {
            return Ok(Vec::new());
        }
        let mut known = vec![ScmpArch::native()];
        for name in &self.architectures {
            let architecture = architecture(name)?;
            if !known.contains(&architecture) {
                known.push(architecture);
            }
        }
        let mut program = vec![load(OFFSET_ARCHITECTURE)];
        for architecture in known {
            let Some(token) = audit_token(architecture) else {
                continue;
            };
            let highest = self
                .rules
                .iter()
                .flat_map(|rule| &rule.names)
                .filter_map(|name| ScmpSyscall::from_name_by_arch(name, architecture).ok())
                .filter_map(|call| u32::try_from(call.as_raw_syscall()).ok())
                .max();
            let Some(highest) = highest else { continue };
            program.extend([
                jump(BPF_JEQ, token, 0, 5),
                load(OFFSET_NUMBER),
                // Calls of the x32 kind have this bit set: the profile alone decides on them.
                jump(BPF_JGE, X32, 2, 0),
                jump(BPF_JGT, highest, 0, 1),
                ret(SECCOMP_RET_ERRNO | ENOSYS),
                load(OFFSET_ARCHITECTURE),
            ]);
        }
        Ok(program)
    }
}

/// A compiled profile.
#[derive(Debug)]
pub(crate) struct Filter {
    program: Vec<FilterInstruction>,
    flags: u32,
}

impl Filter {
    /// Puts this process and what it executes under the filter.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn install(&self) -> Result<()> {
        install_filter(&self.program, self.flags).context(|| "install the seccomp filter")
    }
}

impl Rule {
    fn new(call: &LinuxSyscall) -> Result<Self> {
        let errno = match call.ErrnoRet {
            Some(ErrnoRet::Errnoret(code)) => Some(code),
            _ => None,
        };
        let action = Action::new(&call.Action, errno)?;
        if errno.is_some() && !matches!(action, Action::Errno(_) | Action::Trace(_)) {
            return Err(AgentError::invalid(format!(
                "linux.seccomp: errnoRet has no meaning with {}",
                call.Action
            )));
        }
        Ok(Self {
            names: call.Names.clone(),
            action,
            conditions: call
                .Args
                .iter()
                .map(Condition::new)
                .collect::<Result<_>>()?,
        })
    }

    /// Conditions of one rule must all hold. A rule that names an argument twice means "either",
    /// which takes a rule for each condition.
    fn alternatives(&self) -> Vec<Vec<ScmpArgCompare>> {
        let twice = self.conditions.iter().enumerate().any(|(index, one)| {
            self.conditions
                .iter()
                .skip(index.saturating_add(1))
                .any(|other| other.argument == one.argument)
        });
        let compare = |condition: &Condition| condition.compare();
        if twice {
            self.conditions
                .iter()
                .map(|condition| vec![compare(condition)])
                .collect()
        } else {
            vec![self.conditions.iter().map(compare).collect()]
        }
    }
}

impl Condition {
    fn new(argument: &LinuxSeccompArg) -> Result<Self> {
        let operator = match argument.Op.as_str() {
            "SCMP_CMP_NE" => Operator::NotEqual,
            "SCMP_CMP_LT" => Operator::Less,
            "SCMP_CMP_LE" => Operator::LessOrEqual,
            "SCMP_CMP_EQ" => Operator::Equal,
            "SCMP_CMP_GE" => Operator::GreaterOrEqual,
            "SCMP_CMP_GT" => Operator::Greater,
            "SCMP_CMP_MASKED_EQ" => Operator::MaskedEqual,
            other => {
                return Err(AgentError::invalid(format!(
                    "linux.seccomp: operator {other:?} is unknown"
                )));
            }
        };
        let index = u32::try_from(argument.Index)
            .ok()
            .filter(|index| *index < 6)
            .ok_or_else(|| {
                AgentError::invalid(format!("linux.seccomp: no argument {}", argument.Index))
            })?;
        Ok(Self {
            argument: index,
            operator,
            value: argument.Value,
            expected: argument.ValueTwo,
        })
    }

    fn compare(&self) -> ScmpArgCompare {
        let (operator, datum) = match self.operator {
            Operator::NotEqual => (ScmpCompareOp::NotEqual, self.value),
            Operator::Less => (ScmpCompareOp::Less, self.value),
            Operator::LessOrEqual => (ScmpCompareOp::LessOrEqual, self.value),
            Operator::Equal => (ScmpCompareOp::Equal, self.value),
            Operator::GreaterOrEqual => (ScmpCompareOp::GreaterEqual, self.value),
            Operator::Greater => (ScmpCompareOp::Greater, self.value),
            Operator::MaskedEqual => (ScmpCompareOp::MaskedEqual(self.value), self.expected),
        };
        ScmpArgCompare::new(self.argument, operator, datum)
    }
}

impl Action {
    fn new(name: &str, errno: Option<u32>) -> Result<Self> {
        let code = |default: u32| {
            let code = errno.unwrap_or(default);
            u16::try_from(code)
                .map_err(|_| AgentError::invalid(format!("linux.seccomp: errnoRet {code}")))
        };
        Ok(match name {
            "SCMP_ACT_ALLOW" => Self::Allow,
            "SCMP_ACT_LOG" => Self::Log,
            "SCMP_ACT_ERRNO" => Self::Errno(code(EPERM)?),
            "SCMP_ACT_TRAP" => Self::Trap,
            "SCMP_ACT_TRACE" => Self::Trace(code(EPERM)?),
            "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Self::KillThread,
            "SCMP_ACT_KILL_PROCESS" => Self::KillProcess,
            "SCMP_ACT_NOTIFY" => {
                return Err(AgentError::unsupported(
                    "linux.seccomp: SCMP_ACT_NOTIFY: there is no listener in the guest",
                ));
            }
            other => {
                return Err(AgentError::invalid(format!(
                    "linux.seccomp: action {other:?} is unknown"
                )));
            }
        })
    }
}

impl From<Action> for ScmpAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Allow => Self::Allow,
            Action::Log => Self::Log,
            Action::Errno(code) => Self::Errno(code.into()),
            Action::Trap => Self::Trap,
            Action::Trace(code) => Self::Trace(code),
            Action::KillThread => Self::KillThread,
            Action::KillProcess => Self::KillProcess,
        }
    }
}

fn architecture(name: &str) -> Result<ScmpArch> {
    Ok(match name {
        "SCMP_ARCH_X86_64" => ScmpArch::X8664,
        "SCMP_ARCH_X86" => ScmpArch::X86,
        "SCMP_ARCH_X32" => ScmpArch::X32,
        "SCMP_ARCH_AARCH64" => ScmpArch::Aarch64,
        "SCMP_ARCH_ARM" => ScmpArch::Arm,
        other => {
            return Err(AgentError::unsupported(format!(
                "linux.seccomp.architectures: {other:?} is not supported"
            )));
        }
    })
}

/// How the kernel names an architecture to a filter (`AUDIT_ARCH_*`).
fn audit_token(architecture: ScmpArch) -> Option<u32> {
    match architecture {
        ScmpArch::X8664 => Some(0xc000_003e),
        ScmpArch::X86 => Some(0x4000_0003),
        ScmpArch::Aarch64 => Some(0xc000_00b7),
        ScmpArch::Arm => Some(0x4000_0028),
        _ => None,
    }
}

/// Offsets in `struct seccomp_data`.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;
/// `__X32_SYSCALL_BIT`.
const X32: u32 = 0x4000_0000;
const SECCOMP_RET_ERRNO: u32 = 0x0005_0000;
const ENOSYS: u32 = libc::ENOSYS.unsigned_abs();
const EPERM: u32 = libc::EPERM.unsigned_abs();

/// Classic BPF: class and mode in one code.
const BPF_LD_W_ABS: u16 = 0x20;
const BPF_JEQ: u16 = 0x15;
const BPF_JGT: u16 = 0x25;
const BPF_JGE: u16 = 0x35;
const BPF_RET: u16 = 0x06;

fn load(offset: u32) -> FilterInstruction {
    instruction(BPF_LD_W_ABS, offset, 0, 0)
}

fn jump(code: u16, operand: u32, yes: u8, no: u8) -> FilterInstruction {
    instruction(code, operand, yes, no)
}

fn ret(value: u32) -> FilterInstruction {
    instruction(BPF_RET, value, 0, 0)
}

fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> FilterInstruction {
    FilterInstruction { code, jt, jf, k }
}

/// Reads a program in the kernel's layout: code u16, two jump distances u8, operand u32.
fn read_program(memory: &OwnedFd) -> Result<Vec<FilterInstruction>> {
    seek(memory, SeekFrom::Start(0)).context(|| "memfd")?;
    let mut program = Vec::new();
    let mut bytes = [0; 8];
    while rustix::io::read(memory, &mut bytes).context(|| "memfd")? == bytes.len() {
        let [c0, c1, jt, jf, k0, k1, k2, k3] = bytes;
        program.push(instruction(
            u16::from_ne_bytes([c0, c1]),
            u32::from_ne_bytes([k0, k1, k2, k3]),
            jt,
            jf,
        ));
    }
    Ok(program)
}

#[cfg(test)]
mod tests;
