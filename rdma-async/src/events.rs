//! Asynchronous events: what a device tells outside of completions.

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use futures_core::Stream;
use parking_lot::Mutex;
use rdma_core::{AsyncEvents, Event, EventKind};
use tokio::{
    io::unix::AsyncFd,
    sync::mpsc::{self, error::TrySendError},
    task::AbortHandle,
};

use crate::{error::Ended, fd, lane::Watched, trace};

/// Events that wait for a subscriber at most.
const MOST: usize = 256;

/// The asynchronous events of a domain's device (`man ibv_get_async_event`), from the time of [`Domain::events`](crate::Domain::events) on,
/// as a `Stream`; or, without that trait, with [`next`](Events::next). It ends with the domain, or with the runtime that the domain
/// was opened on.
///
/// Every subscriber gets every event. One that leaves more than 256 of them unread misses the next ones: see
/// [`missed`](Events::missed). What is fatal to a queue pair, or to all of them, has ended them before it comes here
/// ([`Ended::Event`]).
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<Event>,
    missed: Arc<AtomicU64>,
}

impl Events {
    /// The next event; `None` when there will be none: the domain is gone, its runtime is, or the events cannot be read.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped call loses no event.
    pub async fn next(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    /// Events that were dropped because too many were unread.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.load(Relaxed)
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.receiver.poll_recv(cx)
    }
}

/// Reads the events of a context, ends what they are fatal to, and tells the subscribers.
pub(crate) struct Watchman {
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[derive(Default)]
struct Shared {
    pairs: Mutex<HashMap<u32, Weak<dyn Watched>>>,
    subscribers: Mutex<Subscribers>,
}

#[derive(Default)]
struct Subscribers {
    list: Vec<(mpsc::Sender<Event>, Arc<AtomicU64>)>,
    /// Nobody reads events any more.
    is_over: bool,
}

/// What reads the events: it ends when the task does, or is dropped with its runtime, begun or not.
struct Reading(Arc<Shared>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Watchman {
    /// Starts it, on the current runtime. A provider without a descriptor for its events has no events.
    pub(crate) fn spawn(context: &rdma_core::Context) -> Watchman {
        let shared = Arc::new(Shared::default());
        let fd = context.events().and_then(fd::register);
        let reading = Reading(Arc::clone(&shared));
        let task = tokio::spawn(async move {
            match fd {
                Ok(fd) => reading.0.serve(fd).await,
                Err(error) => trace::events_failed(&error),
            }
        });
        Watchman { shared, task: task.abort_handle() }
    }

    /// Ends `pair`, whose queue pair has this number, when it fails.
    pub(crate) fn watch(&self, qp_num: u32, pair: Weak<dyn Watched>) {
        let mut pairs = self.shared.pairs.lock();
        pairs.insert(qp_num, pair);
        // Those that are gone go when there are twice as many as before.
        if pairs.len().is_power_of_two() {
            pairs.retain(|_, pair| pair.strong_count() > 0);
        }
    }

    pub(crate) fn subscribe(&self) -> Events {
        let (sender, receiver) = mpsc::channel(MOST);
        let missed = Arc::new(AtomicU64::new(0));
        let mut subscribers = self.shared.subscribers.lock();
        if !subscribers.is_over {
            subscribers.list.push((sender, Arc::clone(&missed)));
        }
        drop(subscribers);
        Events { receiver, missed }
    }
}

impl Drop for Watchman {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.close();
    }
}

impl Shared {
    /// Ends the streams of all subscribers, and of those to come.
    fn close(&self) {
        let over = Subscribers { list: Vec::new(), is_over: true };
        // They are woken outside of the lock.
        let subscribers = std::mem::replace(&mut *self.subscribers.lock(), over);
        drop(subscribers);
    }

    async fn serve(&self, fd: AsyncFd<AsyncEvents>) {
        loop {
            let mut ready = match fd.readable().await {
                Ok(ready) => ready,
                Err(error) => return trace::events_failed(&error),
            };
            loop {
                match fd.get_ref().next_event() {
                    Ok(Some(event)) => self.tell(&event),
                    Ok(None) => break,
                    Err(error) => return trace::events_failed(&error),
                }
            }
            ready.clear_ready();
        }
    }

    fn tell(&self, event: &Event) {
        trace::event(event);
        self.end(event);
        self.subscribers.lock().list.retain(|(subscriber, missed)| {
            match subscriber.try_send(event.clone()) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    missed.fetch_add(1, Relaxed);
                    true
                }
                Err(TrySendError::Closed(_)) => false,
            }
        });
    }

    /// Ends what the event is fatal to.
    fn end(&self, event: &Event) {
        let pairs: Vec<_> = match event {
            Event::QueuePair(
                EventKind::QpFatal | EventKind::QpRequestError | EventKind::QpAccessError,
                Some(pair),
            ) => self.pairs.lock().get(&pair.num()).and_then(Weak::upgrade).into_iter().collect(),
            // Which pairs use the queue is not known here, and one that overran is lost to all of them.
            Event::CompletionQueue(..) | Event::Device(EventKind::DeviceFatal) => {
                self.pairs.lock().values().filter_map(Weak::upgrade).collect()
            }
            _ => return,
        };
        for pair in pairs {
            pair.end(Ended::Event { event: explain(event) });
        }
    }
}

/// What a fatal event means, and what to look at.
fn explain(event: &Event) -> String {
    let (kind, meaning) = match event {
        Event::QueuePair(kind, _) => match kind {
            EventKind::QpAccessError => (
                kind,
                "the peer's request named a key, a range or a right that this side does not grant; compare what it was given with \
                 Config::regions and with the access of the regions",
            ),
            EventKind::QpRequestError => (
                kind,
                "the peer's request is one that this queue pair cannot carry out; look at the peer's own error",
            ),
            kind => (kind, "the device cannot go on with this queue pair; its kernel log may say why"),
        },
        Event::CompletionQueue(kind, _) => {
            (kind, "the completion queue lost completions, and with it all its queue pairs; make a new one")
        }
        Event::Device(kind) => (kind, "the device failed; nothing on it can be used until it was reset"),
        other => return format!("{other:?}"),
    };
    format!("{kind:?}: {meaning}")
}

impl fmt::Debug for Watchman {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchman").finish_non_exhaustive()
    }
}
