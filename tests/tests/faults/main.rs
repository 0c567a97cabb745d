// SPDX-License-Identifier: Apache-2.0
//! Kill, damage, starve: each failure reaches the user as one clear line, the next container runs,
//! and nothing is left behind.

#![expect(
    clippy::tests_outside_test_module,
    reason = "this whole program is tests"
)]

mod kill;
mod machine;
mod request;
