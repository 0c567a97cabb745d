// SPDX-License-Identifier: Apache-2.0
//! Programs that try out all that a file system may be asked, on a volume: it must do what the host's
//! own file system does, on which they run as well.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use tests::cri::LIMIT;
use tests::cri::messages::ContainerConfig;
use tests::node::Node;
use tests::pod::{Pod, Spec};
use tests::scenario::{Outcome, pod_scenario, say_aloud};
use tests::volume::{Access, Mounted, Volumes, privileged, with_mount};

use super::started;

/// Where containers find program, configuration and volume.
const TOOL: &str = "/tool";
const CONFIGURATION: &str = "/configuration";
const DATA: &str = "/data";
const BIN: &str = "/usr/local/bin";

/// Left out on the volume: the C library knows the most links of a file by the kind of file system, and
/// knows nothing of FUSE.
const LINK_MAX: &str = "link::link_count_max";

/// Operations of one `fsx`: what takes a minute in the dev VM.
const OPERATIONS: &str = "3000";
const ALL_DONE: Duration = Duration::from_secs(900);

const PJDFSTEST: &str = "[features]\nposix_fallocate = {}\nrename_ctime = {}\nutime_now = {}\n\
     utimensat = {}\n[settings]\nnaptime = 0.02\nallow_remount = false\n";

/// Every operation that `fsx` has; the most of those that meet in a page cache.
const FSX: &str = "[weights]\nclose_open = 2\nread = 10\nwrite = 10\nmapread = 10\nmapwrite = 10\n\
     invalidate = 1\ntruncate = 5\nfsync = 1\nfdatasync = 1\nposix_fallocate = 1\npunch_hole = 2\n\
     sendfile = 1\nposix_fadvise = 1\ncopy_file_range = 2\n";

/// A file system of the host's, fresh, with a folder for the pod's volume.
struct Disk {
    volumes: Volumes,
    folder: PathBuf,
    _mounted: Mounted,
}

impl Disk {
    fn new() -> Result<Self> {
        let volumes = Volumes::new()?;
        let image = volumes.volume("test", "image")?.join("ext4");
        fs::File::create(&image)?.set_len(512 << 20)?;
        let mut make = Command::new("mkfs.ext4");
        ensure!(make.arg("-q").arg(&image).status()?.success(), "{make:?}");
        let folder = volumes.volume("empty-dir", "data")?;
        let mounted = Mounted::image(&image, &folder)?;
        Ok(Self {
            volumes,
            folder,
            _mounted: mounted,
        })
    }

    /// A container that runs `script` with a program and its configuration.
    fn container(
        &self,
        pod: &Pod,
        script: &str,
        tool: &str,
        configuration: &str,
    ) -> Result<ContainerConfig> {
        let program = program(tool)?;
        let config = with_mount(
            pod.container("main", script),
            &self.folder,
            DATA,
            Access::Write,
        );
        let config = with_mount(config, &program, TOOL, Access::Read);
        let file = self.file("configuration", configuration)?;
        Ok(with_mount(config, &file, CONFIGURATION, Access::Read))
    }

    fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.volumes.volume("test", "files")?.join(name);
        fs::write(&file, text)?;
        Ok(file)
    }
}

/// A program that `xtask` has built.
fn program(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).with_context(|| format!("{variable} names no program"))?;
    Ok(PathBuf::from(path))
}

/// What became of each test of pjdfstest.
fn verdicts(output: &str) -> Result<BTreeMap<String, String>> {
    let mut verdicts = BTreeMap::new();
    for line in output.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let [name, verdict @ ("ok" | "FAILED" | "skipped")] = words.as_slice()
            && name.contains("::")
        {
            verdicts.insert((*name).to_owned(), (*verdict).to_owned());
        }
    }
    ensure!(!verdicts.is_empty(), "no list of tests: {output}");
    Ok(verdicts)
}

/// What the program says of tests that failed.
fn about(output: &str, names: &[String]) -> String {
    let lines: Vec<_> = output.lines().collect();
    let of = |name: &String| {
        let at = lines
            .iter()
            .position(|line| line.starts_with(name.as_str()));
        let words = lines.iter().skip(at.unwrap_or(lines.len())).take(6);
        words.copied().collect::<Vec<_>>().join("\n")
    };
    names.iter().map(of).collect()
}

fn of(verdicts: &BTreeMap<String, String>, wanted: &str) -> Vec<String> {
    let all = verdicts.iter().filter(|(_, verdict)| *verdict == wanted);
    all.map(|(name, _)| name.clone()).collect()
}

