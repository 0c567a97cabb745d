// SPDX-License-Identifier: Apache-2.0
//! The project's one door: `cargo xtask run`, `test`, `vm`, `guest`, `fuzz`, `bench`, `install`.

mod archive;
mod bench;
mod build;
mod busybox;
mod cache;
mod containerd;
mod crates;
mod fuzz;
mod guest;
mod install;
mod packages;
mod probe;
mod progress;
mod run;
mod tar;
mod test;
mod vm;
mod workspace;

use anyhow::Result;
use build::Profile;
use clap::{Args, Parser, Subcommand};
use guest::kernel::Flavour;
use std::path::PathBuf;
use std::process::ExitCode;
use test::Selection;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Run, test and install Nutshell")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Run a container in its own VM, here or in the dev VM (no command: a greeting from inside)
    Run {
        /// Command and arguments, in busybox
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Run the tests and sum up
    Test(Test),
    /// Run a command as root in the dev VM, which has a real /dev/kvm (no command: a shell)
    Vm(Vm),
    /// Build the guest's kernel, agent and image
    Guest(GuestBuild),
    /// Build the release and put it into the system
    Install {
        /// Folder that `bin` and `share` are in
        #[arg(long, default_value = "/usr", value_name = "DIR")]
        prefix: PathBuf,
    },
    /// Feed the parsers of what a guest can write with made-up input
    Fuzz {
        /// One target (each without)
        target: Option<String>,
        /// Time for each target
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Measure in the dev VM, beside the programs to be compared with; JSON on stdout
    Bench {
        /// Arguments of the benchmark
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// The dev VM's process 1
    #[command(hide = true)]
    VmInit,
    /// The dev VM's session server
    #[command(hide = true)]
    VmServe,
}

#[derive(Debug, Args)]
struct Vm {
    /// Only boot: no build of the runtime, no containerd
    #[arg(long)]
    bare: bool,
    /// Folder of this machine that is writable in the VM as /out
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// CPUs of the VM
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the VM in MiB
    #[arg(long, default_value_t = 6144, value_name = "MIB")]
    memory: u32,
    /// Command and arguments
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct Test {
    /// Only what needs neither root nor a VM
    #[arg(long)]
    quick: bool,
    /// Only this suite (may be repeated)
    #[arg(long, value_name = "SUITE")]
    only: Vec<String>,
    /// Arguments of the test binaries that run in the dev VM
    #[arg(last = true)]
    arguments: Vec<String>,
}

#[derive(Debug, Args)]
struct GuestBuild {
    /// Build the kernel's debug flavour
    #[arg(long)]
    debug_kernel: bool,
    /// Build the agent as it is installed (slower to link)
    #[arg(long)]
    release: bool,
    /// A static executable, such as busybox, that is the debug console's shell in an image of its own
    #[arg(long, value_name = "FILE")]
    shell: Option<PathBuf>,
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(action: Action) -> Result<u8> {
    match action {
        Action::Run { command } => run::run(command),
        Action::Test(Test {
            quick,
            only,
            arguments,
        }) => test::run(&Selection {
            quick,
            only,
            arguments,
        }),
        Action::Vm(vm) => {
            let options = vm::Options {
                cpus: vm.cpus,
                memory: vm.memory,
                out: vm.out,
            };
            let contents = if vm.bare {
                vm::Contents::Bare
            } else {
                vm::Contents::Containerd(Profile::Quick)
            };
            vm::run(&options, contents, vm.command)
        }
        Action::Guest(options) => {
            let flavour = if options.debug_kernel {
                Flavour::Debug
            } else {
                Flavour::Release
            };
            let profile = if options.release {
                Profile::Release
            } else {
                Profile::Quick
            };
            let guest = guest::build(profile, flavour, options.shell.as_deref())?;
            println!(
                "kernel {}\nimage  {}",
                guest.kernel.display(),
                guest.image.display()
            );
            Ok(0)
        }
        Action::Install { prefix } => install::install(&prefix).map(|()| 0),
        Action::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds).map(|()| 0),
        Action::Bench { arguments } => bench::run(arguments),
        Action::VmInit => vm::server::init().map(|()| 0),
        Action::VmServe => vm::server::serve().map(|()| 0),
    }
}
