// SPDX-License-Identifier: Apache-2.0
//! Events for containerd: queued where they happen, delivered in that order.
//!
//! One task delivers one event at a time and goes on to the next only when containerd has it, so
//! an event comes after everything that caused it. While containerd is away (it may be restarted
//! beside running shims) events wait.

use std::fmt::Debug;
use std::time::{Duration, SystemTime};

use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use protocols::containerd::forward::{Envelope, ForwardRequest};
use protocols::containerd::forward_ttrpc::EventsClient;
use protocols::containerd::task_events::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

/// How long containerd may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Pauses between tries; their sum is how long an event waits for a containerd that is away.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const TRIES: u32 = 40;

/// An event of a task; the topic and the name on the wire go with the type.
pub(crate) trait TaskEvent: Message + Debug {
    const TOPIC: &'static str;
    const TYPE: &'static str;
}

macro_rules! task_events {
    ($($event:ident => $topic:literal),+ $(,)?) => {
        $(impl TaskEvent for $event {
            const TOPIC: &'static str = $topic;
            const TYPE: &'static str = concat!("containerd.events.", stringify!($event));
        })+
    };
}

task_events! {
    TaskCreate => "/tasks/create",
    TaskStart => "/tasks/start",
    TaskExit => "/tasks/exit",
    TaskDelete => "/tasks/delete",
    TaskOOM => "/tasks/oom",
    TaskExecAdded => "/tasks/exec-added",
    TaskExecStarted => "/tasks/exec-started",
    TaskPaused => "/tasks/paused",
    TaskResumed => "/tasks/resumed",
}

enum Item {
    Event(Envelope),
    Flush(oneshot::Sender<()>),
}

/// The queue's entrance.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

impl Publisher {
    /// Starts delivery to containerd's ttrpc socket; without one events are only logged.
    pub(crate) fn start(namespace: &str, address: Option<String>) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        tokio::spawn(deliver(address, items));
        Self {
            namespace: namespace.to_owned(),
            queue,
        }
    }

    /// For what happens without containerd's knowledge.
    pub(crate) fn to_nobody() -> Self {
        let (queue, _) = mpsc::unbounded_channel();
        let namespace = String::new();
        Self { namespace, queue }
    }

    /// A queue that a test reads.
    #[cfg(test)]
    pub(crate) fn to_test() -> (Self, Published) {
        let (queue, items) = mpsc::unbounded_channel();
        let namespace = "test".to_owned();
        (Self { namespace, queue }, Published { items })
    }

    /// Puts an event into the queue.
    pub(crate) fn publish<E: TaskEvent>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                warn!(topic = E::TOPIC, %error, "event can't be encoded");
                return;
            }
        };
        debug!(topic = E::TOPIC, ?event, "event");
        let envelope = Envelope {
            timestamp: MessageField::some(SystemTime::now().into()),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(Any {
                type_url: E::TYPE.to_owned(),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        };
        // Delivery runs as long as the process.
        let _ = self.queue.send(Item::Event(envelope));
    }

    /// Waits until all that was published is delivered, or the time is over.
    pub(crate) async fn flush(&self, limit: Duration) {
        let (done, waiting) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() && timeout(limit, waiting).await.is_err() {
            warn!("events were not delivered");
        }
    }
}

/// What was published, for tests.
#[cfg(test)]
pub(crate) struct Published {
    items: mpsc::UnboundedReceiver<Item>,
}

#[cfg(test)]
impl Published {
    /// The topics since the last call.
    pub(crate) fn topics(&mut self) -> Vec<String> {
        let mut topics = Vec::new();
        while let Ok(item) = self.items.try_recv() {
            if let Item::Event(envelope) = item {
                topics.push(envelope.topic);
            }
        }
        topics
    }
}

async fn deliver(address: Option<String>, mut items: mpsc::UnboundedReceiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Flush(done) => {
                let _ = done.send(());
            }
            Item::Event(envelope) => {
                let Some(address) = &address else { continue };
                let topic = envelope.topic.clone();
                let request = ForwardRequest {
                    envelope: MessageField::some(envelope),
                    ..ForwardRequest::default()
                };
                let mut pause = FIRST_PAUSE;
                for attempt in 1..=TRIES {
                    match forward(&mut client, address, &request).await {
                        Ok(()) => break,
                        Err(error) if attempt == TRIES => {
                            warn!(topic, %error, "event given up");
                        }
                        Err(error) => {
                            debug!(topic, %error, "event not delivered yet");
                            client = None;
                            sleep(pause).await;
                            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
                        }
                    }
                }
            }
        }
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let client = match client {
        Some(client) => client,
        None => {
            let connection = ttrpc::r#async::Client::connect(&format!("unix://{address}")).await?;
            client.insert(EventsClient::new(connection))
        }
    };
    let nanoseconds = i64::try_from(DEADLINE.as_nanos()).unwrap_or(i64::MAX);
    client
        .forward(ttrpc::context::with_timeout(nanoseconds), request)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex};

    use protobuf::well_known_types::empty::Empty;
    use protocols::containerd::forward_ttrpc::{Events, create_events};
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// A containerd that refuses each event once.
    #[derive(Default)]
    struct Containerd {
        refused: Mutex<HashMap<String, ()>>,
        received: Mutex<Vec<(String, String)>>,
    }

    #[async_trait::async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap();
            let event = envelope.event.unwrap();
            if self
                .refused
                .lock()
                .unwrap()
                .insert(event.type_url.clone(), ())
                .is_none()
            {
                return Err(ttrpc::Error::Others("busy".to_owned()));
            }
            let topic = envelope.topic;
            self.received.lock().unwrap().push((topic, event.type_url));
            Ok(Empty::new())
        }
    }

    #[tokio::test]
    async fn events_arrive_once_and_in_order_though_containerd_comes_late() {
        let root = tempfile::tempdir().unwrap();
        let socket = root
            .path()
            .join("containerd.sock.ttrpc")
            .display()
            .to_string();
        let publisher = Publisher::start("default", Some(socket.clone()));
        publisher.publish(&TaskCreate::default());
        publisher.publish(&TaskStart::default());
        publisher.publish(&TaskExit::default());
        sleep(Duration::from_millis(20)).await;

        let containerd = Arc::new(Containerd::default());
        let mut server = Server::new()
            .bind(&format!("unix://{socket}"))
            .unwrap()
            .register_service(create_events(containerd.clone()));
        server.start().await.unwrap();
        publisher.flush(Duration::from_secs(10)).await;
        let received: Vec<_> = containerd.received.lock().unwrap().clone();
        let expected = [
            ("create", "TaskCreate"),
            ("start", "TaskStart"),
            ("exit", "TaskExit"),
        ]
        .map(|(topic, name)| {
            (
                format!("/tasks/{topic}"),
                format!("containerd.events.{name}"),
            )
        });
        assert_eq!(received, expected);
    }
}
