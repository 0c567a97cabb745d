// SPDX-License-Identifier: Apache-2.0
//! Wire formats: the agent's services and containerd's.
//!
//! The code is generated from `protos/` at build time. `agent` is compatible with the agent
//! protocol of Kata Containers 4.1 (services `grpc.AgentService` and `grpc.Health`, all message
//! and field numbers); `containerd` with the public interfaces of containerd 1.6 to 2.x. No
//! policy lives here.

/// Between runtime and agent: ttrpc on vsock port 1024 of the guest.
#[allow(
    clippy::all,
    clippy::restriction,
    clippy::pedantic,
    missing_docs,
    missing_debug_implementations,
    nonstandard_style,
    unreachable_pub,
    unused
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent/mod.rs"));
}

/// Between containerd and shim: the Task service, its events, metrics and options.
#[allow(
    clippy::all,
    clippy::restriction,
    clippy::pedantic,
    missing_docs,
    missing_debug_implementations,
    nonstandard_style,
    unreachable_pub,
    unused
)]
pub mod containerd {
    include!(concat!(env!("OUT_DIR"), "/containerd/mod.rs"));
}
