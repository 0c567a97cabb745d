// SPDX-License-Identifier: Apache-2.0
//! What developers and databases do to a volume: an archive of many files unpacked, `git status`, a copy, its
//! removal; commits of sqlite and of a database like PostgreSQL. The results are right, and the same as under
//! runc on the same disk, whose times stand beside ours.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::ctr::Ctr;
use tests::disk::Image;
use tests::process::Output;
use tests::scenario::{Outcome, pod_scenario, say_aloud};
use tests::volume::{Mounted, Volumes};

use super::{MIB, PROGRAM};

/// Debian's programs in a container of another image: with their libraries, from the host.
const HOST: [(&str, &str); 3] = [
    ("/usr", "/usr"),
    ("/usr/lib", "/lib"),
    ("/usr/lib64", "/lib64"),
];

/// For all steps: the large tree takes an hour and a half in the dev VM, beside other work.
const ALL_DONE: Duration = Duration::from_secs(3 * 3600);

/// How much is done.
struct Amount {
    files: usize,
    /// Of each database.
    commits: u64,
    /// Of the disk, in MiB.
    size: u64,
}

#[test]
fn a_tree_of_files_and_databases_are_as_under_runc() -> Outcome {
    compare(&Amount {
        files: 1_000,
        commits: 100,
        size: 256,
    })
}

/// Not without being asked for: `cargo xtask test --only volumes -- fifty_thousand`.
#[test]
fn a_tree_of_fifty_thousand_files_is_as_under_runc() -> Outcome {
    compare(&Amount {
        files: 50_000,
        commits: 1_000,
        size: 2048,
    })
}

fn compare(amount: &Amount) -> Outcome {
    // On the suite's node: another containerd that starts meanwhile would count as left behind.
    pod_scenario(|node| {
        let ctr = node.ctr();
        let volumes = Volumes::new()?;
        let given = volumes.volume("test", "given")?;
        let expected = archive(&given, amount.files)?;
        statements(&given.join("commits.sql"), amount.commits)?;
        let runc = ctr.with_runtime("io.containerd.runc.v2");
        // runc first: what both read is in the host's cache then.
        let theirs = run(&runc, "tree-runc", &volumes, &given, amount)?;
        let ours = run(ctr, "tree", &volumes, &given, amount)?;
        for output in [&theirs, &ours] {
            ensure!(
                output.value("FILES")? == amount.files.to_string(),
                "{output}"
            );
            ensure!(output.value("DIGEST")? == expected, "{output}\n{expected}");
            ensure!(
                output.value("ROWS")? == amount.commits.to_string(),
                "{output}"
            );
            ensure!(output.value("INTEGRITY")? == "ok", "{output}");
        }
        let (theirs, ours) = (times(&theirs)?, times(&ours)?);
        ensure!(ours.len() == theirs.len(), "{ours:?} {theirs:?}");
        for (step, time) in &ours {
            let other = theirs.get(step).with_context(|| step.clone())?;
            let ratio = time / other.max(0.01);
            say_aloud(&format!(
                "{} files: {step} {time:.2} s, runc {other:.2} s, ratio {ratio:.1}",
                amount.files
            ))?;
        }
        Ok(())
    })
}

