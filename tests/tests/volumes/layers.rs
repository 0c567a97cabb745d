// SPDX-License-Identifier: Apache-2.0
//! Root file systems of layers in files, as containerd 2.2 and later hands them over from its EROFS
//! snapshotter. Any containerd passes on what a client of its tasks service gives it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;
use tests::bundle::Bundle;
use tests::cri::LIMIT;
use tests::cri::messages::{CreateTaskRequest, Empty, TaskMount, TaskRequest};
use tests::ctr::Ctr;
use tests::disk::{Image, run};
use tests::node::Node;
use tests::procs;
use tests::scenario::{Outcome, pod_vm_scenario};

use crate::MIB;

const CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
];

/// Two layers: a busybox below, and above it one that hides of that.
struct Layers {
    folder: TempDir,
}

impl Layers {
    /// The content of the upper one's files is in a file of its own, a blob.
    fn new(bundle: &Bundle) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("nutshell-layers-")
            .tempdir_in("/var/tmp")?;
        let it = Self { folder };
        let below = bundle.root();
        for name in ["both", "gone", "below"] {
            fs::write(below.join("root").join(name), "from below\n")?;
        }
        // Where a device node can be made.
        let content = tempfile::tempdir_in("/run")?;
        let above = content.path();
        fs::create_dir(above.join("root"))?;
        fs::write(above.join("root/both"), "from above\n")?;
        fs::write(above.join("root/long"), "long ".repeat(100_000))?;
        // Of overlay: what is not there any more.
        run(Command::new("mknod")
            .arg(above.join("root/gone"))
            .args(["c", "0", "0"]))?;
        run(Command::new("mkfs.erofs").arg(it.path("below")).arg(&below))?;
        let blob = format!("--blobdev={}", it.path("blob").display());
        run(Command::new("mkfs.erofs")
            .args([&blob, "--chunksize=4096"])
            .args([it.path("above").as_path(), above]))?;
        // Nothing of them is left elsewhere.
        fs::remove_dir_all(&below)?;
        Ok(it)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn contents(&self) -> Result<Vec<Vec<u8>>> {
        let names = ["below", "above", "blob"].into_iter();
        let read = names.map(|name| Ok(fs::read(self.path(name))?));
        read.collect()
    }

    fn above(&self) -> TaskMount {
        let blob = format!("device={}", self.path("blob").display());
        mount("erofs", &self.path("above"), &["ro", "loop", &blob])
    }

    fn below(&self) -> TaskMount {
        mount("erofs", &self.path("below"), &["ro", "loop"])
    }
}

fn mount(kind: &str, source: &Path, options: &[&str]) -> TaskMount {
    TaskMount {
        type_: kind.to_owned(),
        source: source.display().to_string(),
        options: options.iter().map(|&word| word.to_owned()).collect(),
        ..Default::default()
    }
}

/// The writable layer, and what makes one of it and of mounts after it.
fn writable(image: &Image, lower: &str) -> (TaskMount, TaskMount) {
    let overlay = mount(
        "format/mkdir/overlay",
        Path::new("overlay"),
        &[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            &format!("lowerdir={lower}"),
        ],
    );
    (mount("ext4", &image.path(), &["rw", "loop"]), overlay)
}

/// A container that `ctr` knows, without a task.
fn container(ctr: &Ctr, id: &str, bundle: &Bundle) -> Result<()> {
    let config = bundle.write()?.display().to_string();
    let runtime = ctr.runtime();
    let create = [
        "container",
        "create",
        "--runtime",
        runtime,
        "--config",
        &config,
        id,
    ];
    ctr.call(&create)?.quietly().map(drop)
}

fn create(node: &Node, id: &str, rootfs: Vec<TaskMount>) -> Result<()> {
    let request = CreateTaskRequest {
        container_id: id.to_owned(),
        rootfs,
        ..Default::default()
    };
    let _: Empty = node.cri().task("Create", &request)?;
    Ok(())
}

fn start(node: &Node, id: &str) -> Result<()> {
    let request = TaskRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    let _: Empty = node.cri().task("Start", &request)?;
    Ok(())
}

fn shell(ctr: &Ctr, id: &str, script: &str) -> Result<String> {
    let output = ctr.exec(&[], id, "looks", &["sh", "-c", script])?;
    Ok(output.quietly()?.text())
}

