//! The poller.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;

use verbs_sys::{ibv_wc, ibv_wc_status};

use super::completion::STAMPED;
use super::completions::{Lot, Offer};
use super::extended::Batch;
use super::{Completions, CqInner, CqState, WorkCompletion};
use crate::inflight::{Held, HeldList, Keep, SimpleSlot, SlotPayload, Taken, WorkQueue, WrId};
use parking_lot::MutexGuard;

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

/// A `Lot`, or a poll error, as two numbers: so they are returned in registers.
struct Answer {
    simple: usize,
    /// 0, or 1 if something is listed, or `FAILED` with the code of the error, of either sign.
    rest: u64,
}

const FAILED: u64 = 1 << 32;

impl Answer {
    fn failed(error: &PollError) -> Answer {
        Answer { simple: 0, rest: FAILED | u64::from(error.code.cast_unsigned()) }
    }
}

impl From<Answer> for Result<Lot, PollError> {
    #[inline(always)]
    fn from(Answer { simple, rest }: Answer) -> Self {
        if rest < FAILED {
            return Ok(Lot { simple, is_listed: rest != 0 });
        }
        let code = u32::try_from(rest & u64::from(u32::MAX)).unwrap_or(u32::MAX).cast_signed();
        Err(PollError { code })
    }
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
    /// Takes a completion of `post_*`, and all that its slot held.
    fn deliver(&mut self, completion: WorkCompletion, taken: Taken);

    /// Counts the credits that a completion returns.
    fn count(&mut self, credits: u32);

    /// Puts something off until the lock is gone.
    fn defer(&mut self, later: Later);
}

/// Lends completions to the caller of `poll`.
struct Lending<'a> {
    listed: &'a mut Vec<Parked>,
    deferred: &'a mut Vec<Later>,
    credits: u32,
}

impl Sink for Lending<'_> {
    #[inline(always)]
    fn deliver(&mut self, completion: WorkCompletion, taken: Taken) {
        self.deferred.extend(taken.keep.map(Later::Release));
        self.listed.push(Parked { completion, id: taken.id, held: taken.held });
    }

    fn count(&mut self, credits: u32) {
        self.credits += credits;
    }

    fn defer(&mut self, later: Later) {
        self.deferred.push(later);
    }
}

/// A completion of `post_*` on its way to a poller that wants it.
pub(crate) struct Parked {
    pub(super) completion: WorkCompletion,
    pub(super) id: u64,
    pub(super) held: HeldList,
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
    fn deliver(&mut self, completion: WorkCompletion, taken: Taken) {
        self.deferred.extend(taken.keep.map(Later::Release));
        self.parked.push_back(Parked { completion, id: taken.id, held: taken.held });
    }

    fn count(&mut self, credits: u32) {
        self.credits += credits;
    }

    fn defer(&mut self, later: Later) {
        self.deferred.push(later);
    }
}

/// What the verb returned: a negative count is an error, and so is one that cannot be: nothing is a completion.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "it was made of an int")]
fn counted(n: usize) -> Result<usize, PollError> {
    if n <= BATCH { Ok(n) } else { Err(PollError { code: (n as u32).cast_signed() }) }
}

/// Empties the list of the last lot. What an iterator that was forgotten has left in it is dropped later; mostly nothing is.
fn put_off_left(listed: &mut Vec<Parked>, deferred: &mut Vec<Later>) {
    for Parked { held, .. } in listed.drain(..) {
        if !held.is_empty() {
            deferred.extend(held.into_iter().map(Later::Drop));
        }
    }
}

impl CqInner {
    /// Polls once and says what of it is lent. Inlined: what is lent is handed out in the same registers.
    #[inline(always)]
    pub(crate) fn poll_into(&self, out: &mut Completions) -> Result<Lot, PollError> {
        let guard = self.lock_state();
        // SAFETY: room for BATCH completions, under the lock.
        let n = unsafe { self.read_raw(out.landing()) };
        // Of a failure, too, the slow way makes an answer.
        if !guard.is_plain || n > BATCH {
            return self.lend_any(guard, out, 0, n).into();
        }
        let simple = self.lend_simple(out, n);
        if simple != n {
            return self.lend_any(guard, out, simple, n).into();
        }
        Ok(Lot { simple, is_listed: false })
    }

