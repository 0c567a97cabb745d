// SPDX-License-Identifier: Apache-2.0
//! The files of `tests/k8s/` are what they say: their pods run as a kubelet would run them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tests::cri::LIMIT;
use tests::cri::messages::{ContainerConfig, LinuxContainerResources};
use tests::node::Node;
use tests::pod::{Container, Pod, Spec};
use tests::scenario::{Outcome, pod_scenario};

/// The part of the Kubernetes API that the examples use, and no more of it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Manifest<T> {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: T,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RuntimeClass {
    api_version: String,
    kind: String,
    metadata: Metadata,
    handler: String,
    overhead: BTreeMap<String, BTreeMap<String, String>>,
    scheduling: Value,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PodSpec {
    runtime_class_name: String,
    #[serde(default)]
    share_process_namespace: bool,
    #[serde(default)]
    init_containers: Vec<ContainerSpec>,
    containers: Vec<ContainerSpec>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContainerSpec {
    name: String,
    image: String,
    command: Vec<String>,
    #[serde(default)]
    ports: Vec<Value>,
    #[serde(default)]
    resources: Resources,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resources {
    limits: BTreeMap<String, String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("k8s")
}

fn read<T: DeserializeOwned>(name: &str) -> Result<T> {
    let path = folder().join(name);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_norway::from_str(&text).with_context(|| path.display().to_string())
}

fn class() -> Result<RuntimeClass> {
    let class: RuntimeClass = read("runtimeclass.yaml")?;
    ensure!(
        (class.api_version.as_str(), class.kind.as_str()) == ("node.k8s.io/v1", "RuntimeClass"),
        "{class:?}"
    );
    ensure!(class.overhead.contains_key("podFixed"), "{class:?}");
    ensure!(class.scheduling.is_object(), "{class:?}");
    Ok(class)
}

/// A quantity of the Kubernetes API in whole units of a thousandth (CPUs) or of a byte.
fn quantity(text: &str) -> Result<i64> {
    let units = [("Mi", 1 << 20), ("Gi", 1 << 30), ("m", 1)];
    for (suffix, unit) in units {
        if let Some(number) = text.strip_suffix(suffix) {
            return number.parse::<i64>()?.checked_mul(unit).context("too much");
        }
    }
    text.parse::<i64>()?.checked_mul(1000).context("too much")
}

/// A pod of an example, run as far as a kubelet runs it: its init containers are done.
fn run(node: &Node, name: &str) -> Result<(Pod, Vec<Container>)> {
    let manifest: Manifest<PodSpec> = read(name)?;
    ensure!(
        (manifest.api_version.as_str(), manifest.kind.as_str()) == ("v1", "Pod"),
        "{manifest:?}"
    );
    let class = class()?;
    ensure!(
        manifest.spec.runtime_class_name == class.metadata.name,
        "{name} wants the runtime class {}",
        manifest.spec.runtime_class_name
    );
    let mut spec = Spec::new(&manifest.metadata.name);
    if node.ctr().has_vm() {
        spec = spec.handled_by(&class.handler);
    }
    if manifest.spec.share_process_namespace {
        spec = spec.with_shared_processes();
    }
    let pod = spec.run(node)?;
    for container in &manifest.spec.init_containers {
        let container = pod.start(&config(node, &pod, container)?)?;
        let code = container.wait(LIMIT)?;
        ensure!(code == 0, "an init container's exit code is {code}");
    }
    let mut containers = Vec::new();
    for container in &manifest.spec.containers {
        containers.push(pod.start(&config(node, &pod, container)?)?);
    }
    Ok((pod, containers))
}

fn config(node: &Node, pod: &Pod, spec: &ContainerSpec) -> Result<ContainerConfig> {
    ensure!(spec.image == node.ctr().image(), "{spec:?}");
    ensure!(spec.ports.iter().all(Value::is_object), "{spec:?}");
    let argv: Vec<&str> = spec.command.iter().map(String::as_str).collect();
    let mut config = pod.container_of(&spec.name, &argv);
    let mut resources = LinuxContainerResources::default();
    for (name, limit) in &spec.resources.limits {
        let limit = quantity(limit)?;
        match name.as_str() {
            "memory" => resources.memory_limit_in_bytes = limit,
            "cpu" => {
                resources.cpu_period = 100_000;
                resources.cpu_quota = limit.checked_mul(100).context("too much")?;
            }
            _ => anyhow::bail!("no limit is named {name}"),
        }
    }
    config.linux.mut_or_insert_default().resources = Some(resources).into();
    Ok(config)
}

#[test]
fn the_server_of_the_examples_serves() -> Outcome {
    pod_scenario(|node| {
        let (pod, containers) = run(node, "pod-server.yaml")?;
        let server = containers.first().context("no container")?;
        let page = server.shell(
            "until wget -q -O - http://localhost:8080/page 2>/dev/null; do sleep 0.1; done",
        )?;
        ensure!(page == "written by server", "{page}");
        pod.remove()
    })
}

#[test]
fn the_sidecar_of_the_examples_watches() -> Outcome {
    pod_scenario(|node| {
        let (pod, containers) = run(node, "pod-sidecar.yaml")?;
        let watch = containers.last().context("no container")?;
        watch.wait_for_log("sleep 1000\n", LIMIT)?;
        pod.remove()
    })
}