/// The layers are one root: the upper one hides, and its files have their content.
fn expect_joined(ctr: &Ctr, id: &str) -> Result<()> {
    ensure!(shell(ctr, id, "cat /root/both /root/below")? == "from above\nfrom below");
    ensure!(shell(ctr, id, "ls /root")? == "below\nboth\nlong");
    ensure!(shell(ctr, id, "wc -c < /root/long; tail -c 5 /root/long")? == "500000\nlong");
    Ok(())
}

fn end(ctr: &Ctr, id: &str) -> Result<()> {
    ctr.kill(id, "SIGKILL")?;
    ctr.wait_for_status(id, "STOPPED", LIMIT)?;
    ctr.delete(id).map(drop)
}

/// A shell that waits, as root with every capability and every device.
fn bundle(ctr: &Ctr) -> Result<Bundle> {
    let bundle = Bundle::new(ctr, "exec sleep 1000")?.privileged(&CAPABILITIES);
    let all = json!([{ "allow": true, "access": "rwm" }]);
    Ok(bundle.with(json!({ "linux": { "resources": { "devices": all } } })))
}

#[test]
fn layers_on_disks_are_one_root_in_the_guest() -> Outcome {
    let name = "layers_on_disks_are_one_root_in_the_guest";
    pod_vm_scenario(name, |node| {
        let ctr = node.ctr();
        let bundle = bundle(ctr)?;
        let layers = Layers::new(&bundle)?;
        let before = layers.contents()?;
        let image = Image::ext4(64 * MIB, None)?;
        let (upper, overlay) = writable(&image, "{{ overlay 1 2 }}");
        let id = "layers";
        container(ctr, id, &bundle)?;
        create(
            node,
            id,
            vec![upper, layers.above(), layers.below(), overlay],
        )?;
        start(node, id)?;
        let files = procs::vmm(id)?.files()?;
        for path in ["above", "below", "blob"].map(|name| layers.path(name)) {
            let path = path.display().to_string();
            let open = files.iter().filter(|file| file.target == path).count();
            ensure!(open == 1, "{path} is {open} disks: {files:?}");
        }
        expect_joined(ctr, id)?;
        let mounted = shell(ctr, id, "grep ' / ' /proc/mounts")?;
        ensure!(mounted.contains(" / overlay rw"), "{mounted}");
        shell(
            ctr,
            id,
            "echo changed > /root/both; rm /root/below; echo new > /root/new; sync",
        )?;
        ensure!(shell(ctr, id, "cat /root/both; ls /root")? == "changed\nboth\nlong\nnew");

        // The disks themselves, by nodes of the container's own.
        let script = "for disk in /sys/block/vd*; do
                test $(cat $disk/ro) = 1 || continue
                node=/root/${disk##*/}
                mknod $node b $(tr : ' ' < $disk/dev)
                blockdev --setrw $node
                head -c 4 $node > /dev/null && echo read
                dd if=/dev/zero of=$node bs=4k count=1 conv=fsync 2> /dev/null && echo written
                rm $node
            done; :";
        // The guest's own image is the fourth.
        let attempts = ctr.exec(&[], id, "attacks", &["sh", "-c", script])?.text();
        ensure!(attempts == ["read"; 4].join("\n"), "{attempts}");
        end(ctr, id)?;
        ensure!(layers.contents()? == before, "a layer has changed");
        image.check()?;
        let kept = |path: &str| {
            run(Command::new("debugfs")
                .args(["-R", &format!("cat /upper/root/{path}")])
                .arg(image.path()))
        };
        ensure!(kept("new")? == "new" && kept("both")? == "changed");
        Ok(())
    })
}

#[test]
fn layers_below_a_folder_are_one_root_on_the_host() -> Outcome {
    let name = "layers_below_a_folder_are_one_root_on_the_host";
    pod_vm_scenario(name, |node| {
        let ctr = node.ctr();
        let bundle = bundle(ctr)?;
        let layers = Layers::new(&bundle)?;
        let before = layers.contents()?;
        let place = tempfile::tempdir_in("/run")?;
        let folder = |name: &str| -> Result<String> {
            let path = place.path().join(name);
            fs::create_dir(&path)?;
            Ok(path.display().to_string())
        };
        let options = [
            format!("workdir={}", folder("work")?),
            format!("upperdir={}", folder("fs")?),
            "lowerdir={{ overlay 0 1 }}".to_owned(),
        ];
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let overlay = mount("format/mkdir/overlay", Path::new("overlay"), &options);
        let id = "layers-folder";
        container(ctr, id, &bundle)?;
        create(node, id, vec![layers.above(), layers.below(), overlay])?;
        start(node, id)?;
        expect_joined(ctr, id)?;
        shell(ctr, id, "echo changed > /root/both; echo new > /root/new")?;
        let kept = |name: &str| fs::read_to_string(place.path().join("fs/root").join(name));
        ensure!(kept("both")? == "changed\n" && kept("new")? == "new\n");
        end(ctr, id)?;
        ensure!(layers.contents()? == before, "a layer has changed");
        let devices = run(&mut Command::new("losetup"))?;
        ensure!(!devices.contains("nutshell-layers"), "{devices}");
        Ok(())
    })
}

#[test]
fn layers_that_are_wrong_are_one_clear_error() -> Outcome {
    let name = "layers_that_are_wrong_are_one_clear_error";
    pod_vm_scenario(name, |node| {
        let ctr = node.ctr();
        let bundle = bundle(ctr)?;
        let layers = Layers::new(&bundle)?;
        let image = Image::ext4(64 * MIB, None)?;
        let refused = |lower: &[TaskMount], template: &str, words: &[&str]| -> Result<()> {
            let (upper, overlay) = writable(&image, template);
            let mut rootfs = vec![upper];
            rootfs.extend_from_slice(lower);
            rootfs.push(overlay);
            let id = "layers-wrong";
            container(ctr, id, &bundle)?;
            let created = create(node, id, rootfs);
            let error = created
                .err()
                .with_context(|| format!("no error: {words:?}"))?;
            let text = format!("{error:#}");
            ensure!(
                words.iter().all(|word| text.contains(word)),
                "{words:?}: {text}"
            );
            ensure!(!text.contains('\n'), "{text}");
            ctr.call(&["container", "delete", id])?.quietly().map(drop)
        };
        let two = [layers.above(), layers.below()];
        let other = |name: &str| mount("erofs", &layers.path(name), &["ro", "loop"]);
        refused(
            &two,
            "{{ overlay 1 3 }}",
            &["mount 3: ", "mount 3 is not one of the 3"],
        )?;
        refused(&two, "{{ layers }}", &["mount 3: ", "layers"])?;
        refused(
            &[other("none")],
            "{{ mount 1 }}",
            &["erofs", "/none", "No such file"],
        )?;
        fs::write(layers.path("text"), "text".repeat(1024))?;
        refused(
            &[other("text")],
            "{{ mount 1 }}",
            &["/text", "holds no EROFS"],
        )?;
        let squashed = mount("squashfs", &layers.path("below"), &["ro", "loop"]);
        refused(&[squashed], "{{ mount 1 }}", &["mount 1: ", "\"squashfs\""])?;

        let many = vec![layers.below(); 30];
        let words = ["31 disks", "a machine takes 24", "default_size"];
        refused(&many, "{{ overlay 1 30 }}", &words)?;

        // With a machine, from which all has to be taken back: before the guest is up, and by the guest.
        let held = fs::File::open(layers.path("below"))?;
        held.lock()?;
        let words = ["erofs on ", "/below", "somebody else has it open"];
        refused(&two, "{{ overlay 1 2 }}", &words)?;
        drop(held);
        fs::copy(layers.path("below"), layers.path("broken"))?;
        let broken = fs::File::options()
            .write(true)
            .open(layers.path("broken"))?;
        // Features that no kernel knows.
        broken.write_all_at(&[0xff; 4], 1024 + 80)?;
        let words = ["erofs.multi-layer", "layer "];
        refused(&[other("broken")], "{{ mount 1 }}", &words)?;
        // What was left unused by all of these still works.
        container(ctr, "layers-right", &bundle)?;
        let (upper, overlay) = writable(&image, "{{ overlay 1 2 }}");
        create(
            node,
            "layers-right",
            vec![upper, layers.above(), layers.below(), overlay],
        )?;
        start(node, "layers-right")?;
        end(ctr, "layers-right")
    })
}
