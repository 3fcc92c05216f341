//! Completion queues.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::channel::Channel;
use super::events::{AsyncEvent, AsyncEvents, EventCount};
use super::inbox::Inbox;
use super::moderation::Moderation;
use crate::proto::{Completion, Time};
use crate::wire::Qpn;

/// Counts how many completions of a work queue were polled or purged; what waits is the difference to what was queued. So long a request
/// keeps its place in its work queue (clause 10.8.5), and a completion queue that has room for all of them does not overrun.
#[derive(Debug, Default)]
pub(crate) struct Polled {
    count: AtomicU32,
    /// Of a shared receive queue, whose completions go to several completion queues.
    is_shared: bool,
}

impl Polled {
    pub(crate) fn of_shared() -> Arc<Self> {
        Arc::new(Polled { count: AtomicU32::new(0), is_shared: true })
    }

    /// How many of so many completions wait.
    #[inline]
    pub(crate) fn waiting_of(&self, queued: u32) -> u32 {
        queued.wrapping_sub(self.count.load(Ordering::Acquire))
    }

    /// Called under the lock of a completion queue.
    #[inline]
    fn add_one(&self) {
        if self.is_shared {
            self.count.fetch_add(1, Ordering::AcqRel);
        } else {
            // All come to one completion queue: the lock makes it one step.
            self.count.store(self.count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
        }
    }
}

/// A work queue among those whose completions a completion queue takes.
#[derive(Debug)]
pub(crate) struct Place {
    index: u32,
    pub(crate) polled: Arc<Polled>,
}

/// A completion as it waits in the queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) completion: Completion,
    pub(crate) qp_num: Qpn,
    /// The work queue's [`Place`].
    place: u32,
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
    /// By their place.
    work_queues: Vec<Option<Arc<Polled>>>,
    /// Places of those that are gone.
    free: Vec<u32>,
    depth: usize,
    armed: Armed,
    moderation: Moderation,
    /// Completions that the armed event has waited for, and until when it waits; only with moderation.
    gathered: u32,
    due: Time,
    /// When the latest completion came; zero unless the queue was created with timestamps.
    latest: Time,
    overrun: bool,
}

impl Inner {
    fn count_polled(work_queues: &[Option<Arc<Polled>>], entry: &Entry) {
        if let Some(Some(polled)) = work_queues.get(entry.place as usize) {
            polled.add_one();
        }
    }

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
                work_queues: Vec::new(),
                free: Vec::new(),
                depth,
                armed: Armed::No,
                moderation: Moderation::NONE,
                gathered: 0,
                due: Time::ZERO,
                latest: Time::ZERO,
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

    /// A work queue's completions come here from now on.
    pub(super) fn add_work_queue(&self, polled: Arc<Polled>) -> Place {
        let mut inner = self.lock();
        let known = Some(Arc::clone(&polled));
        let index = match inner.free.pop() {
            Some(index) => {
                inner.work_queues[index as usize] = known;
                index
            }
            None => {
                inner.work_queues.push(known);
                // There are fewer queue pairs than that.
                u32::try_from(inner.work_queues.len() - 1).unwrap_or(u32::MAX)
            }
        };
        Place { index, polled }
    }

    /// It is gone, and so are its completions.
    pub(super) fn remove_work_queue(&self, place: &Place) {
        let mut inner = self.lock();
        if inner.work_queues.get_mut(place.index as usize).is_some_and(|known| known.take().is_some()) {
            inner.free.push(place.index);
        }
    }

    /// Queues a completion of a queue pair that came at `now`. A queue that was full once takes no more (clause 11.6.3.1, `man
    /// ibv_poll_cq`): what waits in it can still be polled.
    #[inline]
    pub(super) fn push(&self, completion: &Completion, qp_num: Qpn, place: &Place, now: Time) -> Pushed {
        let mut guard = self.lock();
        let inner = &mut *guard;
        if inner.ring.len() >= inner.depth
            && self.ignores_overrun
            && let Some(oldest) = inner.ring.pop_front()
        {
            Inner::count_polled(&inner.work_queues, &oldest);
        }
        if inner.ring.len() >= inner.depth || inner.overrun {
            return Pushed::Overrun { first: !std::mem::replace(&mut inner.overrun, true) };
        }
        // Whoever read the clock may have waited for a processor since, and others came first: no time is before theirs.
        if self.timestamps {
            inner.latest = inner.latest.max(now);
        }
        let time = inner.latest;
        inner.ring.push_back(Entry { completion: *completion, qp_num, place: place.index, time });
        self.len.store(inner.ring.len(), Ordering::Release);
        if inner.armed == Armed::No {
            return Pushed::Quiet;
        }
        self.push_armed(guard, completion, now)
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
        let mut guard = self.lock();
        let inner = &mut *guard;
        let n = inner.ring.len().min(max);
        for i in 0..n {
            // Read in its place: a copy would cost as much as what is made of it.
            let Some(entry) = inner.ring.front() else { break };
            take(i, entry);
            Inner::count_polled(&inner.work_queues, entry);
            inner.ring.pop_front();
        }
        self.len.store(inner.ring.len(), Ordering::Release);
        n
    }

    /// Forgets the completions of a queue pair that is reset or destroyed, as adapters do.
    pub(crate) fn purge(&self, qp_num: Qpn) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.ring.retain(|entry| {
            let is_purged = entry.qp_num == qp_num;
            if is_purged {
                Inner::count_polled(&inner.work_queues, entry);
            }
            !is_purged
        });
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
