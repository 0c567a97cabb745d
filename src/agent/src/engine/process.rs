// SPDX-License-Identifier: Apache-2.0
//! The new process, from its clone to the program of the container. It is a copy of the helper:
//! one thread, child of the agent, in its cgroup.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Gid, Mode, OFlags, Uid, fchown, openat};
use rustix::io::Errno;
use rustix::process::{chdir, getcwd, setsid, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::capabilities::{self, keep_across_user_change, keep_no_longer};
use super::channel::Channel;
use super::hooks::Hooks;
use super::plan::{ContainerPlan, Go, Namespace, ProcessPlan, Report};
use super::seccomp::Filter;
use super::terminal::Terminal;
use super::user_namespace::Prepared;
use super::{command, hooks, masks, rootfs, sysctl, user};
use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, Target};
use crate::sys;

/// What a process has besides its plan.
#[derive(Debug)]
pub(super) struct Inherited<'a> {
    /// To the agent.
    pub(super) channel: &'a Channel,
    /// Standard input, output and error; empty with a terminal.
    pub(super) streams: Vec<OwnedFd>,
    /// The container's first process, for an exec.
    pub(super) init: Option<OwnedFd>,
    /// The compiled seccomp profile.
    pub(super) filter: Option<Filter>,
    /// Made with the guest's rights, for a container that does not have them.
    pub(super) prepared: Prepared,
    /// Device and file number of this binary.
    pub(super) own_file: (u64, u64),
}

impl Inherited<'_> {
    /// Reports to the agent, and goes on when it says so.
    fn report_and_wait(&self, report: &Report, along: &[BorrowedFd<'_>]) -> Result<()> {
        self.channel
            .send(report, along)
            .context(|| "report to the agent")?;
        let _: (Go, _) = self.channel.receive().context(|| "wait for the agent")?;
        Ok(())
    }
}

/// Builds the container around this process and executes its program when the agent says so.
/// Only returns on failure.
pub(super) fn container(plan: &ContainerPlan, inherited: &Inherited<'_>) -> AgentError {
    match build(plan, inherited) {
        Ok(terminal) => execute(&plan.process, inherited, terminal, Some(&plan.hooks)),
        Err(error) => error,
    }
}

/// Executes a program in a container that the helper has joined. Only returns on failure.
pub(super) fn exec(plan: &ProcessPlan, inherited: &Inherited<'_>) -> AgentError {
    match join_last_namespaces(plan, inherited).and_then(|()| open_terminal(plan)) {
        Ok(terminal) => execute(plan, inherited, terminal, None),
        Err(error) => error,
    }
}

fn build(plan: &ContainerPlan, inherited: &Inherited<'_>) -> Result<Option<Terminal>> {
    setsid().context(|| "start a session")?;
    if plan.new_namespaces.contains(&Namespace::Cgroup) {
        // Only now: at the clone its root would have been the helper's cgroup.
        sys::process::new_cgroup_namespace().context(|| "make a cgroup namespace")?;
    }
    if plan.new_namespaces.contains(&Namespace::Network) {
        sys::net::loopback_up().context(|| "bring the loopback interface up")?;
    }
    if plan.new_namespaces.contains(&Namespace::Uts) {
        plan.set_hostname()?;
    }
    let user_namespace = plan.process.user_namespace;
    let rootfs = rootfs::build(&plan.rootfs, &inherited.prepared, user_namespace)?;
    let root = &rootfs.root;
    if !plan.hooks.create_runtime.is_empty() {
        inherited.report_and_wait(&Report::Mounted, &[])?;
    }
    hooks::run_here(&plan.hooks.create_container, &plan.hooks.state, "creating")?;
    let mut terminal = None;
    if let Some(size) = plan.process.terminal {
        let opened = Terminal::open(root.as_fd(), size, plan.process.uid)?;
        opened.bind_console(root.as_fd())?;
        terminal = Some(opened);
    }
    sysctl::apply(&plan.sysctls)?;
    masks::protect(root.as_fd(), &plan.rootfs.readonly_paths)?;
    masks::mask(root.as_fd(), &plan.rootfs.masked)?;
    umask(Mode::from_raw_mode(0o022));
    make_cwd(root, &plan.process.cwd)?;
    rootfs.finish()?;
    rootfs::enter(root, &plan.rootfs)?;
    Ok(terminal)
}

/// Joins what the helper could not. In one step: who is in the user namespace has no right any more
/// to join a cgroup namespace of the guest's.
fn join_last_namespaces(plan: &ProcessPlan, inherited: &Inherited<'_>) -> Result<()> {
    let Some(init) = &inherited.init else {
        return Err(AgentError::internal(
            "the container's first process is missing",
        ));
    };
    // The kernel refuses to enter the user namespace that one is in.
    let user = match plan.user_namespace {
        true => ThreadNameSpaceType::USER,
        false => ThreadNameSpaceType::empty(),
    };
    move_into_thread_name_spaces(init.as_fd(), ThreadNameSpaceType::CONTROL_GROUP | user)
        .context(|| "join the container's cgroup and user namespaces")
}

fn open_terminal(plan: &ProcessPlan) -> Result<Option<Terminal>> {
    setsid().context(|| "start a session")?;
    if plan.user_namespace {
        user::become_root()?;
    }
    umask(Mode::from_raw_mode(0o022));
    let Some(size) = plan.terminal else {
        return Ok(None);
    };
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open the container's root")?;
    Terminal::open(root.as_fd(), size, plan.uid).map(Some)
}

