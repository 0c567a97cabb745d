// SPDX-License-Identifier: Apache-2.0
//! A containerd whose shims read a configuration of the test's.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::TempDir;

use crate::containerd::{Containerd, Options};
use crate::ctr::Ctr;
use crate::process::Output;

const CONFIGURATION: &str = "configuration.toml";

/// The containerd, and a folder with the configuration and what belongs to it.
#[derive(Debug)]
pub struct Configured {
    // Before the folder: its shims read there until they end.
    containerd: Containerd,
    folder: TempDir,
}

impl Configured {
    /// Without a configuration so far.
    pub fn start(ctr: &Ctr) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(CONFIGURATION);
        let environment = [("KATA_CONF_FILE", path.as_path())];
        let options = Options {
            environment: &environment,
            ..Options::default()
        };
        let containerd = Containerd::start(ctr, &options)?;
        Ok(Self { containerd, folder })
    }

    /// With a configuration.
    pub fn with(ctr: &Ctr, configuration: &str) -> Result<Self> {
        let it = Self::start(ctr)?;
        it.configure(configuration)?;
        Ok(it)
    }

    /// Gives the shims that start from now on this configuration.
    pub fn configure(&self, configuration: &str) -> Result<()> {
        self.file(CONFIGURATION, configuration.as_bytes()).map(drop)
    }

    /// Writes a file into the folder.
    pub fn file(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let path = self.folder().join(name);
        fs::write(&path, content)?;
        Ok(path)
    }

    /// Where its files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The log of its containerd, with those of the shims.
    #[must_use]
    pub fn log(&self) -> String {
        self.containerd.log()
    }

    /// Its client.
    #[must_use]
    pub fn ctr(&self) -> &Ctr {
        self.containerd.ctr()
    }

    /// Runs a container that does nothing under this configuration.
    pub fn run(&self, configuration: &str) -> Result<Output> {
        self.configure(configuration)?;
        self.ctr().run(&[], "faulty", &["true"])
    }
}
