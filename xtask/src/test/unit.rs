// SPDX-License-Identifier: Apache-2.0
//! Unit tests: no root, no KVM.

use crate::build::{self, Profile};
use crate::packages::{self, any};
use crate::progress;
use anyhow::Result;

pub(crate) fn run() -> Result<()> {
    packages::ensure(
        "building the tests",
        &[
            any("gcc"),
            any("libc6-dev"),
            any("libseccomp-dev"),
            // The guest image is judged by its format's own checker.
            any("erofs-utils"),
        ],
    )?;
    let test = |what: &[&str]| progress::run(build::cargo("test", Profile::Dev)?.args(what));
    test(&["--workspace", "--exclude", "tests"])?;
    // Of the suites only what they are made of: they themselves run in the dev VM.
    test(&["--package", "tests", "--lib", "--bins"])
}
