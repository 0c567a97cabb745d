// SPDX-License-Identifier: Apache-2.0
//! The agent protocol on the wire, against vectors made from its description (`golden.txt`): each
//! message is read, with every field under its name, and written, the same bytes.
#![allow(
    missing_docs,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs;
use std::path::Path;

use protobuf::Message;
use protocols::agent::{agent, csi, health, oci, types};

/// A message with every field set.
#[derive(Debug, Default)]
struct Vector {
    bytes: Vec<u8>,
    fields: Vec<Field>,
}

#[derive(Debug)]
struct Field {
    name: String,
    kind: String,
    value: String,
}

/// What our code makes of bytes: how the message reads, and the bytes that it writes for it.
type Codec = fn(&[u8]) -> (String, Vec<u8>);

fn codec<M: Message + PartialEq + Debug>(bytes: &[u8]) -> (String, Vec<u8>) {
    let message = M::parse_from_bytes(bytes).unwrap();
    let written = message.write_to_bytes().unwrap();
    assert_eq!(M::parse_from_bytes(&written).unwrap(), message);
    (format!("{message:?}"), written)
}

macro_rules! codecs {
    ($($module:ident: $($name:ident),*;)*) => {
        [$($((stringify!($name), codec::<$module::$name> as Codec)),*),*]
    };
}

const CODECS: [(&str, Codec); 113] = codecs! {
    agent: CreateContainerRequest, StartContainerRequest, RemoveContainerRequest,
        ExecProcessRequest, SignalProcessRequest, WaitProcessRequest, WaitProcessResponse,
        UpdateContainerRequest, StatsContainerRequest, PauseContainerRequest,
        ResumeContainerRequest, CpuUsage, ThrottlingData, CpuStats, PidsStats, MemoryData,
        MemoryStats, BlkioStatsEntry, BlkioStats, HugetlbStats, CgroupStats, NetworkStats,
        StatsContainerResponse, WriteStreamRequest, WriteStreamResponse, ReadStreamRequest,
        ReadStreamResponse, CloseStdinRequest, TtyWinResizeRequest, KernelModule,
        CreateSandboxRequest, DestroySandboxRequest, RemoveStaleVirtiofsShareMountsRequest,
        Interfaces, Routes, UpdateInterfaceRequest, UpdateRoutesRequest,
        UpdateEphemeralMountsRequest, ListInterfacesRequest, ListRoutesRequest, ARPNeighbors,
        AddARPNeighborsRequest, GetIPTablesRequest, GetIPTablesResponse, SetIPTablesRequest,
        SetIPTablesResponse, OnlineCPUMemRequest, ReseedRandomDevRequest, AgentDetails,
        GuestDetailsRequest, GuestDetailsResponse, MemHotplugByProbeRequest,
        SetGuestDateTimeRequest, FSGroup, SharedMount, Storage, Device, StringUser,
        CopyFileRequest, GetOOMEventRequest, OOMEvent, AddSwapRequest, AddSwapPathRequest,
        GetMetricsRequest, Metrics, VolumeStatsRequest, ResizeVolumeRequest, SetPolicyRequest,
        GetDiagnosticDataRequest, GetDiagnosticDataResponse, MemAgentMemcgConfig,
        MemAgentCompactConfig;
    health: CheckRequest, HealthCheckResponse, VersionCheckResponse;
    types: IPAddress, Interface, Route, ARPNeighbor;
    oci: Spec, Process, Box, User, LinuxCapabilities, POSIXRlimit, Mount, Root, Hooks, Hook,
        Linux, Windows, Solaris, LinuxIDMapping, LinuxNamespace, LinuxDevice, LinuxResources,
        LinuxMemory, LinuxCPU, LinuxWeightDevice, LinuxThrottleDevice, LinuxBlockIO, LinuxPids,
        LinuxDeviceCgroup, LinuxNetwork, LinuxHugepageLimit, LinuxInterfacePriority,
        LinuxSeccomp, LinuxSeccompArg, LinuxSyscall, LinuxIntelRdt;
    csi: VolumeStatsResponse, VolumeUsage, VolumeCondition;
};

/// A `oneof` is written after the other fields, also inside of these.
const REORDERED: [&str; 5] = [
    "CreateContainerRequest",
    "Linux",
    "LinuxSeccomp",
    "LinuxSyscall",
    "Spec",
];

fn golden() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.txt")).unwrap()
}

