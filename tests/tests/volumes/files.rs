// SPDX-License-Identifier: Apache-2.0
//! Folders and files of the host in containers.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::ensure;
use tests::cri::messages::MountPropagation;
use tests::pod::{Pod, Spec};
use tests::scenario::{Outcome, pod_scenario, pod_vm_scenario};
use tests::volume::{Access, Mounted, Volumes, privileged, with_mount};

use super::{PROGRAM, WAITS, in_container, refused, started};

#[test]
fn a_folder_is_the_same_for_containers_and_the_host() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let empty = volumes.volume("empty-dir", "data")?;
        let pod = Pod::run(node, "folder")?;
        let config = |name: &str, place: &str| {
            with_mount(pod.container(name, WAITS), &empty, place, Access::Write)
        };
        let first = started(&pod, &config("first", "/data"))?;
        let second = started(&pod, &config("second", "/srv/other"))?;
        first.shell("echo one > /data/a; mkdir /data/d; ln -s a /data/l; chmod 640 /data/a")?;
        second.shell(
            "echo two >> /srv/other/l; chown 7:8 /srv/other/a; mv /srv/other/d /srv/other/e",
        )?;
        ensure!(first.shell("cat /data/a; ls /data")? == "one\ntwo\na\ne\nl");
        ensure!(fs::read_to_string(empty.join("a"))? == "one\ntwo\n");
        let metadata = fs::metadata(empty.join("a"))?;
        let (uid, gid, mode) = (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777);
        ensure!((uid, gid, mode) == (7, 8, 0o640), "{uid} {gid} {mode:o}");
        fs::write(empty.join("from-host"), "three\n")?;
        ensure!(second.shell("cat /srv/other/from-host")? == "three");
        // It stays what it was when a container comes back.
        first.stop(30)?;
        first.remove()?;
        let mut again = config("first", "/data");
        again.metadata.mut_or_insert_default().attempt = 1;
        let again = started(&pod, &again)?;
        ensure!(again.shell("cat /data/a /data/from-host")? == "one\ntwo\nthree");
        pod.remove()?;
        ensure!(fs::read_to_string(empty.join("a"))? == "one\ntwo\n");
        Ok(())
    })
}

#[test]
fn read_only_is_kept_from_root_with_every_capability() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "kept")?;
        fs::create_dir(folder.join("below"))?;
        fs::write(folder.join("file"), "as it was\n")?;
        let pod = Spec::new("read-only").privileged().run(node)?;
        let config = with_mount(pod.container("main", WAITS), &folder, "/kept", Access::Read);
        let config = with_mount(config, &folder.join("file"), "/one-file", Access::Read);
        let container = started(&pod, &privileged(config))?;
        ensure!(container.shell("cat /kept/file /one-file")? == "as it was\nas it was");
        let attempts = [
            "echo x > /kept/new",
            "echo x >> /kept/file",
            "echo x > /one-file",
            "rm /kept/file",
            "mv /kept/file /kept/other",
            "mkdir /kept/below/x",
            "chmod 777 /kept/file",
            "chown 5 /kept",
            "ln -s x /kept/link",
            "touch -d 2000-01-01 /kept/file",
        ];
        for remount in [
            ":",
            "mount -o remount,bind,rw /kept /kept; mount -o remount,bind,rw /one-file",
        ] {
            // Whether the guest's own mount gives way is no matter: what is behind does not.
            container.exec(&["sh", "-c", remount])?;
            for attempt in attempts {
                let answer = container.exec(&["sh", "-c", attempt])?;
                ensure!(
                    answer.exit_code != 0,
                    "after `{remount}`, `{attempt}` went through"
                );
            }
        }
        ensure!(fs::read_to_string(folder.join("file"))? == "as it was\n");
        ensure!(fs::read_dir(&folder)?.count() == 2);
        pod.remove()
    })
}

