// SPDX-License-Identifier: Apache-2.0
//! Devices by their place on the PCI bus: `02/03` is slot 3 behind the bridge in slot 2. Numbers of
//! buses are the guest kernel's to choose, slots are the machine's.

use std::fmt::{self, Display};
use std::fs;
use std::path::PathBuf;

use crate::error::{AgentError, Result};

/// The first root bus.
const ROOT: &str = "/sys/devices/pci0000:00";

/// A PCI path: slot and function at each bridge, outermost first.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Path(Vec<(u8, u8)>);

impl Path {
    /// Reads `SLOT[.FUNCTION]`, hexadecimal, with a slash between buses.
    ///
    /// # Errors
    ///
    /// INVALID_ARGUMENT.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let place = |part: &str| {
            let (slot, function) = part.split_once('.').unwrap_or((part, "0"));
            let number = |text: &str, below: u8| {
                let digits = text.len() <= 2 && !text.starts_with('+');
                u8::from_str_radix(text, 16)
                    .ok()
                    .filter(|number| digits && *number < below)
            };
            Some((number(slot, 32)?, number(function, 8)?))
        };
        text.split('/')
            .map(place)
            .collect::<Option<_>>()
            .map(Self)
            .ok_or_else(|| AgentError::invalid(format!("PCI path {text:?}")))
    }

    /// The name of the network interface there, once the kernel has one.
    pub(crate) fn net_device(&self) -> Option<String> {
        self.device("net")
    }

    /// The name of the disk there, once the kernel has one.
    pub(crate) fn block_device(&self) -> Option<String> {
        self.device("block")
    }

    /// Whether the kernel has found a device there.
    pub(crate) fn is_there(&self) -> bool {
        self.folder(PathBuf::from(ROOT)).is_some()
    }

    fn device(&self, class: &str) -> Option<String> {
        let device = self.folder(PathBuf::from(ROOT))?;
        let mut folders = vec![device.clone()];
        // Between a virtio function and its device is the virtio bus.
        folders.extend(children(&device, |name| name.starts_with("virtio")));
        folders
            .iter()
            .flat_map(|folder| children(&folder.join(class), |_| true))
            .find_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
    }

    fn folder(&self, root: PathBuf) -> Option<PathBuf> {
        self.0.iter().try_fold(root, |bus, (slot, function)| {
            let ending = format!(":{slot:02x}.{function}");
            children(&bus, |name| name.ends_with(&ending)).pop()
        })
    }
}

fn children(folder: &std::path::Path, fits: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(&fits))
        .map(|entry| entry.path())
        .collect()
}

impl Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (slot, function)) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_str("/")?;
            }
            write!(f, "{slot:02x}")?;
            if *function > 0 {
                write!(f, ".{function}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_and_written() {
        for text in ["03", "02/03", "1f.7", "02/00/0a.1"] {
            assert_eq!(Path::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Path::parse("3").unwrap().to_string(), "03");
        for wrong in [
            "",
            "/",
            "03/",
            "20",
            "01.8",
            "x",
            "+1",
            "003",
            "0000:00:03.0",
        ] {
            Path::parse(wrong).unwrap_err();
        }
    }

    #[test]
    fn devices_are_found_behind_bridges() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("0000:00:02.0/0000:05:03.0");
        fs::create_dir_all(&device).unwrap();
        fs::create_dir_all(root.path().join("0000:00:03.0")).unwrap();
        let path = Path::parse("02/03").unwrap();
        assert_eq!(path.folder(root.path().to_owned()), Some(device));
        let path = Path::parse("02/04").unwrap();
        assert_eq!(path.folder(root.path().to_owned()), None);
    }
}
