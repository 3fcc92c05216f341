//! Completion queues: the only place where completions are read, and where they are handed out.

mod channel;
mod completion;
mod completions;
mod extended;
mod poll;
mod status;

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context as TaskContext, Poll, Waker};

use parking_lot::{Mutex, MutexGuard};
use verbs_sys::{ibv_cq, ibv_cq_attr_mask, ibv_moderate_cq, ibv_modify_cq_attr, ibv_wc, inline};

pub(crate) use channel::ChannelInner;
pub use channel::CompletionChannel;
pub use completion::{Opcode, Success, WorkCompletion};
pub use completions::{Completion, Completions, Lent, Offer};
pub use extended::CompletionClock;
use extended::{Extended, Wanted};
pub use poll::PollError;
pub(crate) use poll::{BATCH, Later, Parked, Parking, Sink, run};
pub use status::{CompletionError, Status};

use crate::context::ContextInner;
use crate::inflight::{Entries, QueueIndex, WorkQueue};
use crate::ops::PollCq;
use crate::{Error, leak};

/// A live completion queue.
pub(crate) struct CqInner {
    pub(crate) ptr: NonNull<ibv_cq>,
    poll_cq: PollCq,
    /// Those of the context.
    entries: NonNull<Entries>,
    /// How to read it, if it is an extended one.
    extended: Option<Extended>,
    pub(crate) context: Arc<ContextInner>,
    pub(crate) channel: Option<Arc<ChannelInner>>,
    /// What the channel knows it by.
    key: usize,
    user: u64,
    /// Entries that posted work requests may need.
    in_use: AtomicU32,
    capacity: AtomicU32,
    state: Mutex<CqState>,
    /// Credits are counted, for there is or was not room for the depth of every queue. Locked to decide; taken before
    /// the locks of queues and of `state`.
    counting: Mutex<bool>,
    /// Completions that named nothing in flight.
    stray: AtomicU64,
}

/// What pollers share.
pub(crate) struct CqState {
    /// Where the provider writes completions.
    pub(crate) wcs: [ibv_wc; BATCH],
    /// Completions of `post_*` that a poller without a use for them found.
    pub(crate) parked: VecDeque<Parked>,
    /// Credits of queues destroyed or reset whose completions may still be in the queue, and the
    /// indices that those completions name: free when the queue was polled empty.
    pub(crate) zombies: Vec<(u32, Option<Arc<QueueIndex>>)>,
    pub(crate) credit_waiters: Vec<Waker>,
    /// Nothing parked, put off, no zombies and no waiters.
    is_quiet: bool,
    /// Queues with their whole depth reserved.
    prepaid: Vec<Weak<WorkQueue>>,
    /// Queues count, but for those that keep their places: a completion returns a credit.
    counts: bool,
    /// It is read by other means than `ibv_poll_cq`.
    is_extended: bool,
    /// `is_quiet`, and neither `counts` nor `is_extended`: one test for the common case.
    is_plain: bool,
    /// What a poller puts off, kept for its storage; empty outside of a poll.
    pub(crate) deferred: Vec<Later>,
}

impl CqState {
    pub(crate) fn add_zombie(&mut self, credits: u32, index: Option<Arc<QueueIndex>>) {
        self.zombies.push((credits, index));
        self.set_quiet(false);
    }

    fn set_quiet(&mut self, is_quiet: bool) {
        self.is_quiet = is_quiet;
        self.is_plain = is_quiet && !self.counts && !self.is_extended;
    }

    fn set_extended(&mut self, is_extended: bool) {
        self.is_extended = is_extended;
        self.set_quiet(self.is_quiet);
    }

    fn set_counts(&mut self) {
        self.counts = true;
        self.is_plain = false;
    }
}

impl Default for CqState {
    fn default() -> CqState {
        // SAFETY: integers and a union of integers: all zeroes are a value.
        let mut nothing: ibv_wc = unsafe { std::mem::zeroed() };
        // No queue has this index.
        nothing.wr_id = u64::MAX;
        CqState {
            wcs: [nothing; BATCH],
            parked: VecDeque::new(),
            zombies: Vec::new(),
            credit_waiters: Vec::new(),
            is_quiet: true,
            is_extended: false,
            is_plain: true,
            prepaid: Vec::new(),
            counts: false,
            deferred: Vec::new(),
        }
    }
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until `drop` (S-1).
unsafe impl Send for CqInner {}
// SAFETY: as above.
unsafe impl Sync for CqInner {}

impl CqInner {
    #[inline]
    pub(crate) fn lock_state(&self) -> MutexGuard<'_, CqState> {
        self.state.lock()
    }

