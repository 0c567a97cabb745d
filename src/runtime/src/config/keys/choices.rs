// SPDX-License-Identifier: Apache-2.0
//! The keys about which this build has decided: they take the one value that agrees with it, so
//! that a file may state it, or any value where what they are about is off.

use super::{AGENT, Choice, Key, MACHINE, MEMORY_AGENT, RUNTIME, TEMPLATE, fixed, off};

const IN_ONE: &str = "the monitor is part of the runtime";
const NO_PROGRAM: &str = "no annotation names a program";
const ONE_BUS: &str = "devices are on the one PCI bus";
const DISK_QUEUE: &str = "the queue of a disk";
const NO_TEMPLATE: &str = "every machine boots";
const NO_TRACING: &str = "there are no traces";

/// The keys, table by table.
pub(super) static CHOICES: &[Key] = &[
    fixed(MACHINE, "path", Choice::Text(""), IN_ONE),
    fixed(MACHINE, "ctlpath", Choice::Text(""), IN_ONE),
    fixed(
        MACHINE,
        "valid_hypervisor_paths",
        Choice::Nothing,
        NO_PROGRAM,
    ),
    fixed(MACHINE, "valid_ctlpaths", Choice::Nothing, NO_PROGRAM),
    fixed(
        MACHINE,
        "initrd",
        Choice::Text(""),
        "the guest boots from an image",
    ),
    fixed(
        MACHINE,
        "firmware",
        Choice::Text(""),
        "the guest's kernel is entered directly",
    ),
    fixed(
        MACHINE,
        "kernel_verity_params",
        Choice::Text(""),
        "the guest image is not verified",
    ),
    fixed(
        MACHINE,
        "rootfs_type",
        Choice::Text("erofs"),
        "the guest image is EROFS",
    ),
    fixed(
        MACHINE,
        "vm_rootfs_driver",
        Choice::Text("virtio-blk-pci"),
        "the guest image is a virtio disk",
    ),
    fixed(MACHINE, "default_bridges", Choice::Number(0), ONE_BUS),
    fixed(
        MACHINE,
        "block_device_driver",
        Choice::Text("virtio-blk-pci"),
        ONE_BUS,
    ),
    fixed(MACHINE, "queue_size", Choice::Number(256), DISK_QUEUE),
    fixed(
        MACHINE,
        "shared_fs",
        Choice::Text("inline-virtio-fs"),
        "the monitor serves files itself",
    ),
    fixed(
        MACHINE,
        "virtio_fs_daemon",
        Choice::Text(""),
        "the monitor serves files itself",
    ),
    fixed(
        MACHINE,
        "virtio_fs_extra_args",
        Choice::Nothing,
        "the monitor serves files itself",
    ),
    fixed(
        MACHINE,
        "virtio_fs_cache_size",
        Choice::Number(0),
        "there is no DAX window",
    ),
    fixed(
        MACHINE,
        "enable_hugepages",
        Choice::Flag(false),
        "guest memory is not taken from hugetlbfs",
    ),
    fixed(
        MACHINE,
        "enable_mem_prealloc",
        Choice::Flag(false),
        "guest memory is allocated as the guest uses it",
    ),
    fixed(
        MACHINE,
        "enable_guest_swap",
        Choice::Flag(false),
        "the guest has no swap",
    ),
    off(MACHINE, "guest_swap_path"),
    off(MACHINE, "guest_swap_size_percent"),
    off(MACHINE, "guest_swap_create_threshold_secs"),
    fixed(
        MACHINE,
        "disable_seccomp",
        Choice::Flag(true),
        "the monitor has no seccomp filter yet",
    ),
    // It would choose other devices on a nested host; none of ours depends on that.
    off(MACHINE, "disable_nesting_checks"),
    fixed(
        MACHINE,
        "guest_hook_path",
        Choice::Text(""),
        "the guest image holds no hooks",
    ),
    fixed(
        TEMPLATE,
        "enable_template",
        Choice::Flag(false),
        NO_TEMPLATE,
    ),
    off(TEMPLATE, "template_path"),
    fixed(
        AGENT,
        "container_pipe_size",
        Choice::Number(0),
        "pipes are as large as the guest's kernel makes them",
    ),
    fixed(AGENT, "enable_tracing", Choice::Flag(false), NO_TRACING),
    fixed(
        AGENT,
        "kernel_modules",
        Choice::Nothing,
        "the guest's kernel has no modules",
    ),
    // Nobody dials until the agent has said that it listens.
    off(AGENT, "dial_timeout_ms"),
    fixed(
        MEMORY_AGENT,
        "mem_agent_enable",
        Choice::Flag(false),
        "there is no memory agent",
    ),
    fixed(
        RUNTIME,
        "name",
        Choice::Text("virt_container"),
        "containers run in a machine",
    ),
    fixed(
        RUNTIME,
        "hypervisor_name",
        Choice::Text("dragonball"),
        "the table of the built-in monitor",
    ),
    fixed(
        RUNTIME,
        "agent_name",
        Choice::Text("kata"),
        "the table of the agent",
    ),
    fixed(
        RUNTIME,
        "disable_new_netns",
        Choice::Flag(false),
        "a sandbox that is given no network namespace has one of its own",
    ),
    fixed(
        RUNTIME,
        "emptydir_mode",
        Choice::Text("shared-fs"),
        "directories are shared by virtio-fs",
    ),
    fixed(
        RUNTIME,
        "experimental",
        Choice::Nothing,
        "there are no experimental features",
    ),
    fixed(
        RUNTIME,
        "dan_conf",
        Choice::Text(""),
        "networks come from the pod's network namespace",
    ),
    fixed(
        RUNTIME,
        "keep_abnormal",
        Choice::Flag(false),
        "what has failed is removed",
    ),
    fixed(
        RUNTIME,
        "enable_pprof",
        Choice::Flag(false),
        "there is no profiler",
    ),
    fixed(RUNTIME, "enable_tracing", Choice::Flag(false), NO_TRACING),
    off(RUNTIME, "jaeger_endpoint"),
    off(RUNTIME, "jaeger_user"),
    off(RUNTIME, "jaeger_password"),
];
