// SPDX-License-Identifier: Apache-2.0
//! Requests of a runtime: what is decoded and checked of them before anything is done.

use protobuf::Message;
use protocols::agent::agent as messages;
use protocols::agent::{csi, health};

use crate::{device, storage};

/// What a decoded message is written as is read as the same.
fn decode<M: Message + PartialEq>(bytes: &[u8]) -> Option<M> {
    let message = M::parse_from_bytes(bytes).ok()?;
    if let Ok(written) = message.write_to_bytes() {
        assert!(M::parse_from_bytes(&written).ok().as_ref() == Some(&message));
    }
    Some(message)
}

/// Any bytes as each request; the first chooses.
pub fn requests(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else {
        return;
    };
    match first % 26 {
        0 => create(bytes),
        1 => {
            if let Some(request) = decode::<messages::CreateSandboxRequest>(bytes) {
                storage::fuzz_request(request.storages);
            }
        }
        2 => {
            if let Some(request) = decode::<messages::UpdateEphemeralMountsRequest>(bytes) {
                storage::fuzz_request(request.storages);
            }
        }
        3 => drop(decode::<messages::ExecProcessRequest>(bytes)),
        4 => drop(decode::<messages::UpdateContainerRequest>(bytes)),
        5 => drop(decode::<messages::UpdateInterfaceRequest>(bytes)),
        6 => drop(decode::<messages::UpdateRoutesRequest>(bytes)),
        7 => drop(decode::<messages::AddARPNeighborsRequest>(bytes)),
        8 => drop(decode::<messages::CopyFileRequest>(bytes)),
        9 => drop(decode::<messages::SignalProcessRequest>(bytes)),
        10 => drop(decode::<messages::WaitProcessRequest>(bytes)),
        11 => drop(decode::<messages::WriteStreamRequest>(bytes)),
        12 => drop(decode::<messages::ReadStreamRequest>(bytes)),
        13 => drop(decode::<messages::TtyWinResizeRequest>(bytes)),
        14 => drop(decode::<messages::SetIPTablesRequest>(bytes)),
        15 => drop(decode::<messages::OnlineCPUMemRequest>(bytes)),
        16 => drop(decode::<messages::ReseedRandomDevRequest>(bytes)),
        17 => drop(decode::<messages::SetGuestDateTimeRequest>(bytes)),
        18 => drop(decode::<messages::MemAgentMemcgConfig>(bytes)),
        19 => drop(decode::<messages::MemAgentCompactConfig>(bytes)),
        20 => drop(decode::<messages::AddSwapRequest>(bytes)),
        21 => drop(decode::<messages::GetDiagnosticDataRequest>(bytes)),
        22 => drop(decode::<messages::MemHotplugByProbeRequest>(bytes)),
        23 => drop(decode::<health::CheckRequest>(bytes)),
        // Answers are decoded by the other side, and by a runtime of ours.
        24 => drop(decode::<messages::StatsContainerResponse>(bytes)),
        _ => drop(decode::<csi::VolumeStatsResponse>(bytes)),
    }
}

fn create(bytes: &[u8]) {
    let Some(mut request) = decode::<messages::CreateContainerRequest>(bytes) else {
        return;
    };
    let _ = super::create::check(&request);
    let _ = super::diagnostics::termination_log_of(&request.OCI);
    device::fuzz(&request.devices, request.OCI.mut_or_insert_default());
    storage::fuzz_request(request.storages);
    let _ = crate::engine::container(&request.OCI);
}

/// A text as the kernel's counters of interfaces.
pub(crate) fn texts(text: &str) {
    let _ = super::requests::network(text);
}