    /// Takes `n` credits; false when the queue could overflow.
    #[inline]
    pub(crate) fn take_credits(&self, n: u32) -> bool {
        let capacity = self.capacity.load(Ordering::Relaxed);
        let take = |in_use: u32| in_use.checked_add(n).filter(|all| *all <= capacity);
        // Who is refused leaves no trace: others may just be looking whether there is a credit.
        self.in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    #[inline]
    pub(crate) fn return_credits(&self, n: u32) {
        // Wraps: a credit set aside may make `n` the negative of 1, see `WorkQueue::unprepay`.
        self.in_use.fetch_sub(n, Ordering::Relaxed);
    }

    pub(crate) fn has_credit(&self) -> bool {
        self.in_use.load(Ordering::Relaxed) < self.capacity.load(Ordering::Relaxed)
    }

    /// Reserves the depth of a new queue; false when there is no room, or credits are counted already.
    pub(crate) fn prepay(&self, queue: &Arc<WorkQueue>) -> bool {
        let counting = self.counting.lock();
        if *counting || !self.take_credits(queue.depth()) {
            return false;
        }
        let mut post = queue.lock_post();
        let mut state = self.lock_state();
        state.prepaid.retain(|queue| queue.strong_count() > 0);
        state.prepaid.push(Arc::downgrade(queue));
        queue.set_prepaid(&mut post);
        true
    }

    /// Takes `n` credits, also if they are in use still: then nobody gets one before as many have returned. Gives `n`, or 0 and takes none if
    /// that is more than can be counted.
    fn claim_credits(&self, n: u32) -> u32 {
        if self.take_credits(n) {
            return n;
        }
        self.count_all();
        let claim = |in_use: u32| in_use.checked_add(n);
        let claimed = self.in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim);
        claimed.map_or(0, |_| n)
    }

    /// Returns credits without a poll, and wakes who waits for one.
    fn release_credits(&self, n: u32) {
        self.return_credits(n);
        let waiters = std::mem::take(&mut self.lock_state().credit_waiters);
        waiters.into_iter().for_each(Waker::wake);
    }

    /// The depth of a new receive queue was reserved for good: it keeps that also when others come to count.
    pub(crate) fn keep(&self, queue: &Arc<WorkQueue>) {
        let _counting = self.counting.lock();
        let mut post = queue.lock_post();
        let mut state = self.lock_state();
        state.prepaid.retain(|queue| queue.strong_count() > 0);
        state.prepaid.push(Arc::downgrade(queue));
        queue.set_kept();
        queue.set_prepaid(&mut post);
    }

    /// Makes all queues count their credits, from now on, but for those that keep theirs.
    #[cold]
    pub(crate) fn count_all(&self) {
        let mut counting = self.counting.lock();
        if std::mem::replace(&mut *counting, true) {
            return;
        }
        let queues: Vec<_> = self.lock_state().prepaid.iter().filter_map(Weak::upgrade).collect();
        let (kept, queues): (Vec<_>, Vec<_>) = queues.into_iter().partition(|queue| queue.is_kept());
        // In this order everywhere: a post that failed holds its queue's lock and takes the other. Nobody else holds
        // more than one queue's.
        let mut posts: Vec<_> = queues.iter().map(|queue| queue.lock_post()).collect();
        let mut state = self.lock_state();
        for (queue, post) in queues.iter().zip(&mut posts) {
            self.return_credits(queue.unprepay(post, queue.in_flight()));
        }
        state.prepaid = kept.iter().map(Arc::downgrade).collect();
        state.set_counts();
        // No queue is dropped under the locks.
        drop((state, posts));
    }

    /// Reserves `n` credits for good; false when the queue could overflow.
    pub(crate) fn reserve_credits(&self, n: u32) -> bool {
        self.take_credits(n) || {
            self.count_all();
            self.take_credits(n)
        }
    }

    /// Credits that posted work requests hold.
    fn credits_in_use(&self) -> u32 {
        let queues = self.lock_state().prepaid.clone();
        let idle = queues.iter().filter_map(Weak::upgrade).map(|queue| queue.idle_credits());
        let idle: u32 = idle.sum();
        self.in_use.load(Ordering::Relaxed).saturating_sub(idle)
    }

    /// Ready when there is a credit; otherwise a poll that returns some wakes.
    pub(crate) fn poll_credit(&self, cx: &mut TaskContext<'_>) -> Poll<()> {
        // Credits return under the same lock, so none can slip between look and registration.
        let mut state = self.state.lock();
        if self.has_credit() {
            return Poll::Ready(());
        }
        if !state.credit_waiters.iter().any(|w| w.will_wake(cx.waker())) {
            state.credit_waiters.push(cx.waker().clone());
        }
        state.set_quiet(false);
        Poll::Pending
    }
}

