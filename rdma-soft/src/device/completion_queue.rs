//! Completion queues.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::channel::Channel;
use super::events::{AsyncEvent, AsyncEvents, EventCount};
use super::inbox::Inbox;
use super::moderation::Moderation;
use crate::proto::{Completion, Time};
use crate::wire::Qpn;

/// A completion as it waits in the queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) completion: Completion,
    pub(crate) qp_num: Qpn,
    /// When it was queued; zero unless the queue was created with timestamps.
    pub(crate) time: Time,
}

/// Which completion the next event waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Armed {
    No,
    Solicited,
    Any,
}

#[derive(Debug)]
struct Inner {
    /// Allocated whole at creation.
    ring: VecDeque<Entry>,
    depth: usize,
    armed: Armed,
    moderation: Moderation,
    /// Completions that the armed event has waited for, and until when it waits; only with moderation.
    gathered: u32,
    due: Time,
    overrun: bool,
}

impl Inner {
    fn disarm(&mut self) {
        self.armed = Armed::No;
        self.gathered = 0;
    }
}

/// What must be done after a completion was queued, once no lock is held.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    Quiet,
    /// The channel wants an event of this queue.
    Notify,
    /// The event waits for more completions, until this time.
    Wait(Time),
    /// There was no room, for the first time or again.
    Overrun {
        first: bool,
    },
}

#[derive(Debug)]
pub(crate) struct CompletionQueue {
    inner: Mutex<Inner>,
    /// How many completions wait, to see without the lock that none does.
    len: AtomicUsize,
    /// Packets of this process for queue pairs that use it.
    pub(super) inbox: Inbox,
    /// Armed since the last poll.
    just_armed: AtomicBool,
    /// What the program knows it by: the address of the C structure, never followed here.
    pub(crate) identity: usize,
    pub(crate) channel: Option<Arc<Channel>>,
    /// Queue pairs that use it, once per direction.
    pub(crate) users: AtomicUsize,
    /// Completion events handed out and acknowledged.
    pub(crate) completion_events: EventCount,
    /// The same for asynchronous events.
    pub(crate) async_event_count: Arc<EventCount>,
    pub(crate) async_events: Arc<AsyncEvents>,
    pub(crate) timestamps: bool,
    /// A full queue forgets its oldest completion and is none the worse for it.
    ignores_overrun: bool,
}

