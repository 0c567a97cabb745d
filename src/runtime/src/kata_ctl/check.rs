// SPDX-License-Identifier: Apache-2.0
//! `check`: whether a machine could boot here. Each part is tried as the runtime uses it.

use std::error::Error;
use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmm::arch::x86_64::kernel::Kernel;
use vmm::kvm::Vm;

use crate::config::{Config, Sourced};
use crate::error::{Result, chain};

/// The magic number of an EROFS image, and where it is (`Documentation/filesystems/erofs.rst`).
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
const EROFS_SUPERBLOCK: u64 = 1024;

/// One thing that was tried: its name, and how it is or why it fails.
type Check = (&'static str, Result<String, String>);

/// Checks everything; the lines to print, and whether all is well.
pub(super) fn run(configuration: Result<Sourced>) -> (String, bool) {
    let mut checks = Vec::new();
    match configuration {
        Ok(sourced) => {
            let files = match sourced.files.as_slice() {
                [] => "no file, the defaults hold".to_owned(),
                files => files.join(", "),
            };
            checks.push(("configuration", Ok(files)));
            let Config { kernel, image, .. } = &sourced.config;
            let memory = u64::from(sourced.config.memory_mib) << 20;
            checks.push(("kernel", of_file(kernel, check_kernel(kernel, memory))));
            checks.push(("image", of_file(image, check_image(image))));
        }
        Err(error) => checks.push(("configuration", Err(error.chain()))),
    }
    checks.push(("kvm", check_kvm()));
    report(&checks)
}

fn report(checks: &[Check]) -> (String, bool) {
    let mut text = String::new();
    for (name, result) in checks {
        // Writing to a string can't fail.
        let _ = match result {
            Ok(found) => writeln!(text, "ok    {name}: {found}"),
            Err(reason) => writeln!(text, "FAIL  {name}: {reason}"),
        };
    }
    (text, checks.iter().all(|(_, result)| result.is_ok()))
}

fn of_file(path: &Path, result: Result<(), Box<dyn Error>>) -> Result<String, String> {
    let path = path.display();
    match result {
        Ok(()) => Ok(path.to_string()),
        Err(error) => Err(format!("{path}: {}", chain(error.as_ref()))),
    }
}

fn check_kernel(path: &Path, memory: u64) -> Result<(), Box<dyn Error>> {
    let file = File::open(path)?;
    Kernel::parse(|offset, buffer| file.read_exact_at(buffer, offset), memory)?;
    Ok(())
}

fn check_image(path: &Path) -> Result<(), Box<dyn Error>> {
    let mut magic = [0; EROFS_MAGIC.len()];
    let read = File::open(path)?.read_exact_at(&mut magic, EROFS_SUPERBLOCK);
    if read.is_err() || magic != EROFS_MAGIC {
        return Err("it is not an EROFS image".into());
    }
    Ok(())
}

/// Makes a VM with a vCPU, as the monitor does, and drops it.
fn check_kvm() -> Result<String, String> {
    let made = || -> Result<(), Box<dyn Error>> {
        let file = File::options().read(true).write(true).open("/dev/kvm")?;
        Vm::new(file.into())?.create_vcpu(0)?;
        Ok(())
    };
    match made() {
        Ok(()) => Ok("/dev/kvm makes machines".to_owned()),
        Err(error) => Err(format!("/dev/kvm: {}", chain(error.as_ref()))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::Named;

    #[test]
    fn what_fails_is_said_in_words() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = root.path().join(name);
            fs::write(&path, content).unwrap();
            path
        };
        let checked = |kernel: &Path, image: &Path| {
            let text = format!("[hypervisor.dragonball]\nkernel = {kernel:?}\nimage = {image:?}\n");
            run(Sourced::read(Some(Named::InPlace(text))))
        };
        let text = file("text", b"not a kernel");
        let (lines, well) = checked(&text, &text);
        assert!(!well);
        let path = text.display();
        assert!(
            lines.contains(&format!("FAIL  kernel: {path}: it is not an ELF file")),
            "{lines}"
        );
        assert!(
            lines.contains(&format!("FAIL  image: {path}: it is not an EROFS")),
            "{lines}"
        );

        let mut image = vec![0; 1024];
        image.extend(EROFS_MAGIC);
        let image = file("image", &image);
        let (lines, _) = checked(Path::new("/nowhere/kernel"), &image);
        assert!(
            lines.contains(&format!("ok    image: {}\n", image.display())),
            "{lines}"
        );
        assert!(
            lines.contains("FAIL  kernel: /nowhere/kernel: No such file"),
            "{lines}"
        );
    }

    #[test]
    fn a_wrong_configuration_fails_alone() {
        let (lines, well) = run(Sourced::read(Some(Named::InPlace("x = 1".to_owned()))));
        assert!(!well);
        assert!(lines.starts_with("FAIL  configuration: "), "{lines}");
        assert!(lines.contains("x: unknown key"), "{lines}");
        assert!(lines.contains("kvm: /dev/kvm"), "{lines}");
    }

    #[test]
    fn all_is_well_when_nothing_fails() {
        let (lines, well) = report(&[("a", Ok("fine".to_owned())), ("b", Ok("too".to_owned()))]);
        assert_eq!(
            (lines.as_str(), well),
            ("ok    a: fine\nok    b: too\n", true)
        );
    }
}