impl Drop for CqInner {
    fn drop(&mut self) {
        if let Some(channel) = &self.channel {
            channel.forget_queue(self.key);
        }
        // SAFETY: created by `create`, destroyed once; queue pairs hold an Arc (S-1). Events were
        // acknowledged, so this does not wait for any.
        let code = unsafe { (self.context.verbs.ibv_destroy_cq)(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_destroy_cq", code) {
            leak(&error);
            std::mem::forget((Arc::clone(&self.context), self.channel.clone()));
        }
    }
}

impl std::fmt::Debug for CqInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompletionQueue")
            .field("capacity", &self.capacity)
            .field("in_use", &self.in_use)
            .finish_non_exhaustive()
    }
}

/// Places of a completion queue that are kept for receives: see [`CompletionQueue::keep_places`]. What no queue pair took is given back
/// when this is dropped.
#[derive(Debug)]
pub struct KeptPlaces {
    cq: Arc<CqInner>,
    count: AtomicU32,
}

impl KeptPlaces {
    /// Whether no request in flight has one of them any more.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.cq.in_use.load(Ordering::Relaxed) <= self.cq.capacity.load(Ordering::Relaxed)
    }

    /// Whether so many places of this queue are there to be taken.
    pub(crate) fn has(&self, cq: &Arc<CqInner>, count: u32) -> bool {
        Arc::ptr_eq(&self.cq, cq) && self.is_ready() && self.count.load(Ordering::Relaxed) >= count
    }

    /// A queue pair takes so many of those that are there.
    pub(crate) fn take(&self, count: u32) -> bool {
        let take = |kept: u32| kept.checked_sub(count);
        self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

impl Drop for KeptPlaces {
    fn drop(&mut self) {
        self.cq.release_credits(*self.count.get_mut());
    }
}

/// What to be told of on the completion channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// The next completion.
    Any,
    /// The next receive whose sender set the solicited flag, or the next error.
    Solicited,
}

/// How to make a completion queue; see [`Context::completion_queue`](crate::Context::completion_queue).
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build`"]
pub struct CompletionQueueBuilder<'a> {
    context: &'a Arc<ContextInner>,
    depth: u32,
    channel: Option<&'a CompletionChannel>,
    vector: u32,
    user: u64,
    clock: Option<CompletionClock>,
}

impl<'a> CompletionQueueBuilder<'a> {
    pub(crate) fn new(context: &'a Arc<ContextInner>, depth: u32) -> CompletionQueueBuilder<'a> {
        CompletionQueueBuilder { context, depth, channel: None, vector: 0, user: 0, clock: None }
    }

    /// Reports completions on `channel` when armed.
    pub fn channel(mut self, channel: &'a CompletionChannel) -> Self {
        self.channel = Some(channel);
        self
    }

    /// The completion vector (interrupt) to use: below
    /// [`Context::completion_vectors`](crate::Context::completion_vectors). 0 unless set.
    pub fn vector(mut self, vector: u32) -> Self {
        self.vector = vector;
        self
    }

    /// A number of the caller's, given back by [`CompletionQueue::user`].
    pub fn user(mut self, user: u64) -> Self {
        self.user = user;
        self
    }

    /// Stamps completions by this clock: [`Success::timestamp`]. The queue is then an extended one (`man
    /// ibv_create_cq_ex`), whose polls cost more.
    pub fn timestamps(mut self, clock: CompletionClock) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Creates it (`man ibv_create_cq`).
    ///
    /// # Errors
    ///
    /// What `ibv_create_cq` says; [`Error::Unsupported`] for timestamps that the provider has not.
    pub fn build(self) -> Result<CompletionQueue, Error> {
        let context = self.context;
        let too_many =
            |_| Error::Invalid { what: format!("{} is more than a completion queue holds", self.depth) };
        let depth = i32::try_from(self.depth).map_err(too_many)?;
        let vector = i32::try_from(self.vector).map_err(too_many)?;
        let channel = self.channel.map(|channel| Arc::clone(&channel.inner));
        let key = channel.as_ref().map_or(0, |channel| channel.reserve_key());
        let raw_channel = channel.as_ref().map_or(std::ptr::null_mut(), |channel| channel.ptr.as_ptr());
        let cookie = std::ptr::without_provenance_mut(key);
        let (extended, ptr) = match self.clock {
            None => {
                // SAFETY: context and channel are live (S-1).
                let ptr = unsafe {
                    (context.verbs.ibv_create_cq)(context.ptr.as_ptr(), depth, cookie, raw_channel, vector)
                };
                (None, NonNull::new(ptr).ok_or_else(|| Error::last("ibv_create_cq"))?)
            }
            Some(clock) => {
                let Self { depth, vector, .. } = self;
                let wanted = Wanted { depth, cookie, channel: raw_channel, vector };
                let (extended, ptr) = Extended::create(context, clock, &wanted)?;
                (Some(extended), ptr)
            }
        };
        // SAFETY: just created.
        let granted = unsafe { ptr.as_ref() }.cqe;
        let inner = Arc::new(CqInner {
            ptr,
            poll_cq: if extended.is_some() { extended::nothing } else { context.data_path.poll_cq },
            entries: NonNull::from(context.queues.entries()),
            extended,
            context: Arc::clone(context),
            channel,
            key,
            user: self.user,
            in_use: AtomicU32::new(0),
            capacity: AtomicU32::new(u32::try_from(granted).unwrap_or(self.depth)),
            state: Mutex::default(),
            counting: Mutex::new(false),
            stray: AtomicU64::new(0),
        });
        if let Some(channel) = &inner.channel {
            channel.add_queue(key, &inner);
        }
        inner.lock_state().set_extended(inner.extended.is_some());
        context.queues.add_cq(&inner);
        Ok(CompletionQueue { inner })
    }
}

