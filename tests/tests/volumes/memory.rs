// SPDX-License-Identifier: Apache-2.0
//! Volumes in memory: where a kubelet mounts a tmpfs or hugetlbfs for a pod.

use anyhow::ensure;
use tests::cri::messages::HugepageLimit;
use tests::pod::Pod;
use tests::scenario::{Outcome, pod_scenario, pod_vm_scenario};
use tests::volume::{Access, Mounted, Volumes, with_mount};

use super::{WAITS, refused, started};

#[test]
fn memory_has_its_size_and_lives_as_long_as_the_pod() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "fast")?;
        let _mounted = Mounted::new("tmpfs", "size=24m,mode=2775,gid=77", &folder)?;
        let pod = Pod::run(node, "memory")?;
        let config =
            |name: &str, access| with_mount(pod.container(name, WAITS), &folder, "/fast", access);
        let first = started(&pod, &config("first", Access::Write))?;
        let words = first.shell("stat -c '%a %g' /fast; df -k /fast | awk 'END {print $2}'")?;
        ensure!(words == "2775 77\n24576", "{words}");
        first.shell("echo kept > /fast/file")?;
        let full = first.exec(&["dd", "if=/dev/zero", "of=/fast/big", "bs=1M", "count=32"])?;
        let words = String::from_utf8_lossy(&full.stderr);
        ensure!(
            full.exit_code == 1 && words.contains("No space left"),
            "{words}"
        );
        // Another that may only read, and the first once more: nothing is lost between them.
        first.stop(30)?;
        first.remove()?;
        let second = started(&pod, &config("second", Access::Read))?;
        ensure!(second.shell("cat /fast/file")? == "kept");
        let write = second.exec(&["touch", "/fast/more"])?;
        ensure!(write.exit_code == 1, "written: {write:?}");
        let again = started(&pod, &config("again", Access::Write))?;
        again.shell("rm /fast/big; echo more >> /fast/file")?;
        ensure!(second.shell("cat /fast/file")? == "kept\nmore");
        pod.remove()
    })
}

#[test]
fn a_folder_of_a_volume_in_memory_is_a_part_of_it() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "fast")?;
        let _mounted = Mounted::new("tmpfs", "size=8m", &folder)?;
        // What a kubelet does for a subPath.
        std::fs::create_dir(folder.join("sub"))?;
        let part = volumes.subpath("fast", "second", 0)?;
        let _part = Mounted::bind(&folder.join("sub"), &part)?;
        let pod = Pod::run(node, "part")?;
        let whole = with_mount(
            pod.container("first", WAITS),
            &folder,
            "/fast",
            Access::Write,
        );
        let part = with_mount(
            pod.container("second", WAITS),
            &part,
            "/part",
            Access::Write,
        );
        let second = started(&pod, &part)?;
        second.shell("echo here > /part/file")?;
        let first = started(&pod, &whole)?;
        ensure!(first.shell("cat /fast/sub/file")? == "here");
        // Who has the whole must not lead others out of it.
        first.shell("mv /fast/sub /fast/away; ln -s / /fast/sub")?;
        let part = with_mount(
            pod.container("third", WAITS),
            &volumes.subpath("fast", "second", 0)?,
            "/part",
            Access::Write,
        );
        let words = refused(&pod, &part)?;
        ensure!(words.contains("sub"), "{words}");
        pod.remove()
    })
}

#[test]
fn a_tmpfs_does_not_cost_the_host_memory_of_its_own() -> Outcome {
    let name = "a_tmpfs_does_not_cost_the_host_memory_of_its_own";
    pod_vm_scenario(name, |node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "fast")?;
        let _mounted = Mounted::new("tmpfs", "size=24m", &folder)?;
        let pod = Pod::run(node, "inside")?;
        let config = with_mount(
            pod.container("main", WAITS),
            &folder,
            "/fast",
            Access::Write,
        );
        let container = started(&pod, &config)?;
        container.shell("dd if=/dev/zero of=/fast/big bs=1M count=16 2>/dev/null")?;
        let used = rustix::fs::statfs(&folder)?;
        ensure!(used.f_blocks == used.f_bfree, "the host's own is used");
        pod.remove()
    })
}

#[test]
fn huge_pages_are_there_as_many_as_the_limit_says() -> Outcome {
    let name = "huge_pages_are_there_as_many_as_the_limit_says";
    pod_vm_scenario(name, |node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "huge")?;
        let _mounted = Mounted::new("hugetlbfs", "pagesize=2M", &folder)?;
        let pod = Pod::run(node, "huge")?;
        let mut config = with_mount(
            pod.container("main", WAITS),
            &folder,
            "/huge",
            Access::Write,
        );
        let words = refused(&pod, &config)?;
        ensure!(
            words.contains("no limit of huge pages of 2048 kB"),
            "{words}"
        );
        let linux = config.linux.mut_or_insert_default();
        linux.resources.mut_or_insert_default().hugepage_limits = vec![HugepageLimit {
            page_size: "2MB".to_owned(),
            limit: 16 << 20,
            ..Default::default()
        }];
        config.metadata.mut_or_insert_default().attempt = 1;
        let container = started(&pod, &config)?;
        let words = container.shell("awk '/HugePages_Total/ {print $2}' /proc/meminfo")?;
        ensure!(words == "8", "{words} pages");
        let words = container.shell("stat -f -c '%T %S %b' /huge")?;
        ensure!(words.ends_with(" 2097152 8"), "{words}");
        container.stop(30)?;
        container.remove()?;
        pod.remove()
    })
}