#[test]
fn a_volume_fails_nothing_of_posix_that_the_host_keeps() -> Outcome {
    pod_scenario(|node| {
        let disk = Disk::new()?;
        // The users that some of the tests become.
        let users = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n\
                     tests:x:1999:1999::/:/bin/sh\n";
        let groups = "root:x:0:\nnobody:x:65534:\ntests:x:1999:\n";
        let users = [
            ("/etc/passwd", disk.file("passwd", users)?),
            ("/etc/group", disk.file("group", groups)?),
        ];
        let on_host = on_the_host(&disk, &users)?;
        let pod = Spec::new("posix").privileged().run(node)?;
        let output = posix(&disk, &pod, &users, &[])?;
        let mut in_guest = verdicts(&output)?;
        let host = of(&on_host, "FAILED");
        let further = |verdicts: &BTreeMap<String, String>| -> Vec<String> {
            let failed = of(verdicts, "FAILED").into_iter();
            failed.filter(|name| !host.contains(name)).collect()
        };
        let suspects = further(&in_guest);
        if !suspects.is_empty() {
            // Some look at times, and an emulated clock ticks late: these once more, and slower.
            say_aloud(&format!("pjdfstest: once more: {suspects:?}"))?;
            let output = posix(&disk, &pod, &users, &suspects)?;
            in_guest.extend(verdicts(&output)?);
            let failed = further(&in_guest);
            ensure!(
                failed.is_empty(),
                "the volume fails {failed:?}\n{}",
                about(&output, &failed)
            );
        }
        let (expected, ok) = (of(&on_host, "ok"), of(&in_guest, "ok"));
        say_aloud(&format!(
            "pjdfstest: {} tests; on the host's ext4 {} ok and {} failed: {host:?}; on the volume \
             {} ok",
            on_host.len(),
            expected.len(),
            host.len(),
            ok.len(),
        ))?;
        let skipped: Vec<_> = expected
            .into_iter()
            .filter(|name| !ok.contains(name) && name != LINK_MAX)
            .collect();
        ensure!(on_host.len() > 300, "only {} tests", on_host.len());
        ensure!(
            skipped.is_empty(),
            "the volume does not run {skipped:?}\n{}",
            about(&output, &skipped)
        );
        pod.remove()
    })
}

/// Runs pjdfstest on the volume, all of it or some tests; its output.
fn posix(disk: &Disk, pod: &Pod, users: &[(&str, PathBuf)], only: &[String]) -> Result<String> {
    let (name, configuration) = if only.is_empty() {
        ("all", PJDFSTEST.to_owned())
    } else {
        ("some", PJDFSTEST.replace("0.02", "0.5"))
    };
    let script = format!(
        "echo up; mkdir {DATA}/{name}; umask 0; export PATH={BIN}:$PATH; \
         {TOOL} -c {CONFIGURATION} -p {DATA}/{name} {}",
        only.join(" ")
    );
    let mut config = disk.container(pod, &script, "NUTSHELL_TEST_PJDFSTEST", &configuration)?;
    config.metadata.mut_or_insert_default().name = name.to_owned();
    config.log_path = format!("{name}.log");
    let sleep = Path::new(env!("CARGO_BIN_EXE_in-container"));
    config = with_mount(config, sleep, &format!("{BIN}/sleep"), Access::Read);
    for (place, file) in users {
        config = with_mount(config, file, place, Access::Read);
    }
    let container = started(pod, &privileged(config))?;
    container.wait(ALL_DONE)?;
    // The last lines of a log come after the exit.
    container.wait_for_log("\nSummary: ", LIMIT)?;
    container.log("stdout")
}

/// The same tests on the disk itself.
fn on_the_host(disk: &Disk, users: &[(&str, PathBuf)]) -> Result<BTreeMap<String, String>> {
    fs::create_dir(disk.folder.join("host"))?;
    let mut script = String::from("set -e; umask 0\n");
    for (place, file) in users {
        script += &format!("mount --bind {} {place}\n", file.display());
    }
    // A socket's path has 107 bytes.
    let folder = disk.folder.display();
    script += &format!("mount --bind {folder} /mnt\nexec \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(program("NUTSHELL_TEST_PJDFSTEST")?)
        .arg("-c")
        .arg(disk.file("configuration", PJDFSTEST)?)
        .args(["-p", "/mnt/host"])
        .output()?;
    verdicts(&String::from_utf8_lossy(&output.stdout))
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs `fsx` with options of its own, after a word of the shell's.
fn exercise(node: &Node, name: &str, before: &str, options: &str) -> Result<(i32, String)> {
    let disk = Disk::new()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = now.subsec_nanos();
    say_aloud(&format!("fsx: seed {seed}"))?;
    let pod = Pod::run(node, name)?;
    // The shell stays: the first process of a container would not hear of a `timeout` in it.
    let script = format!(
        "echo up; {before} {TOOL} -q -f {CONFIGURATION} -S {seed} {options} -P /tmp {DATA}/file; exit $?"
    );
    let config = disk.container(&pod, &script, "NUTSHELL_TEST_FSX", FSX)?;
    let container = started(&pod, &config)?;
    let code = container.wait(ALL_DONE)?;
    if code == 0 {
        container.wait_for_log("A-OK", LIMIT)?;
    }
    let words = container.log("stdout")? + &container.log("stderr")?;
    // The host has what the guest had at last.
    ensure!(disk.folder.join("file").exists(), "no file");
    pod.remove()?;
    Ok((code, words))
}

#[test]
fn random_operations_find_what_was_written() -> Outcome {
    pod_scenario(|node| {
        let (code, words) = exercise(node, "fsx", "", &format!("-N {OPERATIONS}"))?;
        ensure!(
            code == 0 && words.contains("A-OK"),
            "exit code {code}: {words}"
        );
        Ok(())
    })
}

/// Not without being asked for: `cargo xtask test --only volumes -- for_ten_minutes`.
#[test]
fn random_operations_for_ten_minutes() -> Outcome {
    pod_scenario(|node| {
        let (code, words) = exercise(node, "fsx-long", "timeout 600", "")?;
        match code {
            // Ended by the clock, not by what it found.
            143 => Ok(()),
            code => bail!("exit code {code}: {words}"),
        }
    })
}
