// SPDX-License-Identifier: Apache-2.0

use super::lookup::Source;
use super::*;
use crate::error::Kind;

/// Reads texts as if they were files, the last the weightiest.
fn read(texts: &[&str]) -> Result<Sourced> {
    let sources: Vec<_> = texts
        .iter()
        .zip(["/c.toml", "/config.d/1.toml", "/config.d/2.toml"])
        .map(|(text, name)| Source {
            name: name.to_owned(),
            text: (*text).to_owned(),
        })
        .collect();
    Sourced::of(&sources)
}

fn config(text: &str) -> Config {
    read(&[text]).unwrap().config
}

/// What is wrong with a file.
fn wrong(text: &str) -> String {
    let error = read(&[text]).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert!(!error.chain().contains('\n'), "{}", error.chain());
    error.chain()
}

fn annotated(text: &str, annotations: &[(&str, &str)]) -> Result<Sourced> {
    let mut sourced = read(&[text])?;
    sourced.annotate(&pairs(annotations))?;
    Ok(sourced)
}

fn pairs(annotations: &[(&str, &str)]) -> HashMap<String, String> {
    annotations
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn kata_s_keys_are_applied() {
    let config = config(
        r#"
            [hypervisor.dragonball]
            kernel = "/boot/k"
            default_vcpus = 4
            default_memory = 512
            kernel_params = "a=b"
            shared_fs = "inline-virtio-fs"
            reclaim_guest_freed_memory = false
            [agent.kata]
            reconnect_timeout_ms = 3000
            create_container_timeout = 5
            [runtime]
            log_level = "warn"
            disable_guest_seccomp = true
        "#,
    );
    assert_eq!(config.kernel.to_str(), Some("/boot/k"));
    assert_eq!((config.vcpus, config.memory_mib), (4, 512));
    assert_eq!(config.kernel_params, "a=b");
    assert_eq!(config.boot_timeout, Duration::from_secs(10));
    assert_eq!(config.call_timeout, Duration::from_secs(5));
    assert!(!config.seccomp);
    assert!(!config.reclaim);
    assert_eq!(config.log.level(), Level::WARN);
    assert!(!config.log.debug);
}

#[test]
fn a_debugged_program_logs_in_detail_at_least() {
    for (level, expected) in [("critical", Level::DEBUG), ("trace", Level::TRACE)] {
        let text = format!("[runtime]\nenable_debug = true\nlog_level = {level:?}");
        assert_eq!(config(&text).log.level(), expected);
    }
}

#[test]
fn every_wrong_key_is_named_with_its_line() {
    let reasons = wrong(
        r#"colour = 1
[hypervisor.qemu]
path = "/usr/bin/qemu"
[hypervisor.dragonball]
default_vcpus = 33
default_memory = 8
kernel = "vmlinux"
enable_hugepages = true
default_vcpu = 1
[hypervisor.dragonball.factory]
enable_template = true
[runtime]
dan_conf = "/run/kata-containers/dans"
"#,
    );
    for reason in [
        "/c.toml:1: colour: unknown key",
        "/c.toml:2: [hypervisor.qemu]: unknown table; there are [hypervisor.dragonball], ",
        "/c.toml:5: hypervisor.dragonball.default_vcpus = 33: wants at most 32",
        "/c.toml:6: hypervisor.dragonball.default_memory = 8: wants at least 64",
        "/c.toml:7: hypervisor.dragonball.kernel = \"vmlinux\": wants an absolute path",
        "/c.toml:8: hypervisor.dragonball.enable_hugepages = true: this build wants false",
        "/c.toml:9: hypervisor.dragonball.default_vcpu: unknown key; [hypervisor.dragonball] has kernel, ",
        "/c.toml:11: hypervisor.dragonball.factory.enable_template = true: this build wants false",
        "/c.toml:13: runtime.dan_conf = \"/run/kata-containers/dans\": this build wants \"\"",
    ] {
        assert!(reasons.contains(reason), "{reason} in {reasons}");
    }
    assert_eq!(reasons.matches("; /c.toml:").count(), 8, "{reasons}");
}

#[test]
fn a_broken_file_is_one_line() {
    let reasons = wrong("# a comment\n[runtime\nname=");
    assert!(
        reasons.starts_with("configuration: /c.toml:2: "),
        "{reasons}"
    );
}

#[test]
fn values_of_the_wrong_type_are_named() {
    for (text, reason) in [
        (
            "[hypervisor.dragonball]\nvirtio_fs_cache = \"metadata\"",
            "= \"metadata\": wants one of \"never\", \"auto\", \"always\"",
        ),
        (
            "[hypervisor.dragonball]\noverhead_vcpus = -0.5",
            "wants a number from 0 to 32",
        ),
        (
            "[runtime]\nenable_debug = 1",
            "runtime.enable_debug = 1: wants true or false",
        ),
        (
            "[runtime]\nname = true",
            "runtime.name = true: this build wants \"virt_container\"",
        ),
        ("runtime = 1", "runtime: unknown key"),
        (
            "[agent.kata]\ncreate_container_timeout = 0",
            "wants a number from 1 to ",
        ),
        (
            "[agent.kata]\ncreate_container_timeout = \"5\"",
            "wants a number from 1 to ",
        ),
        (
            "[hypervisor.dragonball]\nkernel_params = [\"a\"]",
            "wants a string",
        ),
        (
            "[hypervisor.dragonball]\ndefault_vcpus = \"all\"",
            "wants at most 32",
        ),
        (
            "[hypervisor.dragonball]\ndefault_vcpus = inf",
            "wants at most 32",
        ),
        (
            "[hypervisor.dragonball]\nenable_annotations = \"x\"",
            "wants a list of strings",
        ),
    ] {
        let reasons = wrong(text);
        assert!(reasons.contains(reason), "{reason} in {reasons}");
    }
}

#[test]
fn rates_are_counted_in_bits() {
    let config = config(
        "[hypervisor.dragonball]\nrx_rate_limiter_max_rate = 8000\ntx_rate_limiter_max_rate = 1\n\
         disk_rate_limiter_bw_max_rate = 17",
    );
    assert_eq!(config.network.receive.bytes, 1000);
    // Nothing is no limit, so a bit is rounded up.
    assert_eq!(config.network.transmit.bytes, 1);
    assert_eq!(config.disks.limits.bytes, 3);
}

#[test]
fn cpus_are_counted_as_kata_counts_them() {
    let vcpus = |value: &str| config(&format!("[hypervisor.dragonball]\ndefault_vcpus = {value}"));
    assert_eq!(vcpus("1.5").vcpus, 2);
    assert_eq!(vcpus("2.0").vcpus, 2);
    assert_eq!(vcpus("0.2").vcpus, 1);
    assert_eq!(vcpus("0").vcpus, 1);
    assert_eq!(vcpus("-1").vcpus, host::cpus().min(MOST_VCPUS));
}

#[test]
fn a_machine_has_a_largest_size() {
    let text = "[hypervisor.dragonball]\ndefault_maxvcpus = 8\ndefault_maxmemory = 4096";
    assert_eq!(config(text).vcpu_limit(), 8);
    assert_eq!(config(text).memory_limit(), 4096);
    // What the host has, or more where the file says so.
    assert_eq!(config("").vcpu_limit(), host::cpus().min(MOST_VCPUS));
    let more = config("[hypervisor.dragonball]\ndefault_vcpus = 32\ndefault_maxvcpus = 0");
    assert_eq!(more.vcpu_limit(), 32);
    let reasons = wrong(
        "[hypervisor.dragonball]\ndefault_vcpus = 9\ndefault_maxvcpus = 8\n\
         default_maxmemory = 1024",
    );
    for reason in [
        "/c.toml:2: hypervisor.dragonball.default_vcpus = 9: more than default_maxvcpus, which is 8",
        "default: hypervisor.dragonball.default_memory = 2048: more than default_maxmemory",
    ] {
        assert!(reasons.contains(reason), "{reason} in {reasons}");
    }
}

#[test]
fn a_later_file_goes_over_an_earlier_one() {
    let sourced = read(&[
        "[hypervisor.dragonball]\nrootfs_type = \"ext4\"\ndefault_vcpus = 2\ndefault_memory = 512",
        "[hypervisor.dragonball]\nrootfs_type = \"erofs\"\ndefault_vcpus = 3",
        "[hypervisor.dragonball]\ndefault_vcpus = 4",
    ])
    .unwrap();
    assert_eq!((sourced.config.vcpus, sourced.config.memory_mib), (4, 512));
    let origin = |name: &str| {
        let found = sourced.values().find(|(key, ..)| key.name == name);
        found.map(|(.., origin)| origin.to_string()).unwrap()
    };
    assert_eq!(origin("default_vcpus"), "/config.d/2.toml:2");
    assert_eq!(origin("default_memory"), "/c.toml:4");
    assert_eq!(origin("kernel_params"), "default");
    assert_eq!(sourced.files.len(), 3);
    // What is unknown in an earlier file is still wrong.
    assert!(read(&["x = 1", "[runtime]"]).is_err());
}

/// The defaults of Kata's own file, as far as they concern a built-in monitor.
const KATA: &str = r#"
[hypervisor.dragonball]
path = "/usr/bin/dragonball"
kernel = "/opt/kata/share/kata-containers/vmlinux-dragonball-experimental.container"
image = "/opt/kata/share/kata-containers/kata-containers.img"
rootfs_type = "ext4"
vm_rootfs_driver = "virtio-blk-pci"
enable_annotations = ["default_vcpus", "default_memory", "kernel_params"]
kernel_params = ""
default_vcpus = 1
default_maxvcpus = 0
default_memory = 2048
default_maxmemory = 0
overhead_vcpus = 0.2
overhead_memory = 32
log_level = "info"
default_bridges = 0
reclaim_guest_freed_memory = false
block_device_driver = "virtio-blk-pci"
block_device_cache_direct = false
num_queues = 1
queue_size = 128
shared_fs = "inline-virtio-fs"
virtio_fs_cache = "auto"
virtio_fs_cache_size = 0
virtio_fs_extra_args = ["--thread-pool-size=1", "-o", "announce_submounts"]
enable_hugepages = false
disable_seccomp = false
disable_nesting_checks = false
disable_vhost_net = false
network_queues = 1
enable_guest_swap = false
guest_swap_path = "/run/kata-containers/swap"
guest_swap_size_percent = 100
guest_swap_create_threshold_secs = 60
guest_hook_path = ""
enable_debug = false
[hypervisor.dragonball.factory]
enable_template = false
template_path = "/run/vc/vm/template"
[agent.kata]
container_pipe_size = 1
log_level = "info"
enable_debug = false
enable_tracing = false
debug_console_enabled = false
dial_timeout_ms = 10
reconnect_timeout_ms = 3000
create_container_timeout = 30
[agent.kata.mem_agent]
mem_agent_enable = false
[runtime]
name = "virt_container"
hypervisor_name = "dragonball"
agent_name = "kata"
enable_debug = false
log_level = "info"
static_sandbox_resource_mgmt = true
disable_guest_seccomp = true
disable_new_netns = false
internetworking_model = "tcfilter"
emptydir_mode = "shared-fs"
use_passfd_io = true
passfd_listener_port = 1027
sandbox_bind_mounts = []
experimental = []
dan_conf = "/run/kata-containers/dans"
keep_abnormal = false
enable_pprof = false
enable_tracing = false
jaeger_endpoint = ""
jaeger_user = ""
jaeger_password = ""
"#;

#[test]
fn kata_s_own_file_is_told_what_to_change() {
    let reasons = wrong(KATA);
    let keys: Vec<_> = reasons
        .strip_prefix("configuration: ")
        .unwrap()
        .split("; /c.toml:")
        .map(|reason| reason.split(": ").nth(1).unwrap())
        .map(|reason| {
            reason
                .split(" = ")
                .next()
                .unwrap()
                .rsplit('.')
                .next()
                .unwrap()
        })
        .collect();
    let mut expected = [
        "path",
        "rootfs_type",
        "enable_annotations",
        "queue_size",
        "virtio_fs_extra_args",
        "disable_seccomp",
        "container_pipe_size",
        "dan_conf",
    ];
    let mut keys = keys;
    keys.sort_unstable();
    expected.sort_unstable();
    assert_eq!(keys, expected, "{reasons}");
}

#[test]
fn a_file_beside_kata_s_own_makes_it_fit() {
    let correction = r#"
        [hypervisor.dragonball]
        path = ""
        rootfs_type = "erofs"
        enable_annotations = ["default_.*"]
        queue_size = 256
        virtio_fs_extra_args = []
        disable_seccomp = true
        [agent.kata]
        container_pipe_size = 0
        [runtime]
        dan_conf = ""
    "#;
    read(&[KATA, correction]).unwrap();
}

#[test]
fn a_pod_may_set_what_the_file_lists() {
    let file = "[hypervisor.dragonball]\nenable_annotations = [\"default_(vcpus|memory)\"]\n\
                [runtime]\nenable_annotations = [\".*\"]\n";
    let sourced = annotated(
        file,
        &[
            ("io.katacontainers.config.hypervisor.default_vcpus", "0.5"),
            ("io.katacontainers.config.hypervisor.default_memory", "128"),
            (
                "io.katacontainers.config.runtime.disable_guest_seccomp",
                "true",
            ),
            (
                "io.katacontainers.config.runtime.create_container_timeout",
                "7",
            ),
            ("io.kubernetes.cri.sandbox-id", "pod"),
        ],
    )
    .unwrap();
    let config = sourced.config.clone();
    assert_eq!((config.vcpus, config.memory_mib), (1, 128));
    assert_eq!(config.call_timeout, Duration::from_secs(7));
    assert!(!config.seccomp);
    let memory = sourced
        .values()
        .find(|(key, ..)| key.name == "default_memory");
    assert_eq!(
        memory.unwrap().2.to_string(),
        "annotation io.katacontainers.config.hypervisor.default_memory"
    );
}

#[test]
fn an_annotation_that_is_not_for_a_pod_is_named() {
    let open = "[hypervisor.dragonball]\nenable_annotations = [\".*\"]\ndefault_maxvcpus = 4\n";
    let one = "[hypervisor.dragonball]\nenable_annotations = [\"default_vcpus\"]\n";
    for (file, name, value, reason) in [
        (
            "",
            "config.hypervisor.default_vcpus",
            "1",
            "not allowed; hypervisor.dragonball.enable_annotations must list \"default_vcpus\"",
        ),
        (
            one,
            "config.hypervisor.default_memory",
            "128",
            "not allowed",
        ),
        (
            open,
            "config.runtime.disable_guest_seccomp",
            "true",
            "not allowed; runtime.enable_annotations must list",
        ),
        (
            open,
            "config.hypervisor.kernel",
            "/evil",
            "a pod may not choose this",
        ),
        (
            open,
            "config.hypervisor.kernel_params",
            "init=/bin/sh",
            "a pod may not choose this",
        ),
        (
            open,
            "config.hypervisor.image_hash",
            "00",
            "a pod may not choose this",
        ),
        (
            open,
            "config_path",
            "/evil.toml",
            "a pod may not choose this",
        ),
        (
            open,
            "config.hypervisor.colour",
            "red",
            "unknown; io.katacontainers.config. has ",
        ),
        (open, "container.resource.swappiness", "1", "unknown"),
        (
            open,
            "config.hypervisor.default_vcpus",
            "many",
            "\"many\": wants a number",
        ),
        (
            open,
            "config.hypervisor.default_vcpus",
            "5",
            "more than default_maxvcpus, which is 4",
        ),
        (
            open,
            "config.hypervisor.default_memory",
            "8",
            "wants at least 64",
        ),
        (
            open,
            "config.hypervisor.default_memory",
            "4294967295",
            "this host grants ",
        ),
    ] {
        let name = format!("io.katacontainers.{name}");
        let error = annotated(file, &[(&name, value)]).unwrap_err().chain();
        assert!(error.contains(&name), "{name} in {error}");
        assert!(error.contains(reason), "{reason} in {error}");
    }
}

#[test]
fn only_annotations_that_there_are_can_be_allowed() {
    for (patterns, reason) in [
        (
            "[\"kernel_params\"]",
            "\"kernel_params\" stands for no annotation; a pod can be allowed default_vcpus, ",
        ),
        ("[\"vcpus\"]", "stands for no annotation"),
        ("[\"(\"]", "\"(\": "),
    ] {
        let reasons = wrong(&format!(
            "[hypervisor.dragonball]\nenable_annotations = {patterns}"
        ));
        assert!(reasons.contains(reason), "{reason} in {reasons}");
    }
}

#[test]
fn a_further_container_repeats_the_pod_s_annotations() {
    let file = "[hypervisor.dragonball]\nenable_annotations = [\"default_vcpus\"]\n";
    let name = "io.katacontainers.config.hypervisor.default_vcpus";
    let config = annotated(file, &[(name, "1")]).unwrap().config;
    config.check_member(&pairs(&[])).unwrap();
    config
        .check_member(&pairs(&[(name, "1"), ("a", "b")]))
        .unwrap();
    for (name, value) in [(name, "2"), ("io.katacontainers.config.x", "1")] {
        let error = config.check_member(&pairs(&[(name, value)])).unwrap_err();
        assert!(error.chain().contains(name), "{}", error.chain());
    }
}

#[test]
fn each_key_is_there_once_and_takes_what_it_shows() {
    let shown = Sourced::of(&[]).unwrap();
    let mut config = Config::built_in();
    for (key, value, _) in shown.values() {
        key.apply(&mut config, &value).unwrap();
    }
    for key in keys::all() {
        let same = keys::all().filter(|other| other.path() == key.path());
        assert_eq!(same.count(), 1, "{key}");
    }
    // The lists of annotations exist now, and are empty.
    config.allowed.clear();
    assert_eq!(config, Config::built_in());
}

/// The file that is installed.
const EXAMPLE: &str = include_str!("../../config/configuration.toml");

#[test]
fn the_example_has_every_key_and_changes_nothing() {
    let mut config = config(EXAMPLE);
    // The lists of annotations exist now, and are empty.
    assert!(config.allowed.values().all(Vec::is_empty));
    config.allowed.clear();
    assert_eq!(config, Config::built_in());
    for key in keys::all() {
        let table = EXAMPLE.split(&format!("\n[{}]\n", key.table)).nth(1);
        let table = table.unwrap_or_default().split("\n[").next().unwrap();
        let shown = table.lines().any(|line| {
            let line = line.strip_prefix("# ").unwrap_or(line);
            line.strip_prefix(key.name)
                .is_some_and(|rest| rest.starts_with(" = "))
        });
        assert!(shown, "{key}");
    }
    // So are the annotations.
    for key in keys::all() {
        if let Some(annotation) = key.annotation {
            assert!(EXAMPLE.contains(annotation.name), "{}", annotation.name);
        }
    }
}

#[test]
fn files_of_the_guest_are_found_beside_the_program() {
    let root = tempfile::tempdir().unwrap();
    let kernel = root.path().join(KERNEL);
    std::fs::create_dir_all(kernel.parent().unwrap()).unwrap();
    std::fs::write(&kernel, "").unwrap();
    let program = root.path().join("bin/containerd-shim-kata-v2");
    assert_eq!(prefix(Some(&program)), root.path());
    assert_eq!(
        prefix(Some(Path::new("/nowhere/bin/shim"))),
        Path::new("/usr")
    );
    assert_eq!(prefix(Some(&root.path().join("shim"))), Path::new("/usr"));
}

#[test]
fn what_every_guest_sees_is_told_apart_by_name() {
    let file = |paths: &str| format!("[runtime]\nsandbox_bind_mounts = [{paths}]\n");
    let config = config(&file(r#""/etc/pki", "/srv/logs:rw""#));
    let shown: Vec<_> = config.host_paths.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["/etc/pki:ro", "/srv/logs:rw"]);
    for (paths, reason) in [
        (r#""/a/x", "/b/x:rw""#, "two paths that end in \"x\""),
        (r#""logs""#, "\"logs\" is no absolute path"),
        ("7", "wants a list of strings"),
    ] {
        let error = wrong(&file(paths));
        assert!(error.contains(reason), "{error}");
        assert!(error.contains("runtime.sandbox_bind_mounts"), "{error}");
    }
}