/// A completion queue (`man ibv_create_cq`).
///
/// It cannot overflow: every posted work request holds a *credit*, which returns when its completion was
/// polled; without one a post says [`QueueFull`](crate::PostErrorKind::QueueFull). Cloning gives
/// another handle to the same queue.
#[derive(Debug, Clone)]
pub struct CompletionQueue {
    pub(crate) inner: Arc<CqInner>,
}

impl CompletionQueue {
    /// Completions that one poll reads at most. A poll that read fewer left the queue empty (`man ibv_poll_cq`): another
    /// one would only cost a device in software a look at its socket.
    pub const BATCH: usize = poll::BATCH;

    /// Polls once (`man ibv_poll_cq`), hands what belongs to an
    /// [`Operation`](crate::inflight::Operation) to its owner, and lends the rest: first what other
    /// pollers left behind, then what came now.
    ///
    /// Any number of threads may poll; each completion goes to one of them. Reuse `completions`: its
    /// storage stays, so that polling does not allocate. Buffers not taken from a completion are dropped with it.
    ///
    /// ```
    /// # fn f(cq: &rdma_core::CompletionQueue) -> Result<(), rdma_core::Error> {
    /// let mut completions = rdma_core::Completions::new();
    /// for completion in cq.poll(&mut completions)? {
    ///     match completion.result() {
    ///         Ok(success) => println!("{} done: {} bytes", completion.id(), success.len()),
    ///         Err(error) => println!("{} failed: {error}", completion.id()),
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`PollError`]: the provider could not read the queue. No completion was lost, no buffer freed.
    #[inline]
    pub fn poll<'c>(&self, completions: &'c mut Completions) -> Result<Lent<'c>, PollError> {
        let lot = self.inner.poll_into(completions)?;
        // SAFETY: just polled.
        Ok(unsafe { completions.lend(lot, 0) })
    }

    /// As [`poll`](CompletionQueue::poll), but offers successes of one buffer to `take` first, in order; the first one that it gives back is
    /// lent with all that follow. `None` if it took all. For a driver: one that knows at once where a completion belongs saves storing it.
    ///
    /// `take` is called with this queue locked: it must not use the queue, nor drop a buffer that has a [home](crate::BufferHome). If it
    /// panics, completions that it was not offered yet are those of operations that never end.
    ///
    /// # Errors
    ///
    /// As [`poll`](CompletionQueue::poll).
    #[doc(hidden)]
    #[inline(always)]
    pub fn poll_with<'c>(
        &self,
        completions: &'c mut Completions,
        take: impl for<'o> FnMut(Offer<'o>) -> Option<Offer<'o>>,
    ) -> Option<Result<Lent<'c>, PollError>> {
        let result = self.inner.offer_into(completions, take)?;
        // SAFETY: just polled, and so many were taken.
        Some(result.map(|(taken, lot)| unsafe { completions.lend(lot, taken) }))
    }

    /// Polls once and lends nothing: completions of operations go to their owners, others wait for
    /// [`poll`](CompletionQueue::poll). For a driver that only wakes. Gives the number of completions
    /// read.
    ///
    /// # Errors
    ///
    /// As [`poll`](CompletionQueue::poll).
    #[inline]
    pub fn dispatch(&self) -> Result<usize, PollError> {
        self.inner.dispatch()
    }

    /// Asks for an event on the channel at the next completion (`man ibv_req_notify_cq`).
    ///
    /// Completions that are in the queue already raise none: arm, then poll until empty, then sleep.
    ///
    /// # Errors
    ///
    /// What `ibv_req_notify_cq` says.
    pub fn arm(&self, notify: Notify) -> Result<(), Error> {
        let solicited = i32::from(notify == Notify::Solicited);
        // SAFETY: the queue is live (S-1).
        let code = unsafe { inline::ibv_req_notify_cq(self.inner.ptr.as_ptr(), solicited) };
        Error::check("ibv_req_notify_cq", code)
    }

    /// The channel it reports on.
    #[must_use]
    pub fn channel(&self) -> Option<CompletionChannel> {
        self.inner.channel.as_ref().map(|inner| CompletionChannel { inner: Arc::clone(inner) })
    }

    /// The number given at creation.
    #[must_use]
    pub fn user(&self) -> u64 {
        self.inner.user
    }

    /// Completions it holds: at least what was asked for.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.inner.capacity.load(Ordering::Relaxed)
    }

    /// Credits that posted work requests hold.
    #[must_use]
    pub fn credits_in_use(&self) -> u32 {
        self.inner.credits_in_use()
    }

    /// Keeps places for the receives of a queue pair that is to be made, see
    /// [`QueuePairBuilder::keep_receives`](crate::QueuePairBuilder::keep_receives). Those that requests in flight have are handed over when
    /// they complete, and until [all are there](KeptPlaces::is_ready) no other request gets one. Of more places than there are, no queue pair
    /// is ever made.
    #[must_use]
    pub fn keep_places(&self, count: u32) -> KeptPlaces {
        KeptPlaces { cq: Arc::clone(&self.inner), count: AtomicU32::new(self.inner.claim_credits(count)) }
    }

    /// Completions that named no work request in flight, and were dropped: repeated, late or invented.
    #[must_use]
    pub fn stray_completions(&self) -> u64 {
        self.inner.stray.load(Ordering::Relaxed)
    }

    /// Changes the depth (`man ibv_resize_cq`); the provider may grant more.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] when posted work requests hold more credits than that; what `ibv_resize_cq` says.
    pub fn resize(&self, depth: u32) -> Result<(), Error> {
        let invalid = |_| Error::Invalid { what: format!("{depth} is more than a completion queue holds") };
        let raw = i32::try_from(depth).map_err(invalid)?;
        let inner = &self.inner;
        if depth < self.depth() {
            // Only credits in use stand in the way, not reserved ones.
            inner.count_all();
        }
        let _state = inner.state.lock();
        // Take the credits that are to vanish first, so that nobody posts on them meanwhile.
        let old = inner.capacity.load(Ordering::Relaxed);
        inner.capacity.store(old.min(depth), Ordering::SeqCst);
        if inner.in_use.load(Ordering::SeqCst) > depth {
            inner.capacity.store(old, Ordering::Relaxed);
            return Err(Error::InUse { what: "more credits of the completion queue than it would have" });
        }
        // SAFETY: the queue is live (S-1).
        let code = unsafe { (inner.context.verbs.ibv_resize_cq)(inner.ptr.as_ptr(), raw) };
        if let Err(error) = Error::check("ibv_resize_cq", code) {
            inner.capacity.store(old, Ordering::Relaxed);
            return Err(error);
        }
        // SAFETY: live; `cqe` changes under the lock we hold only.
        let granted = unsafe { (*inner.ptr.as_ptr()).cqe };
        inner.capacity.store(u32::try_from(granted).unwrap_or(depth), Ordering::Relaxed);
        Ok(())
    }

    /// Lets the device collect up to `count` completions or wait up to `period` microseconds before it
    /// raises an event (`man ibv_modify_cq`).
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`], or what `ibv_modify_cq` says.
    pub fn moderate(&self, count: u16, period: u16) -> Result<(), Error> {
        let mut attr = ibv_modify_cq_attr {
            attr_mask: ibv_cq_attr_mask::IBV_CQ_ATTR_MODERATE.0,
            moderate: ibv_moderate_cq { cq_count: count, cq_period: period },
        };
        // SAFETY: the queue is live (S-1), the attributes are complete.
        let code = unsafe { inline::ibv_modify_cq(self.inner.ptr.as_ptr(), &raw mut attr) };
        Error::check("ibv_modify_cq", code)
    }
}
