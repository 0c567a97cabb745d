// SPDX-License-Identifier: Apache-2.0
//! Volumes that a kubelet writes anew while the pod runs: ConfigMap, Secret, projected, downward.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::cri::LIMIT;
use tests::pod::{Container, Pod};
use tests::scenario::{Outcome, pod_scenario};
use tests::volume::{Access, Volumes, with_mount};
use tests::wait::until;

use super::{in_container, started};

/// Within which a change must have arrived.
const SOON: Duration = Duration::from_secs(1);

/// What a kubelet does to publish keys and values: a new folder, a link to it by one rename, then
/// the links of keys, and the old folder's end.
fn publish(folder: &Path, version: u32, keys: &[(&str, &str)]) -> Result<()> {
    let data = format!("..2026_11_28_{version}");
    fs::create_dir(folder.join(&data))?;
    for (key, value) in keys {
        fs::write(folder.join(&data).join(key), value)?;
    }
    let old = fs::read_link(folder.join("..data")).ok();
    symlink(&data, folder.join("..data_tmp"))?;
    fs::rename(folder.join("..data_tmp"), folder.join("..data"))?;
    for (key, _) in keys {
        if !folder.join(key).is_symlink() {
            symlink(format!("..data/{key}"), folder.join(key))?;
        }
    }
    if let Some(old) = old {
        for entry in fs::read_dir(folder.join(&old))? {
            let name = entry?.file_name();
            if !keys.iter().any(|(key, _)| name == *key) {
                fs::remove_file(folder.join(name))?;
            }
        }
        fs::remove_dir_all(folder.join(old))?;
    }
    Ok(())
}

/// Waits until a script in the container prints the words; how long it took.
fn arrives(container: &Container, script: &str, words: &str) -> Result<Duration> {
    let begin = Instant::now();
    let mut last = String::new();
    until(&format!("{words:?} by `{script}`"), LIMIT, || {
        let answer = container.exec(&["sh", "-c", script])?;
        last = String::from_utf8_lossy(&answer.stdout)
            .trim_end()
            .to_owned();
        Ok((last == words).then_some(()))
    })
    .with_context(|| format!("it prints {last:?}"))?;
    Ok(begin.elapsed())
}

/// The clock in the container, read by a loop there: an exec takes longer than a change may.
const CLOCK: &str = "trap 'exit 0' TERM; echo up; last=; while :; do \
     now=$(cat /conf/key 2>/dev/null); [ \"$now\" = \"$last\" ] || echo \"$now\"; last=$now; \
     usleep 20000; done";

#[test]
fn changes_arrive_within_a_second() -> Outcome {
    pod_scenario(|node| {
        for kind in ["configmap", "secret", "projected", "downward-api"] {
            let volumes = Volumes::new()?;
            let folder = volumes.volume(kind, "settings")?;
            publish(&folder, 1, &[("key", "one"), ("other", "x")])?;
            let pod = Pod::run(node, &format!("changes-{kind}"))?;
            let config = pod.container("main", CLOCK);
            let config = with_mount(config, &folder, "/conf", Access::Read);
            let container = started(&pod, &config)?;
            container.wait_for_log("one\n", LIMIT)?;
            for (version, value) in [(2, "two"), (3, "three")] {
                publish(&folder, version, &[("key", value), ("added", value)])?;
                let begin = Instant::now();
                container.wait_for_log(&format!("{value}\n"), LIMIT)?;
                let took = begin.elapsed();
                ensure!(took < SOON, "{kind}: {value} came after {took:?}");
            }
            // What was added is there, what was removed is not, and nothing else.
            let words = container.shell("cat /conf/added; echo; ls -a /conf | tr '\\n' ' '")?;
            let names = ". .. ..2026_11_28_3 ..data added key";
            ensure!(words == format!("three\n{names}"), "{words}");
            let write =
                container.exec(&["sh", "-c", "echo x > /conf/new || echo x > /conf/key"])?;
            ensure!(write.exit_code != 0, "{kind}: written");
            pod.remove()?;
        }
        Ok(())
    })
}

#[test]
fn a_watcher_in_the_container_hears_what_it_would_on_a_host() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("configmap", "settings")?;
        publish(&folder, 1, &[("key", "one")])?;
        let pod = Pod::run(node, "watcher")?;
        // It says that it is up once it watches.
        let config = in_container(&pod, "main", &["watch", "/conf"]);
        let config = with_mount(config, &folder, "/conf", Access::Read);
        let container = started(&pod, &config)?;
        publish(&folder, 2, &[("key", "two")])?;
        let expected = [
            "create ..2026_11_28_2\n",
            "moved ..data\n",
            "delete ..2026_11_28_1\n",
        ];
        for event in expected {
            container.wait_for_log(event, LIMIT)?;
        }
        let events = container.log("stdout")?;
        let at = expected.map(|event| events.find(event));
        ensure!(at.is_sorted(), "in another order: {events}");
        ensure!(container.shell("cat /conf/key")? == "two");
        pod.remove()
    })
}

#[test]
fn other_changes_arrive_as_well() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("configmap", "plain")?;
        fs::write(folder.join("a"), "1")?;
        let pod = Pod::run(node, "plain")?;
        let config = with_mount(
            pod.container("main", super::WAITS),
            &folder,
            "/conf",
            Access::Read,
        );
        let container = started(&pod, &config)?;
        // Not as a kubelet does: in place, by another's rename, in a folder that is new.
        fs::write(folder.join("a"), "2")?;
        arrives(&container, "cat /conf/a", "2")?;
        fs::create_dir_all(folder.join("d/e"))?;
        arrives(&container, "ls /conf/d", "e")?;
        fs::write(folder.join("d/e/f"), "3")?;
        arrives(&container, "cat /conf/d/e/f", "3")?;
        fs::rename(folder.join("a"), folder.join("b"))?;
        arrives(&container, "ls /conf | tr '\\n' ' '", "b d")?;
        fs::remove_dir_all(folder.join("d"))?;
        arrives(&container, "ls /conf", "b")?;
        container.stop(30)?;
        pod.remove()
    })
}

#[test]
fn a_volume_too_large_to_copy_is_followed_too() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("configmap", "large")?;
        let large = fs::File::create(folder.join("large"))?;
        large.set_len(9 << 20)?;
        publish(&folder, 1, &[("key", "one")])?;
        let pod = Pod::run(node, "large")?;
        let config = pod.container("main", CLOCK);
        let config = with_mount(config, &folder, "/conf", Access::Read);
        let container = started(&pod, &config)?;
        container.wait_for_log("one\n", LIMIT)?;
        publish(&folder, 2, &[("key", "two")])?;
        let begin = Instant::now();
        container.wait_for_log("two\n", LIMIT)?;
        let took = begin.elapsed();
        ensure!(took < SOON, "after {took:?}");
        pod.remove()
    })
}
