//! The poller.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;

use verbs_sys::{ibv_wc, ibv_wc_status, inline};

use super::completion::Item;
use super::{Completions, CqInner, CqState, WorkCompletion};
use crate::inflight::{Held, Keep, WorkQueue, WrId};

/// Completions read by one call of the verb.
pub(crate) const BATCH: usize = 16;
const BATCH_INT: i32 = 16;
const _: () = assert!(BATCH_INT as usize == BATCH);

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
pub(crate) enum Later {
    Wake(Waker),
    Drop(#[allow(dead_code, reason = "held for its Drop")] Held),
    Release(#[allow(dead_code, reason = "held for its Drop")] Keep),
}

/// Does what was put off, in order.
pub(crate) fn run(list: impl IntoIterator<Item = Later>) {
    for later in list {
        if let Later::Wake(waker) = later {
            waker.wake();
        }
    }
}

/// Where completions go while a batch is dispatched.
pub(crate) trait Sink {
    /// Takes a completion of `post_*`, and all that its slot holds; counts the credit that returns, if it holds one.
    ///
    /// # Safety
    ///
    /// The caller claimed the slot, and gives its payload up.
    unsafe fn deliver(&mut self, queue: &WorkQueue, slot: u32, wc: &ibv_wc);

    /// Counts a completion that went elsewhere: a credit returns.
    fn count(&mut self);

    /// Puts something off until the lock is gone.
    fn defer(&mut self, later: Later);
}

/// Lends completions to the caller of `poll`.
struct Lending<'a> {
    out: &'a mut Completions,
    deferred: &'a mut Vec<Later>,
    credits: u32,
}

impl Sink for Lending<'_> {
    unsafe fn deliver(&mut self, queue: &WorkQueue, slot: u32, wc: &ibv_wc) {
        self.credits += u32::from(queue.takes_credits());
        // SAFETY: the caller's promise.
        let (item, rest) = unsafe { taken(queue, slot, wc, self.deferred) };
        self.out.push(item, rest);
    }

    #[inline]
    fn count(&mut self) {
        self.credits += 1;
    }

    fn defer(&mut self, later: Later) {
        self.deferred.push(later);
    }
}

/// What a slot held, as an item and further entries of its list.
///
/// # Safety
///
/// The caller claimed the slot, and gives its payload up.
unsafe fn taken(
    queue: &WorkQueue,
    slot: u32,
    wc: &ibv_wc,
    deferred: &mut Vec<Later>,
) -> (Item, impl Iterator<Item = Held> + use<>) {
    // SAFETY: the caller's promise.
    let taken = unsafe { queue.take(slot) };
    if let Some(keep) = taken.keep {
        deferred.push(Later::Release(keep));
    }
    let mut held = taken.held.into_iter();
    (Item::new(WorkCompletion::new(*wc, taken.opcode, &queue.health), taken.id, held.next()), held)
}

/// A completion of `post_*` on its way to a poller that wants it.
pub(crate) struct Parked {
    item: Item,
    rest: Vec<Held>,
}

/// Keeps completions for another poller.
pub(crate) struct Parking<'a> {
    parked: &'a mut VecDeque<Parked>,
    deferred: &'a mut Vec<Later>,
    credits: u32,
}

impl<'a> Parking<'a> {
    pub(crate) fn new(parked: &'a mut VecDeque<Parked>, deferred: &'a mut Vec<Later>) -> Parking<'a> {
        Parking { parked, deferred, credits: 0 }
    }
}

impl Sink for Parking<'_> {
    unsafe fn deliver(&mut self, queue: &WorkQueue, slot: u32, wc: &ibv_wc) {
        self.credits += u32::from(queue.takes_credits());
        // SAFETY: the caller's promise.
        let (item, rest) = unsafe { taken(queue, slot, wc, self.deferred) };
        self.parked.push_back(Parked { item, rest: rest.collect() });
    }

    fn count(&mut self) {
        self.credits += 1;
    }

    fn defer(&mut self, later: Later) {
        self.deferred.push(later);
    }
}