/// Makes a tree of files that git knows, and an archive of it; answers the digest of its content.
fn archive(folder: &Path, files: usize) -> Result<String> {
    let tree = folder.join("source");
    for number in 0..files {
        // Some twenty in a folder, folders in folders, sizes from none to 8 KiB.
        let place = tree.join(format!("{}/{}", number / 400, number / 20));
        fs::create_dir_all(&place)?;
        let line = format!("line of file {number}, which is like no other's\n");
        fs::write(
            place.join(format!("file-{number}")),
            line.repeat(number.saturating_mul(7) % 173),
        )?;
    }
    let script = "set -e; export GIT_CONFIG_GLOBAL=/dev/null; cd source; git init -q; \
                  git config gc.auto 0; git add -A; git -c user.name=n -c user.email=e commit -qm all; git gc -q; \
                  find . -type f ! -path './.git/*' | LC_ALL=C sort | xargs sha256sum | sha256sum; \
                  cd ..; tar cf source.tar source; rm -r source";
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(folder)
        .output()?;
    ensure!(
        output.status.success(),
        "making the archive: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let digest = String::from_utf8(output.stdout)?;
    Ok(digest
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

/// Statements for sqlite, each a transaction of its own.
fn statements(path: &Path, commits: u64) -> Result<()> {
    let mut text = String::from("CREATE TABLE t (n INTEGER PRIMARY KEY, words TEXT);\n");
    for number in 0..commits {
        writeln!(
            text,
            "INSERT INTO t VALUES ({number}, hex(randomblob(100)));"
        )?;
    }
    text += "CREATE INDEX i ON t (words);\nSELECT 'ROWS=' || count(*) FROM t;\n\
             SELECT 'INTEGRITY=' || integrity_check FROM pragma_integrity_check;\n";
    Ok(fs::write(path, text)?)
}

/// All steps in a container, on a fresh disk of the host's.
fn run(ctr: &Ctr, id: &str, volumes: &Volumes, given: &Path, amount: &Amount) -> Result<Output> {
    let disk = Image::ext4(amount.size.saturating_mul(MIB), None)?;
    let folder = volumes.volume("empty-dir", id)?;
    let mounted = Mounted::image(&disk.path(), &folder)?;
    let commits = amount.commits;
    let script = format!(
        r#"set -e
        export GIT_CONFIG_GLOBAL=/dev/null GIT_OPTIONAL_LOCKS=0
        step() {{
            name=$1; shift
            read before _ </proc/uptime
            "$@"
            read after _ </proc/uptime
            echo "STEP $name $before $after"
        }}
        clean() {{ [ -z "$(git -C "$1" status --porcelain)" ]; }}
        content() {{
            cd /data/copy
            echo "FILES=$(find . -type f ! -path './.git/*' | wc -l)"
            find . -type f ! -path './.git/*' | LC_ALL=C sort | xargs sha256sum | sha256sum |
                sed 's/^/DIGEST=/;s/ .*//'
            cd /
        }}
        step unpack tar xf /given/source.tar -C /data
        step status clean /data/source
        step copy cp -a /data/source /data/copy
        step status-of-copy clean /data/copy
        step read content
        step remove rm -r /data/copy
        step sqlite sqlite3 -init /given/commits.sql -batch /data/db .quit
        step database {PROGRAM} commit /data/database {commits}
        {PROGRAM} check /data/database {commits}"#
    );
    let program = PathBuf::from(env!("CARGO_BIN_EXE_in-container"));
    let mut flags = Vec::new();
    let mut mount = |source: &Path, place: &str, access: &str| {
        let source = source.display();
        flags.push("--mount".to_owned());
        flags.push(format!(
            "type=bind,src={source},dst={place},options=rbind:{access}"
        ));
    };
    mount(&folder, "/data", "rw");
    mount(given, "/given", "ro");
    mount(&program, PROGRAM, "ro");
    for (source, place) in HOST {
        mount(Path::new(source), place, "ro");
    }
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let mut running = ctr.start_run(&flags, id, &["sh", "-c", &script])?;
    running.close_stdin();
    let output = running.finish(ALL_DONE)?.exits(0)?;
    // The host has what the container had.
    let checked = Command::new(&program)
        .arg("check")
        .arg(folder.join("database"))
        .arg(commits.to_string())
        .output()?;
    ensure!(
        checked.status.success(),
        "on the host: {}",
        String::from_utf8_lossy(&checked.stderr)
    );
    drop(mounted);
    disk.check()?;
    Ok(output)
}

/// How long each step took, in seconds.
fn times(output: &Output) -> Result<BTreeMap<String, f64>> {
    let text = output.text();
    let mut times = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("STEP ")) {
        let mut words = line.split(' ');
        let mut word = || words.next().context("STEP");
        let (name, before, after) = (word()?.to_owned(), word()?, word()?);
        let (before, after): (f64, f64) = (before.parse()?, after.parse()?);
        times.insert(name, after - before);
    }
    Ok(times)
}
