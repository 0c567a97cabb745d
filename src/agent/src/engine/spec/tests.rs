// SPDX-License-Identifier: Apache-2.0
use protocols::agent::oci;

use super::*;
use crate::error::Kind;

fn spec() -> oci::Spec {
    let namespace = |kind: &str| oci::LinuxNamespace {
        Type: kind.to_owned(),
        ..oci::LinuxNamespace::default()
    };
    oci::Spec {
        Process: Some(oci::Process {
            Args: vec!["true".to_owned()],
            Cwd: "/".to_owned(),
            ..oci::Process::default()
        })
        .into(),
        Root: Some(oci::Root {
            Path: "/run/rootfs".to_owned(),
            ..oci::Root::default()
        })
        .into(),
        Linux: Some(oci::Linux {
            Namespaces: ["mount", "pid", "uts"].map(namespace).to_vec(),
            ..oci::Linux::default()
        })
        .into(),
        ..oci::Spec::default()
    }
}

fn refusal(change: impl FnOnce(&mut oci::Spec)) -> AgentError {
    let mut spec = spec();
    change(&mut spec);
    container(&spec).unwrap_err()
}

#[test]
fn a_small_spec_becomes_a_plan() {
    let mut spec = spec();
    spec.Hostname = "box".to_owned();
    let (plan, joins) = container(&spec).unwrap();
    assert_eq!(
        plan.new_namespaces,
        [Namespace::Mount, Namespace::Pid, Namespace::Uts]
    );
    assert!(joins.is_empty());
    assert_eq!(plan.hostname.as_deref(), Some("box"));
    assert!(plan.process.terminal.is_none());
}

#[test]
fn every_unsupported_field_is_refused_by_its_name() {
    type Change = fn(&mut oci::Spec);
    let hook = || vec![oci::Hook::default()];
    let _ = hook;
    let cases: [(&str, Change); 8] = [
        ("solaris", |s| {
            s.Solaris = Some(oci::Solaris::default()).into();
        }),
        ("windows", |s| {
            s.Windows = Some(oci::Windows::default()).into();
        }),
        ("linux.mountLabel", |s| {
            s.Linux.mut_or_insert_default().MountLabel = "x".to_owned();
        }),
        ("linux.intelRdt", |s| {
            let rdt = s
                .Linux
                .mut_or_insert_default()
                .IntelRdt
                .mut_or_insert_default();
            rdt.L3CacheSchema = "x".to_owned();
        }),
        ("linux.namespaces", |s| {
            let linux = s.Linux.mut_or_insert_default();
            linux.Namespaces.push(oci::LinuxNamespace {
                Type: "fancy".to_owned(),
                ..oci::LinuxNamespace::default()
            });
        }),
        ("process.apparmorProfile", |s| {
            s.Process.mut_or_insert_default().ApparmorProfile = "x".to_owned();
        }),
        ("process.selinuxLabel", |s| {
            s.Process.mut_or_insert_default().SelinuxLabel = "x".to_owned();
        }),
        ("process.user.username", |s| {
            let process = s.Process.mut_or_insert_default();
            process.User.mut_or_insert_default().Username = "x".to_owned();
        }),
    ];
    for (field, change) in cases {
        let error = refusal(change);
        assert_eq!(error.kind(), Kind::Unsupported, "{field}");
        assert!(error.line().starts_with(field), "{}", error.line());
    }
}

#[test]
fn an_apparmor_profile_that_nobody_chose_is_none() {
    let mut process = oci::Process {
        Args: vec!["true".to_owned()],
        Cwd: "/".to_owned(),
        ApparmorProfile: "cri-containerd.apparmor.d".to_owned(),
        ..oci::Process::default()
    };
    super::process(&process, None).unwrap();
    process.ApparmorProfile = "mine".to_owned();
    super::process(&process, None).unwrap_err();
}

#[test]
fn contradictions_are_refused_by_name() {
    type Change = fn(&mut oci::Spec);
    let cases: [(&str, Change); 12] = [
        ("process: missing", |s| s.Process.0 = None),
        ("root: missing", |s| s.Root.0 = None),
        ("root.path", |s| {
            s.Root.mut_or_insert_default().Path = "/".to_owned();
        }),
        ("process.args", |s| {
            s.Process.mut_or_insert_default().Args.clear();
        }),
        ("process.env", |s| {
            s.Process.mut_or_insert_default().Env = vec!["A=\0".to_owned()];
        }),
        ("process.cwd", |s| {
            s.Process.mut_or_insert_default().Cwd = "tmp".to_owned();
        }),
        ("process.oomScoreAdj", |s| {
            s.Process.mut_or_insert_default().OOMScoreAdj = 1001;
        }),
        ("linux.namespaces", |s| {
            s.Linux.mut_or_insert_default().Namespaces.clear();
        }),
        ("linux.maskedPaths", |s| {
            s.Linux.mut_or_insert_default().MaskedPaths = vec!["proc".to_owned()];
        }),
        ("linux.uidMappings", |s| {
            s.Linux.mut_or_insert_default().UIDMappings = vec![oci::LinuxIDMapping::default()];
        }),
        ("linux.gidMappings", |s| {
            s.Linux.mut_or_insert_default().GIDMappings = vec![oci::LinuxIDMapping::default()];
        }),
        ("hooks.prestart", |s| {
            s.Hooks.mut_or_insert_default().Prestart = vec![oci::Hook::default()];
        }),
    ];
    for (field, change) in cases {
        let error = refusal(change);
        assert_eq!(error.kind(), Kind::InvalidArgument, "{field}");
        assert!(error.line().starts_with(field), "{}", error.line());
    }
}

#[test]
fn mounts_need_what_their_kind_needs() {
    let with = |destination: &str, kind: &str, source: &str| {
        let entry = oci::Mount {
            destination: destination.to_owned(),
            type_: kind.to_owned(),
            source: source.to_owned(),
            ..oci::Mount::default()
        };
        mount(&entry, false)
    };
    assert!(with("/data", "bind", "/src").unwrap().options.bind);
    assert!(!with("/proc", "proc", "proc").unwrap().options.bind);
    assert!(with("/data", "bind", "").is_err());
    assert!(with("/data", "", "x").is_err());
    assert!(with("/", "tmpfs", "tmpfs").is_err());
    assert!(with("/..", "tmpfs", "tmpfs").is_err());
}

#[test]
fn ids_are_mapped_for_binds_of_containers_with_a_user_namespace() {
    let with = |kind: &str, user_namespace| {
        let entry = oci::Mount {
            destination: "/data".to_owned(),
            type_: kind.to_owned(),
            source: "/src".to_owned(),
            options: vec!["idmap".to_owned()],
            ..oci::Mount::default()
        };
        mount(&entry, user_namespace)
    };
    assert!(with("bind", true).is_ok());
    assert!(with("bind", false).is_err());
    assert!(with("tmpfs", true).is_err());
}

#[test]
fn an_exec_takes_what_it_does_not_say_from_the_container() {
    let mut spec = spec();
    let process = spec.Process.mut_or_insert_default();
    process.Capabilities = Some(oci::LinuxCapabilities {
        Effective: vec!["CAP_KILL".to_owned()],
        ..oci::LinuxCapabilities::default()
    })
    .into();
    let (plan, _) = container(&spec).unwrap();
    let bare = oci::Process {
        Args: vec!["sh".to_owned()],
        Cwd: "/".to_owned(),
        ..oci::Process::default()
    };
    let exec = super::process(&bare, Some(&plan.process)).unwrap();
    assert_eq!(exec.capabilities, plan.process.capabilities);
}
