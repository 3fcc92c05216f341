//! The poller.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::task::Waker;

use smallvec::SmallVec;
use verbs_sys::{ibv_wc, ibv_wc_status, inline};

use super::completion::Item;
use super::{Completions, CqInner, CqState, WorkCompletion};
use crate::inflight::{Held, Keep, Payload, WorkQueue, WrId, flushed};

/// Completions read by one call of the verb.
pub(crate) const BATCH: usize = 16;

/// A completion queue could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "ibv_poll_cq failed with {code}: the completion queue cannot be read (overrun, or the device is gone); destroy the queue pairs that use it"
)]
pub struct PollError {
    /// What the verb returned: negative, or more completions than there was room for.
    pub code: i32,
}

/// What is to be done after the lock is gone: wakers called and buffers dropped run code that is not ours.
#[allow(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
pub(crate) enum Later {
    Wake(Waker),
    Drop(#[allow(dead_code, reason = "held for its Drop")] Held),
    Release(#[allow(dead_code, reason = "held for its Drop")] Keep),
}

/// A list of `Later`.
#[derive(Default)]
pub(crate) struct Deferred {
    list: SmallVec<[Later; BATCH]>,
}

impl Deferred {
    pub(crate) fn wake(&mut self, wakers: impl IntoIterator<Item = Waker>) {
        self.list.extend(wakers.into_iter().map(Later::Wake));
    }

    pub(crate) fn push(&mut self, later: Later) {
        self.list.push(later);
    }

    #[inline]
    pub(crate) fn run(self) {
        if !self.list.is_empty() {
            for later in self.list {
                if let Later::Wake(waker) = later {
                    waker.wake();
                }
            }
        }
    }
}

/// A completion of `post_*` on its way to a poller that wants it.
pub(crate) struct Parked {
    item: Item,
    rest: Vec<Held>,
}

/// Where completions go while a batch is dispatched.
pub(crate) struct Sink<'a> {
    out: Option<&'a mut Completions>,
    parked: &'a mut VecDeque<Parked>,
    pub(crate) deferred: &'a mut Deferred,
    /// Credits to return.
    pub(crate) credits: u32,
}

impl<'a> Sink<'a> {
    /// A sink that parks.
    pub(crate) fn new(parked: &'a mut VecDeque<Parked>, deferred: &'a mut Deferred) -> Sink<'a> {
        Sink { out: None, parked, deferred, credits: 0 }
    }

    /// Hands out a completion of `post_*`, with what its slot held.
    #[inline]
    pub(crate) fn deliver(&mut self, queue: &WorkQueue, slot: u32, payload: Payload, wc: &ibv_wc) {
        self.credits += 1;
        let Payload { id, held, opcode, keep, .. } = payload;
        if let Some(keep) = keep {
            self.deferred.push(Later::Release(keep));
        }
        // SAFETY: the caller claimed the slot; each entry is taken once, here and below.
        let first = (held > 0).then(|| unsafe { queue.take_held(slot, 0) });
        let completion = WorkCompletion::new(*wc, opcode, &queue.health);
        let mut item = Item { completion, id, first, rest: (0, 0) };
        // SAFETY: as above.
        let rest = (1..u32::from(held)).map(|i| unsafe { queue.take_held(slot, i) });
        match &mut self.out {
            Some(out) => {
                if held > 1 {
                    item.rest = out.push_rest(rest);
                }
                out.items.push(item);
            }
            None => self.parked.push_back(Parked { item, rest: rest.collect() }),
        }
    }
}

impl CqInner {
    pub(crate) fn poll_into(&self, out: &mut Completions) -> Result<usize, PollError> {
        self.poll_with(Some(out))
    }

    pub(crate) fn dispatch(&self) -> Result<usize, PollError> {
        self.poll_with(None)
    }

    #[inline]
    fn poll_with(&self, mut out: Option<&mut Completions>) -> Result<usize, PollError> {
        let mut deferred = Deferred::default();
        let mut guard = self.state.lock();
        let state = &mut *guard;
        // SAFETY: the queue is live (S-1), and there is room for BATCH completions.
        let code = unsafe { inline::ibv_poll_cq(self.ptr.as_ptr(), BATCH as i32, state.wcs.as_mut_ptr()) };
        let n = match usize::try_from(code) {
            Ok(n) if n <= BATCH => n,
            // A negative count is an error, and so is one that cannot be: nothing is a completion.
            _ => return Err(PollError { code }),
        };
        if let Some(out) = &mut out
            && !state.parked.is_empty()
        {
            out.unpark(&mut state.parked);
        }
        if n > 0 {
            let CqState { parked, wcs, .. } = &mut *state;
            let mut sink = Sink { out, parked, deferred: &mut deferred, credits: 0 };
            // Entries that a provider counted and did not write hold old completions, which are strays.
            for wc in &wcs[..n] {
                self.dispatch_one(wc, &mut sink);
            }
            let credits = sink.credits;
            self.return_credits(credits);
            if !state.credit_waiters.is_empty() {
                deferred.wake(state.credit_waiters.drain(..));
            }
        }
        if n < BATCH && !state.zombies.is_empty() {
            self.bury(state, &mut deferred);
        }
        drop(guard);
        deferred.run();
        Ok(n)
    }

    #[inline]
    fn dispatch_one(&self, wc: &ibv_wc, sink: &mut Sink<'_>) {
        let id = WrId(wc.wr_id);
        let queue = self.context.queues.find(id);
        // SAFETY: null, or a queue that is not freed before this poller leaves its lock (S-4).
        let done = match unsafe { queue.as_ref() } {
            // A completion on a queue that the work queue does not complete on: a driver's mistake, and this
            // poller does not hold the lock that guards those slots.
            Some(queue) if !queue.completes_on(self) => false,
            Some(queue) => {
                if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
                    queue.health.note(wc);
                }
                queue.complete(id, wc, true, sink)
            }
            None => false,
        };
        if !done {
            self.count_stray();
        }
    }

    #[cold]
    fn count_stray(&self) {
        self.stray.fetch_add(1, Ordering::Relaxed);
    }

    /// The queue was polled empty: completions of dead queues are gone.
    #[cold]
    fn bury(&self, state: &mut CqState, deferred: &mut Deferred) {
        for (credits, index) in state.zombies.drain(..) {
            self.return_credits(credits);
            drop(index);
        }
        deferred.wake(state.credit_waiters.drain(..));
    }

    /// Completes everything in flight on `queue` as flushed, because the verb that destroyed or reset
    /// it succeeded; its credits return when this queue was polled empty.
    pub(crate) fn reclaim(&self, queue: &WorkQueue, destroyed: bool) {
        let reserved = queue.end_run();
        let mut deferred = Deferred::default();
        {
            let mut state = self.state.lock();
            let state = &mut *state;
            let mut sink = Sink::new(&mut state.parked, &mut deferred);
            let count = queue.reclaim(&flushed(), &mut sink) + reserved;
            let index = destroyed.then(|| std::sync::Arc::clone(queue.queue_index()));
            state.zombies.push((count, index));
        }
        deferred.run();
    }
}

impl Completions {
    #[cold]
    fn unpark(&mut self, parked: &mut VecDeque<Parked>) {
        for Parked { mut item, rest } in parked.drain(..) {
            if !rest.is_empty() {
                item.rest = self.push_rest(rest.into_iter());
            }
            self.items.push(item);
        }
    }
}