impl CqInner {
    /// Polls once and lends what came to `out`. Not inlined: the loop needs all registers.
    #[inline(never)]
    pub(crate) fn poll_into(&self, out: &mut Completions) -> Result<(), PollError> {
        out.reserve();
        let mut guard = self.lock_state();
        let n = self.read(&mut guard)?;
        let state = &mut *guard;
        if !state.parked.is_empty() {
            out.unpark(&mut state.parked);
        }
        let mut credits = 0;
        let table = &*self.context.queues;
        for wc in &state.wcs[..n] {
            let id = WrId(wc.wr_id);
            // SAFETY: null, or a queue that is not freed before this poller leaves its lock (S-4).
            let queue = unsafe { table.find(id).as_ref() };
            if let Some(queue) = queue
                && wc.status == ibv_wc_status::IBV_WC_SUCCESS
                && let Some(slot) = queue.claim_simple(self, id)
            {
                // SAFETY: claimed, and given up to `release`; `reserve` made room.
                let simple = unsafe { out.push_simple(slot.payload(), wc) };
                if simple {
                    slot.release();
                    credits += 1;
                    continue;
                }
            }
            let mut sink = Lending { out, deferred: &mut state.deferred, credits: 0 };
            self.dispatch_one(wc, &mut sink);
            credits += sink.credits;
            out.reserve();
        }
        if self.settle(state, n, credits) {
            let list = std::mem::take(&mut state.deferred);
            drop(guard);
            self.run_deferred(list);
        }
        Ok(())
    }

    /// Polls once; what was posted for pollers waits for one.
    pub(crate) fn dispatch(&self) -> Result<usize, PollError> {
        let mut guard = self.lock_state();
        let n = self.read(&mut guard)?;
        let state = &mut *guard;
        let mut sink = Parking::new(&mut state.parked, &mut state.deferred);
        // Entries that a provider counted and did not write hold old completions, which are strays.
        for wc in &state.wcs[..n] {
            self.dispatch_one(wc, &mut sink);
        }
        let credits = sink.credits;
        if self.settle(state, n, credits) {
            let list = std::mem::take(&mut state.deferred);
            drop(guard);
            self.run_deferred(list);
        }
        Ok(n)
    }

    /// Calls the verb; gives the number of completions it wrote.
    #[inline]
    fn read(&self, state: &mut CqState) -> Result<usize, PollError> {
        // SAFETY: the queue is live (S-1), and there is room for BATCH completions.
        let code = unsafe { inline::ibv_poll_cq(self.ptr.as_ptr(), BATCH_INT, state.wcs.as_mut_ptr()) };
        match usize::try_from(code) {
            Ok(n) if n <= BATCH => Ok(n),
            // A negative count is an error, and so is one that cannot be: nothing is a completion.
            _ => Err(PollError { code }),
        }
    }

    /// Returns credits and wakes who waits for them; true when something was put off.
    #[inline]
    fn settle(&self, state: &mut CqState, n: usize, credits: u32) -> bool {
        if credits > 0 {
            self.return_credits(credits);
        }
        if !state.is_quiet {
            self.settle_slow(state, n);
        }
        !state.deferred.is_empty()
    }

    #[cold]
    fn settle_slow(&self, state: &mut CqState, n: usize) {
        if n < BATCH {
            // The queue was polled empty: completions of dead queues are gone.
            for (credits, index) in state.zombies.drain(..) {
                self.return_credits(credits);
                drop(index);
            }
        }
        state.deferred.extend(state.credit_waiters.drain(..).map(Later::Wake));
        state.is_quiet = state.zombies.is_empty();
    }

    /// Runs what was put off, and gives the list's storage back for the next time.
    #[inline(never)]
    fn run_deferred(&self, mut list: Vec<Later>) {
        run(list.drain(..));
        let mut state = self.lock_state();
        if state.deferred.capacity() < list.capacity() && state.deferred.is_empty() {
            state.deferred = list;
        }
    }

    /// Dispatches a completion to whatever it belongs to.
    #[inline(never)]
    fn dispatch_one(&self, wc: &ibv_wc, sink: &mut impl Sink) {
        let id = WrId(wc.wr_id);
        let queue = self.context.queues.find(id);
        // SAFETY: null, or a queue that is not freed before this poller leaves its lock (S-4).
        let Some(queue) = (unsafe { queue.as_ref() }) else { return self.count_stray() };
        if !queue.complete(self, id, wc, sink) {
            self.count_stray();
        }
    }

    #[cold]
    fn count_stray(&self) {
        self.stray.fetch_add(1, Ordering::Relaxed);
    }

    /// Completes everything in flight on `queue` as flushed, because the verb that destroyed or reset
    /// it succeeded; its credits return when this queue was polled empty.
    pub(crate) fn reclaim(&self, queue: &WorkQueue, destroyed: bool) {
        let reserved = queue.end_run();
        let mut guard = self.lock_state();
        let state = &mut *guard;
        let count = queue.reclaim(&mut Parking::new(&mut state.parked, &mut state.deferred));
        let index = destroyed.then(|| Arc::clone(queue.queue_index()));
        state.add_zombie(count + reserved, index);
        let list = std::mem::take(&mut state.deferred);
        drop(guard);
        self.run_deferred(list);
    }
}

impl Completions {
    #[cold]
    fn unpark(&mut self, parked: &mut VecDeque<Parked>) {
        for Parked { item, rest } in parked.drain(..) {
            self.push(item, rest.into_iter());
        }
    }
}