fn vectors(text: &str) -> BTreeMap<String, Vector> {
    let mut vectors = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        if line.is_empty() || line.starts_with('#') || line.starts_with("rpc ") {
            continue;
        }
        if let Some(full) = line.strip_prefix("= ") {
            name = full.rsplit('.').next().unwrap().to_owned();
            vectors.insert(name.clone(), Vector::default());
            continue;
        }
        let vector = vectors.get_mut(&name).unwrap();
        if line.starts_with("    ") {
            let bytes = line.split_whitespace();
            let bytes = bytes.map(|byte| u8::from_str_radix(byte, 16).unwrap());
            vector.bytes.extend(bytes);
        } else {
            let (what, value) = line.split_once(" = ").unwrap();
            let words: Vec<&str> = what.splitn(3, ' ').collect();
            vector.fields.push(Field {
                name: words[1].to_owned(),
                kind: words[2].to_owned(),
                value: value.to_owned(),
            });
        }
    }
    vectors
}

/// How our code shows a field of that value.
fn shown(field: &Field) -> Option<Vec<String>> {
    let name = match field.name.as_str() {
        // A word of Rust's.
        "type" => "type_",
        name => name,
    };
    let forms = match field.kind.as_str() {
        "string" | "bytes" | "bool" | "uint32" | "uint64" | "int32" | "int64" => {
            vec![field.value.clone(), format!("Some({})", field.value)]
        }
        "repeated string" => {
            let words = field.value.trim_matches(['[', ']']);
            vec![format!("[{words}]")]
        }
        packed if packed.starts_with("packed ") => vec![field.value.clone()],
        "IPFamily" | "FSGroupChangePolicy" | "ServingStatus" | "Unit" => vec![field.value.clone()],
        "map" => vec![format!("{{{}", field.value.split(" -> ").next().unwrap())],
        // A message, which has a vector of its own.
        _ => return None,
    };
    let spelled = forms.into_iter().map(|form| format!("{name}: {form}"));
    let mut spelled: Vec<String> = spelled.collect();
    // As one of several: `Errnoret(1)`.
    let (first, rest) = name.split_at(1);
    spelled.push(format!("{}{rest}({})", first.to_uppercase(), field.value));
    Some(spelled)
}

#[test]
fn every_message_is_read_and_written_as_the_protocol_says() {
    let vectors = vectors(&golden());
    for (name, codec) in CODECS {
        let vector = vectors
            .get(name)
            .unwrap_or_else(|| panic!("no vector of {name}"));
        let (text, written) = codec(&vector.bytes);
        // A field of another number or type would be kept as an unknown one.
        assert!(!text.contains("fields: Some"), "{name}: {text}");
        for field in &vector.fields {
            if let Some(forms) = shown(field) {
                let found = forms.iter().any(|form| text.contains(form.as_str()));
                assert!(found, "{name}: none of {forms:?} in {text}");
            }
        }
        let (mut expected, mut written) = (vector.bytes.clone(), written);
        if REORDERED.contains(&name) {
            expected.sort_unstable();
            written.sort_unstable();
        }
        assert_eq!(written, expected, "{name}");
    }
}

/// The words after `keyword` at the beginnings of lines of all `.proto` files of the agent.
fn declared(keyword: &str) -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("protos/agent");
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let mut service = "";
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("service ") {
                service = name.split(' ').next().unwrap();
            }
            let Some(rest) = line.trim_start().strip_prefix(keyword) else {
                continue;
            };
            if keyword == "rpc " {
                let words = rest.replace(['(', ')', ';'], " ").replace(" returns ", " ");
                let words: Vec<&str> = words.split_whitespace().collect();
                let short = words[2].trim_start_matches("google.protobuf.");
                found.insert(format!("grpc.{service}/{} {} {short}", words[0], words[1]));
            } else if !line.starts_with(' ') {
                found.insert(rest.split(' ').next().unwrap().to_owned());
            }
        }
    }
    found
}

#[test]
fn no_message_is_without_a_vector() {
    let tested: BTreeSet<String> = CODECS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let vectors: BTreeSet<String> = vectors(&golden()).into_keys().collect();
    assert_eq!(declared("message "), tested);
    assert_eq!(vectors, tested);
}

#[test]
fn the_services_have_the_protocol_s_methods() {
    let text = golden();
    let described: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("rpc "))
        .map(str::to_owned)
        .collect();
    assert_eq!(described.len(), 44);
    assert_eq!(declared("rpc "), described);
}