/// Images name working folders that they don't have; as elsewhere they are made with the
/// container.
fn make_cwd(root: &OwnedFd, cwd: &Path) -> Result<()> {
    match mount::create_in_root(root.as_fd(), cwd, Target::Directory) {
        // What can't be made is reported when it is entered.
        Ok(_) | Err(Errno::ROFS | Errno::ACCESS | Errno::NOTDIR) => Ok(()),
        Err(error) => Err(AgentError::io(
            format!("make the working directory {cwd:?}"),
            error,
        )),
    }
}

/// From a finished container to the program. The first process of a container waits for the word
/// to start, and runs the hooks of that moment.
fn execute(
    plan: &ProcessPlan,
    inherited: &Inherited<'_>,
    terminal: Option<Terminal>,
    first: Option<&Hooks>,
) -> AgentError {
    match prepare(plan, inherited, terminal, first) {
        Ok(program) => program.execute(),
        Err(error) => error,
    }
}

/// A program that is found and checked, with its strings as the kernel wants them.
struct Program {
    name: String,
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

fn prepare(
    plan: &ProcessPlan,
    inherited: &Inherited<'_>,
    terminal: Option<Terminal>,
    first: Option<&Hooks>,
) -> Result<Program> {
    match (&terminal, inherited.streams.as_slice()) {
        (Some(terminal), _) => terminal.control()?,
        (None, [stdin, stdout, stderr]) => {
            for stream in [stdin, stdout, stderr] {
                // So that the user may open /dev/stdout again. Not all files have owners.
                let owner = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
                let _ = fchown(stream, Some(owner.0), Some(owner.1));
            }
            connect(stdin, stdout, stderr)?;
        }
        (None, _) => return Err(AgentError::internal("standard streams are missing")),
    }
    for limit in &plan.limits {
        limit.apply()?;
    }
    // Before the user changes, as root may enter more; if it may not, the user itself might.
    let entered = enter_cwd(&plan.cwd);
    plan.capabilities.limit()?;
    keep_across_user_change()?;
    user::become_user(plan)?;
    keep_no_longer()?;
    if entered.is_err() {
        enter_cwd(&plan.cwd)?;
    }
    inside_root(&plan.cwd)?;

    // Without `no_new_privs` only CAP_SYS_ADMIN may install a filter, so it is kept until then.
    let late = inherited.filter.is_some() && !plan.no_new_privileges;
    plan.capabilities
        .apply(if late { capabilities::SYS_ADMIN } else { 0 })?;
    let program = Program::new(plan, inherited.own_file)?;
    if plan.no_new_privileges {
        rustix::thread::set_no_new_privs(true).context(|| "set no_new_privs")?;
    }
    sys::process::reset_signals();
    sys::process::close_on_exec_from(3).context(|| "close descriptors")?;

    let master = terminal.as_ref().map(|terminal| terminal.master.as_fd());
    match first {
        Some(hooks) => {
            inherited.report_and_wait(&Report::Ready, master.as_slice())?;
            hooks::run_here(&hooks.start_container, &hooks.state, "created")?;
        }
        None => inherited
            .channel
            .send(&Report::Ready, master.as_slice())
            .context(|| "report to the agent")?,
    }
    drop(terminal);
    if let Some(filter) = &inherited.filter {
        filter.install()?;
        if late {
            plan.capabilities.apply(0)?;
        }
    }
    Ok(program)
}

impl Program {
    fn new(plan: &ProcessPlan, own_file: (u64, u64)) -> Result<Self> {
        let name = plan.arguments.first().cloned().unwrap_or_default();
        let path = command::find(&name, &plan.environment)?;
        command::is_not(&path, own_file)?;
        let mut environment = plan.environment.clone();
        if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
            environment.push(format!("HOME={}", user::home(plan.uid)));
        }
        Ok(Self {
            name,
            path: CString::new(path).map_err(|_| AgentError::invalid("program holds a NUL"))?,
            arguments: strings(&plan.arguments)?,
            environment: strings(&environment)?,
        })
    }

    /// Only returns on failure.
    fn execute(self) -> AgentError {
        let error = sys::process::execute(&self.path, &self.arguments, &self.environment);
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        AgentError::invalid(format!("exec: {:?}: {}", self.name, command::words(errno)))
    }
}

fn strings(texts: &[String]) -> Result<Vec<CString>> {
    texts
        .iter()
        .map(|text| {
            CString::new(text.as_str()).map_err(|_| AgentError::invalid(format!("{text:?}: NUL")))
        })
        .collect()
}

/// Makes the three descriptors the standard streams.
///
/// # Errors
///
/// The kernel's.
pub(super) fn connect(stdin: &OwnedFd, stdout: &OwnedFd, stderr: &OwnedFd) -> Result<()> {
    dup2_stdin(stdin).context(|| "connect standard input")?;
    dup2_stdout(stdout).context(|| "connect standard output")?;
    dup2_stderr(stderr).context(|| "connect standard error")
}

fn enter_cwd(cwd: &Path) -> Result<()> {
    chdir(cwd).map_err(|error| {
        AgentError::invalid(format!("chdir to cwd ({cwd:?}): {}", command::words(error)))
    })
}

/// A working folder outside of the root would be a way out of the container (CVE-2024-21626).
fn inside_root(cwd: &Path) -> Result<()> {
    let current = getcwd(Vec::new()).context(|| format!("check cwd ({cwd:?})"))?;
    if current.as_bytes().starts_with(b"/") {
        Ok(())
    } else {
        Err(AgentError::invalid(format!(
            "cwd ({cwd:?}) is outside of the container's root"
        )))
    }
}