impl CompletionQueue {
    pub(crate) fn new(
        depth: usize,
        timestamps: bool,
        ignores_overrun: bool,
        identity: usize,
        channel: Option<Arc<Channel>>,
        async_events: Arc<AsyncEvents>,
    ) -> Self {
        CompletionQueue {
            inner: Mutex::new(Inner {
                ring: VecDeque::with_capacity(depth),
                depth,
                armed: Armed::No,
                moderation: Moderation::NONE,
                gathered: 0,
                due: Time::ZERO,
                overrun: false,
            }),
            len: AtomicUsize::new(0),
            inbox: Inbox::default(),
            just_armed: AtomicBool::new(false),
            identity,
            channel,
            users: AtomicUsize::new(0),
            completion_events: EventCount::default(),
            async_event_count: Arc::default(),
            async_events,
            timestamps,
            ignores_overrun,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a completion of a queue pair that came at `now`. A queue that was full once takes no more (clause 11.6.3.1, `man
    /// ibv_poll_cq`): what waits in it can still be polled.
    #[inline]
    pub(crate) fn push(&self, completion: &Completion, qp_num: Qpn, now: Time) -> Pushed {
        let mut inner = self.lock();
        if inner.ring.len() >= inner.depth && self.ignores_overrun {
            inner.ring.pop_front();
        }
        if inner.ring.len() >= inner.depth || inner.overrun {
            return Pushed::Overrun { first: !std::mem::replace(&mut inner.overrun, true) };
        }
        let time = if self.timestamps { now } else { Time::ZERO };
        inner.ring.push_back(Entry { completion: *completion, qp_num, time });
        self.len.store(inner.ring.len(), Ordering::Release);
        if inner.armed == Armed::No {
            return Pushed::Quiet;
        }
        self.push_armed(inner, completion, now)
    }

    /// Whether the event that the queue is armed for comes with a completion that was queued.
    #[inline(never)]
    fn push_armed(&self, mut inner: MutexGuard<'_, Inner>, completion: &Completion, now: Time) -> Pushed {
        let failed = completion.status != crate::proto::Status::Success;
        if inner.armed == Armed::Solicited && !completion.solicited && !failed {
            return Pushed::Quiet;
        }
        if inner.moderation.waits_after(inner.gathered + 1) {
            inner.gathered += 1;
            if inner.gathered > 1 {
                return Pushed::Quiet;
            }
            inner.due = now + inner.moderation.period();
            return Pushed::Wait(inner.due);
        }
        self.fire(inner)
    }

    /// What happens to the event that the queue is armed for.
    fn fire(&self, mut inner: MutexGuard<'_, Inner>) -> Pushed {
        inner.disarm();
        self.inbox.set_armed(false);
        if self.channel.is_some() { Pushed::Notify } else { Pushed::Quiet }
    }

    /// Ends the wait of an event that is due at `now`.
    pub(super) fn expire(&self, now: Time) -> Pushed {
        let inner = self.lock();
        if inner.armed == Armed::No || inner.gathered == 0 || now < inner.due {
            return Pushed::Quiet;
        }
        self.fire(inner)
    }

    /// How long events wait for more completions, from the next one on.
    pub(crate) fn moderate(&self, moderation: Moderation) {
        self.lock().moderation = moderation;
    }

    /// Whether nothing waits; may be outdated at once.
    pub(crate) fn is_empty(&self) -> bool {
        self.len.load(Ordering::Acquire) == 0
    }

    /// Takes up to `max` completions, oldest first, and returns their number.
    #[inline]
    pub(crate) fn poll(&self, max: usize, take: impl FnMut(usize, &Entry)) -> usize {
        if self.is_empty() { 0 } else { self.poll_locked(max, take) }
    }

    fn poll_locked(&self, max: usize, mut take: impl FnMut(usize, &Entry)) -> usize {
        let mut inner = self.lock();
        let n = inner.ring.len().min(max);
        for i in 0..n {
            // Read in its place: a copy would cost as much as what is made of it.
            let Some(entry) = inner.ring.front() else { break };
            take(i, entry);
            inner.ring.pop_front();
        }
        self.len.store(inner.ring.len(), Ordering::Release);
        n
    }

    /// Forgets the completions of a queue pair that is reset or destroyed, as adapters do.
    pub(crate) fn purge(&self, qp_num: Qpn) {
        let mut inner = self.lock();
        inner.ring.retain(|entry| entry.qp_num != qp_num);
        self.len.store(inner.ring.len(), Ordering::Release);
    }

    /// Asks for an event when the next completion comes; a solicited-only request never weakens one for any.
    pub(super) fn arm(&self, solicited_only: bool) {
        self.just_armed.store(self.channel.is_some(), Ordering::Relaxed);
        self.inbox.set_armed(self.channel.is_some());
        let mut inner = self.lock();
        if !solicited_only {
            inner.armed = Armed::Any;
        } else if inner.armed == Armed::No {
            inner.armed = Armed::Solicited;
        }
    }

    /// Forgets packets that came for its queue pairs, which are all destroyed.
    pub(crate) fn forget_packets(&self) {
        self.inbox.clear();
    }

    /// Whether this is the first poll since the queue was armed: that one looks for completions that came
    /// before, and is followed by sleep. It need not look at the socket, for the channel's descriptor is
    /// readable while that has anything.
    pub(super) fn just_armed(&self) -> bool {
        self.just_armed.load(Ordering::Relaxed) && self.just_armed.swap(false, Ordering::Relaxed)
    }

    /// Changes the depth; refused when more completions than that wait, or some were lost.
    pub(crate) fn resize(&self, depth: usize) -> bool {
        let mut inner = self.lock();
        if inner.ring.len() > depth || inner.overrun {
            return false;
        }
        let more = depth.saturating_sub(inner.ring.len());
        inner.ring.reserve_exact(more);
        inner.depth = depth;
        true
    }

    /// Tells the program that completions were lost.
    pub(crate) fn raise_overrun(&self) {
        self.async_events.raise(AsyncEvent::CqError, self.identity, &self.async_event_count);
    }
}