    /// Polls once and offers to `take`, one after the other; `None` if that took all, otherwise how many it took, and what is lent.
    #[inline(always)]
    pub(crate) fn offer_into(
        &self,
        out: &mut Completions,
        take: impl for<'o> FnMut(Offer<'o>) -> Option<Offer<'o>>,
    ) -> Option<Result<(usize, Lot), PollError>> {
        let guard = self.lock_state();
        // SAFETY: as in `poll_into`.
        let n = unsafe { self.read_raw(out.landing()) };
        let (taken, simple) =
            if guard.is_plain && n <= BATCH { out.offer_simple(n, self.simple(), take)? } else { (0, 0) };
        Some(self.lend_rest(guard, out, taken, simple, n))
    }

    /// Lends what `offer_into` could not hand out at once.
    #[inline(never)]
    fn lend_rest(
        &self,
        guard: MutexGuard<'_, CqState>,
        out: &mut Completions,
        taken: usize,
        simple: usize,
        n: usize,
    ) -> Result<(usize, Lot), PollError> {
        if guard.is_plain && simple == n {
            return Ok((taken, Lot { simple, is_listed: false }));
        }
        let lot = Result::from(self.lend_any(guard, out, simple, n))?;
        Ok((taken, lot))
    }

    /// Lends the first of `n` completions, as long as they are simple; gives how many. The caller holds the lock.
    #[inline(always)]
    fn lend_simple(&self, out: &mut Completions, n: usize) -> usize {
        out.lend_simple(n, self.simple())
    }

    /// Gives the slot of a completion that is a success, and simple. The caller holds the lock.
    #[inline(always)]
    fn simple<'q>(&'q self) -> impl FnMut(&ibv_wc) -> Option<SimpleSlot<'q, SlotPayload>> {
        // SAFETY: of the context, which the queue keeps alive.
        let entries = unsafe { self.entries.as_ref() };
        move |wc| {
            if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
                return None;
            }
            // SAFETY: under the lock, and for as long.
            unsafe { entries.claim_simple(self, WrId(wc.wr_id)) }
        }
    }

    /// Lends what is parked, and what came besides the first `simple`, which are lent already.
    #[inline(never)]
    fn lend_any(
        &self,
        mut guard: MutexGuard<'_, CqState>,
        out: &mut Completions,
        mut simple: usize,
        mut n: usize,
    ) -> Answer {
        let batch = match counted(n).and_then(|_| self.read_extended()) {
            Ok(batch) => batch,
            Err(error) => return self.lend_parked(guard, out, error),
        };
        let state = &mut *guard;
        // What is parked comes first; and where some count, each is asked.
        if simple == 0 && state.is_quiet && !state.counts {
            simple = self.lend_simple(out, n);
        }
        let (landed, listed) = out.parts();
        put_off_left(listed, &mut state.deferred);
        listed.extend(state.parked.drain(..));
        let mut sink = Lending { listed, deferred: &mut state.deferred, credits: 0 };
        for wc in &mut landed[simple..n] {
            let wc = wc.take();
            self.dispatch_one(WrId(wc.wr_id), &wc, &mut sink);
        }
        if let Some(batch) = batch {
            batch.iter().for_each(|(id, wc)| self.dispatch_one(id, wc, &mut sink));
            n = batch.len();
        }
        self.return_credits(sink.credits);
        let is_listed = !listed.is_empty();
        state.set_quiet(state.is_quiet && state.deferred.is_empty());
        if !state.is_quiet {
            self.settle(guard, n);
        }
        Answer { simple, rest: u64::from(is_listed) }
    }

    /// Lends what is parked of a queue that cannot be read: what a destroyed pair had in flight comes back all the same. The error
    /// is the answer once nothing is left.
    #[cold]
    fn lend_parked(
        &self,
        mut guard: MutexGuard<'_, CqState>,
        out: &mut Completions,
        error: PollError,
    ) -> Answer {
        let state = &mut *guard;
        if state.parked.is_empty() {
            return Answer::failed(&error);
        }
        let (_, listed) = out.parts();
        put_off_left(listed, &mut state.deferred);
        listed.extend(state.parked.drain(..));
        // As of a full batch: the queue was not seen empty.
        self.settle(guard, BATCH);
        Answer { simple: 0, rest: 1 }
    }

    /// Polls once; what was posted for pollers waits for one.
    pub(crate) fn dispatch(&self) -> Result<usize, PollError> {
        let mut guard = self.lock_state();
        let state = &mut *guard;
        // SAFETY: room for BATCH completions.
        let mut n = unsafe { self.read(state.wcs.as_mut_ptr()) }?;
        let mut sink = Parking::new(&mut state.parked, &mut state.deferred);
        // Entries that a provider counted and did not write hold old completions, which are strays.
        for wc in &mut state.wcs[..n] {
            wc.wc_flags &= !STAMPED;
            self.dispatch_one(WrId(wc.wr_id), wc, &mut sink);
        }
        if n == 0
            && let Some(batch) = self.read_extended()?
        {
            batch.iter().for_each(|(id, wc)| self.dispatch_one(id, wc, &mut sink));
            n = batch.len();
        }
        let credits = sink.credits;
        self.return_credits(credits);
        state.set_quiet(state.is_quiet && state.deferred.is_empty() && state.parked.is_empty());
        if !state.is_quiet {
            self.settle(guard, n);
        }
        Ok(n)
    }

    /// Reads an extended queue. The caller holds the lock.
    fn read_extended(&self) -> Result<Option<Batch>, PollError> {
        let Some(extended) = &self.extended else { return Ok(None) };
        // SAFETY: the queue is live (S-1), and read under the lock.
        unsafe { extended.poll() }.map(Some)
    }

    /// Calls the verb; gives the number of completions it wrote.
    ///
    /// # Safety
    ///
    /// `wcs` has room for BATCH completions, and the caller holds the lock.
    #[inline(always)]
    unsafe fn read(&self, wcs: *mut ibv_wc) -> Result<usize, PollError> {
        // SAFETY: the caller's promise.
        counted(unsafe { self.read_raw(wcs) })
    }

    /// The same; more than BATCH is an error, see [`counted`].
    ///
    /// # Safety
    ///
    /// As for `read`.
    #[inline(always)]
    unsafe fn read_raw(&self, wcs: *mut ibv_wc) -> usize {
        // SAFETY: the queue is live (S-1); the caller's promise.
        let code = unsafe { (self.poll_cq)(self.ptr.as_ptr(), BATCH_INT, wcs) };
        code.cast_unsigned() as usize
    }

    /// Sees to what was put off, zombies and waiters, and lets go of the lock.
    #[inline(never)]
    fn settle(&self, mut guard: MutexGuard<'_, CqState>, n: usize) {
        let state = &mut *guard;
        if n < BATCH {
            // The queue was polled empty: completions of dead queues are gone.
            for (credits, index) in state.zombies.drain(..) {
                self.return_credits(credits);
                drop(index);
            }
        }
        // Those who wait look for themselves: woken for nothing, each would wake the others.
        if self.has_credit() {
            state.deferred.extend(state.credit_waiters.drain(..).map(Later::Wake));
        }
        state.set_quiet(
            state.zombies.is_empty() && state.parked.is_empty() && state.credit_waiters.is_empty(),
        );
        if !state.deferred.is_empty() {
            let list = std::mem::take(&mut state.deferred);
            drop(guard);
            self.run_deferred(list);
        }
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
    fn dispatch_one(&self, id: WrId, wc: &ibv_wc, sink: &mut impl Sink) {
        let queue = self.context.queues.entries().find(id);
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
        if !destroyed && queue.in_flight() > 0 {
            // What it posts next, and the old completions, may be more than its depth.
            self.count_all();
        }
        let mut post = queue.lock_post();
        let mut guard = self.lock_state();
        let state = &mut *guard;
        let mut sink = Parking::new(&mut state.parked, &mut state.deferred);
        let mut count = queue.reclaim(&mut sink);
        // After a reset, what it posts next and the old completions may be more than its depth: one that kept its places counts, too.
        if destroyed || count > 0 {
            self.return_credits(queue.unprepay(&mut post, count));
        }
        post.set_unsignaled(0);
        count += u32::from(std::mem::take(&mut post.reserved));
        drop(post);
        let index = destroyed.then(|| Arc::clone(queue.queue_index()));
        state.add_zombie(count, index);
        let list = std::mem::take(&mut state.deferred);
        drop(guard);
        self.run_deferred(list);
    }
}