#[test]
fn mounts_of_the_host_come_in_where_they_are_asked_for() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "tree")?;
        for name in ["before", "after"] {
            fs::create_dir(folder.join(name))?;
        }
        // A mount that tells others of what is mounted in it, as a node's own root does.
        let _tree = Mounted::shared(&folder)?;
        let _before = Mounted::new("tmpfs", "size=1m", &folder.join("before"))?;
        fs::write(folder.join("before/file"), "there before\n")?;
        let pod = Pod::run(node, "propagation")?;
        let config = |name: &str, propagation: MountPropagation| {
            let config = pod.container(name, WAITS);
            let mut config = with_mount(config, &folder, "/tree", Access::Write);
            if let Some(mount) = config.mounts.first_mut() {
                mount.propagation = propagation.into();
            }
            config
        };
        let apart = config("apart", MountPropagation::PROPAGATION_PRIVATE);
        let following = config("following", MountPropagation::PROPAGATION_HOST_TO_CONTAINER);
        let (apart, following) = (started(&pod, &apart)?, started(&pod, &following)?);
        let _after = Mounted::new("tmpfs", "size=1m", &folder.join("after"))?;
        fs::write(folder.join("after/file"), "there after\n")?;
        let script = "cat /tree/before/file; cat /tree/after/file 2>/dev/null; true";
        ensure!(apart.shell(script)? == "there before");
        ensure!(following.shell(script)? == "there before\nthere after");
        pod.remove()
    })
}

#[test]
fn mounts_of_a_guest_do_not_go_out() -> Outcome {
    pod_vm_scenario("mounts_of_a_guest_do_not_go_out", |node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "tree")?;
        let _tree = Mounted::shared(&folder)?;
        let pod = Spec::new("bidirectional").privileged().run(node)?;
        let config = pod.container("main", WAITS);
        let mut config = privileged(with_mount(config, &folder, "/tree", Access::Write));
        if let Some(mount) = config.mounts.first_mut() {
            mount.propagation = MountPropagation::PROPAGATION_BIDIRECTIONAL.into();
        }
        let words = refused(&pod, &config)?;
        ensure!(
            words.contains("mounts: /tree: ") && words.contains("propagation"),
            "{words}"
        );
        pod.remove()
    })
}

#[test]
fn containers_see_each_others_locks() -> Outcome {
    pod_scenario(|node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "data")?;
        fs::write(folder.join("file"), "x")?;
        let pod = Pod::run(node, "locks")?;
        let with_volume = |config, place| with_mount(config, &folder, place, Access::Write);
        let holder = in_container(&pod, "holder", &["lock", "/data/file"]);
        let holder = started(&pod, &with_volume(holder, "/data"))?;
        let other = in_container(&pod, "other", &["watch", "/other"]);
        let other = started(&pod, &with_volume(other, "/other"))?;
        let asks = |words: &str| {
            let answer = other.exec(&[PROGRAM, "locked", "/other/file"])?;
            let heard = String::from_utf8_lossy(&answer.stdout).into_owned();
            ensure!(heard == words, "{heard}");
            anyhow::Ok(())
        };
        asks("flock: locked\nfcntl: locked\n")?;
        holder.stop(0)?;
        asks("flock: free\nfcntl: free\n")?;
        pod.remove()
    })
}

#[test]
fn device_nodes_are_made_where_the_host_opens_none() -> Outcome {
    pod_vm_scenario("device_nodes_are_made_where_the_host_opens_none", |node| {
        let volumes = Volumes::new()?;
        let folder = volumes.volume("empty-dir", "data")?;
        let pod = Spec::new("devices").privileged().run(node)?;
        let config = with_mount(
            pod.container("main", WAITS),
            &folder,
            "/data",
            Access::Write,
        );
        let container = started(&pod, &privileged(config))?;
        // Its own root, which nobody else sees.
        container.shell("mknod /node b 7 0; test -b /node")?;
        // A folder where any user of the host could open the node.
        let answer = container.exec(&["mknod", "/data/node", "b", "7", "0"])?;
        let words = String::from_utf8_lossy(&answer.stderr);
        ensure!(words.contains("not permitted"), "{words}");
        ensure!(fs::read_dir(&folder)?.next().is_none());
        pod.remove()
    })
}
