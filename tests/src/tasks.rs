// SPDX-License-Identifier: Apache-2.0
//! containerd's own service for tasks: each of its calls is one of the shim's.

use anyhow::{Context, Result};
use protobuf::Message;
use serde_json::Value;

use crate::cri::LIMIT;
use crate::cri::messages::{
    Empty, KillRequest, MetricsRequest, MetricsResponse, TaskMetrics, TaskRequest,
};
use crate::node::Node;
use crate::process::Running;
use crate::wait::until;

/// A signal that nobody minds.
const SIGWINCH: u32 = 28;

impl Node {
    /// Asks a shim for a task's state.
    pub fn state(&self, id: &str) -> Result<()> {
        let request = TaskRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let _: Empty = self.cri().task("Get", &request)?;
        Ok(())
    }

    /// Asks a shim for a task's statistics.
    pub fn metrics(&self, id: &str) -> Result<TaskMetrics> {
        let request = MetricsRequest {
            filters: vec![format!("id=={id}")],
            ..Default::default()
        };
        let answer: MetricsResponse = self.cri().task("Metrics", &request)?;
        let metric = answer.metrics.into_iter().find(|metric| metric.id == id);
        let metric = metric.with_context(|| format!("no metrics of {id}"))?;
        Ok(TaskMetrics::parse_from_bytes(&metric.data.value)?)
    }

    /// Has a shim send a signal that changes nothing.
    pub fn nudge(&self, id: &str) -> Result<()> {
        let request = KillRequest {
            container_id: id.to_owned(),
            signal: SIGWINCH,
            ..Default::default()
        };
        let _: Empty = self.cri().task("Kill", &request)?;
        Ok(())
    }

    /// Begins to listen to containerd's events.
    pub fn events(&self) -> Result<Events> {
        let running = self.ctr().start(&["events"])?;
        let image = self.ctr().image();
        // It listens once it has seen an event of our making.
        let mut number: u32 = 0;
        until("the first event", LIMIT, || {
            number = number.saturating_add(1);
            let label = format!("listening={number}");
            self.ctr()
                .call(&["images", "label", image, &label])?
                .exits(0)?;
            let seen = String::from_utf8_lossy(&running.stdout()).contains("/images/update");
            Ok(seen.then_some(()))
        })?;
        Ok(Events { running })
    }
}

/// containerd's events from some moment on.
#[derive(Debug)]
pub struct Events {
    running: Running,
}

/// An event about a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// What it says.
    pub body: Value,
}

impl Event {
    /// A field that is text.
    #[must_use]
    pub fn text(&self, name: &str) -> &str {
        self.body.get(name).and_then(Value::as_str).unwrap_or("")
    }
}

impl Events {
    /// The tasks' events so far.
    pub fn tasks(&self) -> Result<Vec<Event>> {
        let bytes = self.running.stdout();
        let text = String::from_utf8_lossy(&bytes);
        let mut events = Vec::new();
        // A line that is still being written has no end yet.
        for line in text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
        {
            let Some((_, rest)) = line.split_once(" /tasks/") else {
                continue;
            };
            let (topic, body) = rest.split_once(' ').context("an event without a body")?;
            events.push(Event {
                topic: topic.to_owned(),
                body: serde_json::from_str(body).with_context(|| line.to_owned())?,
            });
        }
        Ok(events)
    }

    /// Waits until an event is among them.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<()> {
        until(&format!("the event {what}"), LIMIT, || {
            Ok(self.tasks()?.iter().any(&wanted).then_some(()))
        })
        .with_context(|| format!("{:#?}", self.tasks()))
    }
}
