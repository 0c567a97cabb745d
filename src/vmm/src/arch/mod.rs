// SPDX-License-Identifier: Apache-2.0
//! What differs between processor architectures: memory layout, boot protocol, tables, the state
//! that a vCPU starts with. Knows no device but by the addresses it describes to the guest.

pub mod x86_64;
