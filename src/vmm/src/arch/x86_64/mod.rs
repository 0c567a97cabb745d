// SPDX-License-Identifier: Apache-2.0
//! x86-64: PVH boot of an uncompressed kernel, hardware-reduced ACPI, x2APIC.

pub mod acpi;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod pvh;
pub mod vcpu;
