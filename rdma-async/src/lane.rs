//! One queue pair as futures see it: who waits for what was posted, and what arrived.

mod receives;

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Weak},
    task::Waker,
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use rdma_core::{
    Buffer, Completion, CompletionError, Lent, PollError, QueuePair, RecvRequest, Success, WorkCompletion,
    qp::{state::Rts, transport::Transport},
};
use tokio::sync::Notify;

use crate::{
    counters::{ConnectionCounters, Errors},
    error::{Ended, OperationError},
    line::Line,
    pool::BufferPool,
    queue::{CompletionQueue, Places},
    reader::{self, Deliver, Key, Later, Reader, Registered},
    trace,
    waiter::IN_A_ROW,
};

/// What arrives at a queue pair of a transport.
pub trait Carries: Transport {
    #[doc(hidden)]
    type Mail: fmt::Debug + Send + 'static;

    /// Of the buffer, which is to show what was received, and what the completion says.
    #[doc(hidden)]
    fn mail(buffer: Buffer, success: Success<'_>, completion: &WorkCompletion) -> Self::Mail;
}

/// The number of a work request, below the lane's key, that is a receive.
const RECEIVE: u32 = Key::MAX_SLOT;

/// The number of an operation that was posted when it was the only one.
const ONLY: u32 = Key::MAX_SLOT - 1;

/// No entry: the number of a receive, which no operation has.
pub(crate) const NONE: u32 = RECEIVE;

/// A queue pair, its operations and its receives.
///
/// Work requests are posted with their number, and whoever reads the completion queue hands each completion, with its buffers, to the
/// lane that its number names. So memory that a device may touch is `rdma-core`'s concern alone; what is kept here are results, and
/// wakers. All of it is under one lock per queue pair, which costs less than several atomic words would.
///
/// # Locks
///
/// Whoever reads a completion queue holds its lock and takes those of lanes, one at a time. Whoever holds a lane's may only *try* to
/// read. No waker is called, and nothing dropped that is not ours, under either: see [`Later`].
#[derive(Debug)]
pub(crate) struct Lane<T: Carries> {
    pub(crate) queue: CompletionQueue,
    pub(crate) pool: BufferPool,
    key: Key,
    /// The number of a receive.
    receive_id: u64,
    shared: Arc<Shared<T>>,
    /// Given back when the queue pair is gone.
    _places: Places,
}

#[derive(Debug)]
struct Shared<T: Carries> {
    state: Mutex<State<T>>,
    /// Notified when `State::ended` is set.
    end: Notify,
}

/// A queue pair that can be ended, whatever its transport.
pub(crate) trait Watched: Send + Sync {
    /// Flushes what is in flight, and refuses what is posted later. The first reason counts.
    fn end(&self, reason: Ended);
}

/// What is under a lane's lock.
#[derive(Debug)]
pub(crate) struct State<T: Carries> {
    /// `None` before it is connected, and after it was destroyed.
    pub(crate) qp: Option<QueuePair<T, Rts>>,
    /// Why nothing is posted any more.
    pub(crate) ended: Option<Ended>,
    /// The entry of `ONLY`, apart from the others because most operations are the only one.
    only: Entry,
    is_only_free: bool,
    entries: Vec<Entry>,
    /// The first free entry.
    free: u32,
    /// Sends, writes, reads and atomics in flight.
    sends: u32,
    /// Of those that were posted, how many ended when nobody waited for them any more.
    abandoned: u64,
    /// Empty between calls: kept for its storage, for receives that are posted at once.
    requests: Vec<RecvRequest>,
    /// A buffer whose receive was not accepted.
    refused: Option<Buffer>,
    /// Receives that are posted, or to be posted, or whose message nobody has asked for yet.
    receive_depth: u32,
    /// The same, or 0 when the queue pair is gone: nothing arrives any more.
    expected_depth: u32,
    /// Of those, how many are to be posted.
    missing: u32,
    /// Receives that failed.
    receives_failed: u64,
    /// The message that nobody has asked for yet, and those behind it, in order: a receive queue completes in the order of posting,
    /// which is the order in which messages arrive (IBTA vol. 1, 10.8.3.3).
    arrived: Option<T::Mail>,
    more: VecDeque<T::Mail>,
    /// The first receive that failed: nothing arrives any more.
    pub(crate) receive_error: Option<CompletionError>,
    /// Futures that wait for a message.
    pub(crate) receivers: Line,
    /// Futures that wait for a place in the send queue.
    pub(crate) senders: Line,
    /// Whoever has the lock read completions, and is to wake somebody when it lets go.
    has_put_off: bool,
    /// So is the reader: see `reader::run`.
    has_reader_put_off: bool,
    /// Operations that succeeded, and messages that were handed out, and one more: to be a multiple of something takes less to see than to be
    /// one less than it, and the first is none.
    succeeded: u64,
    received: u64,
    /// Of either count, how many are turns of others instead: each is given once, also if the future that gave it is dropped.
    turns: [u64; 2],
    /// How often `IN_A_ROW` had passed when a batch last let others run.
    turn_of_batches: u64,
    failed: u64,
    pub(crate) keep_alives: u64,
    pub(crate) errors: Errors,
}

/// An operation, or a batch of them: from before its post until its future took the result.
#[derive(Debug, Default)]
struct Entry {
    /// Completions still to come.
    left: u32,
    /// While it is free, the next one that is.
    next: u32,
    /// Its future was dropped.
    ignored: bool,
    /// What that sent: dropped when it is done, outside of locks.
    bytes: Option<Bytes>,
    waker: Option<Waker>,
    finished: Finished,
}

/// What an operation ended with.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    /// The first failure.
    pub(crate) failure: Option<CompletionError>,
    first: Option<Buffer>,
    rest: Vec<Buffer>,
}

impl Finished {
    /// The buffers that came back, in the order of posting.
    pub(crate) fn into_buffers(self) -> impl Iterator<Item = Buffer> {
        self.first.into_iter().chain(self.rest)
    }

    /// The same, of a batch.
    pub(crate) fn into_vec(self) -> Vec<Buffer> {
        match self.first {
            None => self.rest,
            Some(first) => [first].into_iter().chain(self.rest).collect(),
        }
    }

    #[inline(always)]
    fn add(&mut self, completion: &mut Completion<'_>) {
        if completion.is_single() {
            if let Some(buffer) = completion.take_buffer() {
                self.keep(buffer);
            }
            return;
        }
        for buffer in completion.take_buffers() {
            self.keep(buffer);
        }
    }

    #[inline(always)]
    fn keep(&mut self, buffer: Buffer) {
        // A batch's are all kept in the place made for them.
        match &mut self.first {
            first @ None if self.rest.capacity() == 0 => *first = Some(buffer),
            _ => self.rest.push(buffer),
        }
    }
}

impl<T: Carries> Lane<T> {
    /// A lane without a queue pair, to whose key completions of `queue` are handed from now on.
    ///
    /// `places` are those kept for its receives.
    pub(crate) fn new(
        queue: &CompletionQueue,
        pool: BufferPool,
        places: Places,
        send_depth: u32,
        receive_depth: u32,
    ) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                qp: None,
                ended: None,
                only: Entry::default(),
                is_only_free: true,
                entries: Vec::with_capacity(send_depth as usize),
                free: NONE,
                sends: 0,
                abandoned: 0,
                requests: Vec::new(),
                refused: None,
                receive_depth,
                expected_depth: receive_depth,
                missing: receive_depth,
                receives_failed: 0,
                arrived: None,
                more: VecDeque::with_capacity(receive_depth as usize),
                receive_error: None,
                receivers: Line::default(),
                senders: Line::default(),
                has_put_off: false,
                has_reader_put_off: false,
                succeeded: 1,
                received: 1,
                turns: [0; 2],
                turn_of_batches: 0,
                failed: 0,
                keep_alives: 0,
                errors: Errors::default(),
            }),
            end: Notify::new(),
        });
        let key = queue.shared.add_lane(Arc::clone(&shared) as Arc<dyn Deliver>);
        Lane { queue: queue.clone(), pool, key, receive_id: key.id(RECEIVE), shared, _places: places }
    }

    #[inline(always)]
    pub(crate) fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.shared.state.lock()
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> Key {
        self.key
    }

    /// The number of a receive.
    #[inline(always)]
    pub(crate) fn receive_id(&self) -> u64 {
        self.receive_id
    }

    /// Reads completions, for a future that holds this lane's lock: one lock less, and the future's own is found at once. `own` is an
    /// operation of one buffer that was just posted, and is not counted yet, or `NONE`: gives its buffer if it succeeded. A queue that cannot
    /// be read shows again when the future waits. When somebody else reads right now, they will find it. [`Lane::after`] must follow.
    ///
    /// Not inlined: the loop needs all registers.
    #[inline(never)]
    pub(crate) fn read(&self, state: &mut State<T>, own: u32) -> Option<Buffer> {
        let Some(mut guard) = self.queue.shared.reader.try_lock() else {
            state.posted_at(own);
            return None;
        };
        let Reader { completions, lanes, later, .. } = &mut *guard;
        let mut found = None;
        let lent = self.queue.shared.cq.poll_with(completions, |offer| {
            let number = self.key.below(offer.id());
            if number == u64::from(RECEIVE) {
                let (buffer, success, completion) = offer.into_parts();
                state.arrive(buffer, success, completion);
                if !state.receivers.is_empty() {
                    state.has_put_off = true;
                }
            } else if number == u64::from(own) {
                // It is the first: a number has one completion.
                std::mem::forget(found.replace(offer.into_parts().0));
            } else {
                return Some(offer);
            }
            None
        });
        match lent {
            None => match &found {
                Some(_) => state.succeed(own),
                None => state.posted_at(own),
            },
            Some(lent) => self.hand_on(lanes, later, state, lent, (own, found.is_some())),
        }
        if later.any {
            (state.has_put_off, state.has_reader_put_off) = (true, true);
        }
        found
    }

    /// Hands on completions that `read` did not expect.
    #[inline(never)]
    fn hand_on(
        &self,
        lanes: &[Registered],
        later: &mut Later,
        state: &mut State<T>,
        lent: Result<Lent<'_>, PollError>,
        (own, is_found): (u32, bool),
    ) {
        if is_found {
            state.succeed(own);
        } else {
            state.posted_at(own);
        }
        let Ok(mut lent) = lent else { return };
        let mut next = lent.next();
        while let Some(completion) = next {
            let id = completion.id();
            next = if self.key.is_of(id) {
                let waker = state.deliver(Key::slot(id), completion, later);
                later.wake(waker);
                lent.next()
            } else {
                reader::hand_over(lanes, completion, &mut lent, later)
            };
        }
    }

    /// Why nothing is posted any more, if so.
    pub(crate) fn why_ended(&self) -> Option<Ended> {
        self.lock().ended.clone()
    }

    /// Waits until it has ended.
    pub(crate) async fn until_ended(&self) -> Ended {
        loop {
            let mut end = std::pin::pin!(self.shared.end.notified());
            end.as_mut().enable();
            if let Some(reason) = self.why_ended() {
                return reason;
            }
            end.await;
        }
    }

    /// See [`Watched::end`].
    pub(crate) fn end(&self, reason: Ended) {
        self.shared.end(reason);
    }

    /// For whoever watches over it.
    pub(crate) fn watched(&self) -> Weak<dyn Watched> {
        Arc::downgrade(&self.shared) as Weak<dyn Watched>
    }

    /// The queue pair, to be destroyed outside of the lock.
    pub(crate) fn take_qp(&self) -> Option<QueuePair<T, Rts>> {
        self.lock().qp.take()
    }

    /// Lets go of the lock, and does what `read` has put off.
    #[inline(always)]
    pub(crate) fn after(&self, state: MutexGuard<'_, State<T>>) {
        if state.has_put_off {
            self.wake(state);
        }
    }

    #[inline(never)]
    fn wake(&self, mut state: MutexGuard<'_, State<T>>) {
        state.has_put_off = false;
        if state.has_reader_put_off {
            return self.wake_and_run(state);
        }
        let waker = state.receivers.first();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// As `wake`, and runs what the reader has put off.
    #[inline(never)]
    fn wake_and_run(&self, mut state: MutexGuard<'_, State<T>>) {
        state.has_reader_put_off = false;
        let waker = if state.has_arrived() { state.receivers.first() } else { None };
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        reader::run(&self.queue.shared.reader);
    }
}

impl<T: Carries> Drop for Lane<T> {
    fn drop(&mut self) {
        drop(self.take_qp());
        // What was in flight is read once more, so that its buffers come home. A queue that cannot be read keeps them until it goes.
        let _ = self.queue.shared.dispatch();
        self.queue.shared.remove_lane(self.key);
    }
}

impl<T: Carries> Watched for Shared<T> {
    fn end(&self, reason: Ended) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        if let Some(qp) = &state.qp {
            trace::ended(qp.num(), &reason);
            if let Err(error) = qp.abort() {
                // It is destroyed when operations do not end.
                trace::abort_failed(qp.num(), &error);
            }
        }
        state.ended = Some(reason);
        let State { senders, receivers, .. } = &mut *state;
        let waiting: Vec<_> = senders.all().chain(receivers.all()).collect();
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
        self.end.notify_waiters();
    }
}

impl<T: Carries> Deliver for Shared<T> {
    fn deliver<'c>(
        &self,
        first: Completion<'c>,
        rest: &mut Lent<'c>,
        later: &mut Later,
    ) -> Option<Completion<'c>> {
        let key = Key::of(first.id());
        let mut state = self.state.lock();
        let mut completion = first;
        loop {
            // Mostly nobody is to be woken: the first of several messages, and the last of a batch, called whoever waits.
            if let Some(waker) = state.deliver(Key::slot(completion.id()), completion, later) {
                later.wake([waker]);
            }
            completion = rest.next()?;
            if !key.is_of(completion.id()) {
                return Some(completion);
            }
        }
    }

    fn wake_all(&self, later: &mut Later) {
        let mut state = self.state.lock();
        let State { only, entries, senders, receivers, .. } = &mut *state;
        let operations = entries.iter_mut().chain([only]).filter_map(|entry| entry.waker.take());
        later.wake(operations.chain(senders.all()).chain(receivers.all()));
    }
}

impl<T: Carries> State<T> {
    /// Takes a completion of this lane. Gives the waker of who waits for it, to be called.
    #[inline(always)]
    pub(crate) fn deliver(
        &mut self,
        slot: u32,
        mut completion: Completion<'_>,
        later: &mut Later,
    ) -> Option<Waker> {
        if slot != RECEIVE {
            return self.complete(slot, completion, later);
        }
        // A receive is posted with a buffer.
        let buffer = if completion.completion().is_success() { completion.take_buffer() } else { None };
        if let (Some(buffer), Ok(success)) = (buffer, completion.result()) {
            self.arrive(buffer, success, completion.completion());
            self.receivers.first()
        } else {
            self.receive_failed(completion, later);
            None
        }
    }

    /// A receive succeeded.
    #[inline(always)]
    fn arrive(&mut self, buffer: Buffer, success: Success<'_>, completion: &WorkCompletion) {
        let mail = T::mail(buffer, success, completion);
        if self.arrived.is_none() {
            self.arrived = Some(mail);
        } else {
            self.more.push_back(mail);
        }
    }

    #[cold]
    #[inline(never)]
    fn receive_failed(&mut self, completion: Completion<'_>, later: &mut Later) {
        if let (None, Err(error)) = (&self.receive_error, completion.result()) {
            if !error.is_flush() {
                self.errors.count(error.status());
            }
            self.receive_error = Some(error);
        }
        self.receives_failed += 1;
        self.missing += 1;
        later.discard(completion);
        later.wake(self.receivers.all());
    }

    #[inline(always)]
    fn complete(&mut self, slot: u32, mut completion: Completion<'_>, later: &mut Later) -> Option<Waker> {
        // A number that nobody has: a provider cannot make one up, for what it says names a work request in flight.
        let entry = if slot == ONLY { Some(&mut self.only) } else { self.entries.get_mut(slot as usize) };
        let Some(entry) = entry.filter(|entry| entry.left > 0) else {
            later.discard(completion);
            return None;
        };
        self.sends = self.sends.wrapping_sub(1);
        entry.left -= 1;
        if entry.ignored {
            self.abandoned += 1;
            later.discard(completion);
            if entry.left == 0 {
                later.discard_bytes(entry.bytes.take());
                self.release(slot);
            }
            return None;
        }
        if completion.completion().is_success() {
            self.succeeded += 1;
        } else if let Err(error) = completion.result() {
            self.failed += 1;
            self.errors.count(error.status());
            entry.finished.failure.get_or_insert(error);
        }
        entry.finished.add(&mut completion);
        if entry.left == 0 { entry.waker.take() } else { None }
    }

    /// Whether nothing may be posted any more; why not.
    #[cold]
    pub(crate) fn gone(&self) -> OperationError {
        self.ended.clone().unwrap_or(Ended::Closed).into()
    }

    // ---- operations ----

    /// Whether the operation just posted is to let others run before it is looked for.
    #[inline(always)]
    pub(crate) fn is_enough(&self) -> bool {
        self.succeeded.is_multiple_of(IN_A_ROW)
    }

    /// The same of a message that has arrived.
    #[inline(always)]
    pub(crate) fn is_enough_received(&self) -> bool {
        self.received.is_multiple_of(IN_A_ROW)
    }

    /// Whether the batch that is to be posted is to let others run: the first after so many more operations.
    pub(crate) fn is_enough_of_batches(&mut self) -> bool {
        let turn = self.succeeded / IN_A_ROW;
        std::mem::replace(&mut self.turn_of_batches, turn) != turn
    }

    /// An operation lets others run.
    #[cold]
    pub(crate) fn give_turn(&mut self) {
        self.succeeded += 1;
        self.turns[0] += 1;
    }

    /// So does who waits for a message.
    #[cold]
    pub(crate) fn give_turn_received(&mut self) {
        self.received += 1;
        self.turns[1] += 1;
    }

    /// An entry for an operation that is posted, or given back, before the lock is let go: so `ONLY` need not be taken before `posted`.
    #[inline(always)]
    pub(crate) fn next_entry(&mut self) -> Option<u32> {
        if self.is_only_free { Some(ONLY) } else { self.allocate_other() }
    }

    /// An entry for an operation that is about to be posted.
    #[inline(always)]
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        if std::mem::take(&mut self.is_only_free) { Some(ONLY) } else { self.allocate_other() }
    }

    #[inline(never)]
    fn allocate_other(&mut self) -> Option<u32> {
        let slot = self.free;
        match self.entries.get_mut(slot as usize) {
            Some(entry) => {
                self.free = entry.next;
                Some(slot)
            }
            None => self.grow(),
        }
    }

    /// One more than the queue pair can have in flight: somebody has yet to take the results of others.
    #[cold]
    fn grow(&mut self) -> Option<u32> {
        let slot = u32::try_from(self.entries.len()).ok().filter(|&slot| slot < ONLY)?;
        self.entries.push(Entry::default());
        Some(slot)
    }

    #[inline(always)]
    fn entry(&mut self, slot: u32) -> Option<&mut Entry> {
        if slot == ONLY { Some(&mut self.only) } else { self.entries.get_mut(slot as usize) }
    }

    /// Gives an entry back, which holds nothing.
    #[inline(always)]
    pub(crate) fn release(&mut self, slot: u32) {
        if slot == ONLY {
            self.only.ignored = false;
            self.is_only_free = true;
        } else {
            self.release_other(slot);
        }
    }

    #[inline(never)]
    fn release_other(&mut self, slot: u32) {
        if let Some(entry) = self.entries.get_mut(slot as usize) {
            (entry.ignored, entry.left, entry.next) = (false, 0, self.free);
            self.free = slot;
        }
    }

    /// A batch of `count` is about to be posted with this entry: makes a place for its buffers, which its future is going to give as they
    /// are.
    pub(crate) fn expect(&mut self, slot: u32, count: usize) {
        if let Some(entry) = self.entry(slot).filter(|_| count > 1) {
            entry.finished.rest.reserve_exact(count);
        }
    }

    /// `count` work requests of the entry were posted.
    #[inline(always)]
    pub(crate) fn posted(&mut self, slot: u32, count: u32) {
        self.sends += count;
        if slot == ONLY {
            self.is_only_free = false;
        }
        if let Some(entry) = self.entry(slot) {
            entry.left += count;
        }
    }

    /// The operation of this entry, if it is one, was posted.
    #[inline(always)]
    fn posted_at(&mut self, slot: u32) {
        if slot != NONE {
            self.posted(slot, 1);
        }
    }

    /// An operation of one buffer that was just posted succeeded. It did not use its entry: `ONLY` was not taken, another one is given back.
    #[inline(always)]
    fn succeed(&mut self, slot: u32) {
        self.succeeded += 1;
        if slot != ONLY {
            self.release_other(slot);
        }
    }

    /// The result, if all completions came; then the entry is free again.
    pub(crate) fn finished(&mut self, slot: u32) -> Option<Finished> {
        let entry = self.entry(slot).filter(|entry| entry.left == 0)?;
        let finished = std::mem::take(&mut entry.finished);
        self.release(slot);
        Some(finished)
    }

    /// The buffer of an operation of one, if all completions came and it succeeded; then the entry is free again.
    #[inline]
    pub(crate) fn take_success(&mut self, slot: u32) -> Option<Buffer> {
        let entry = self.entry(slot).filter(|entry| entry.left == 0 && entry.finished.failure.is_none())?;
        // Of an operation that posts one buffer.
        debug_assert!(entry.finished.rest.is_empty(), "a list");
        let buffer = entry.finished.first.take()?;
        self.release(slot);
        Some(buffer)
    }

    /// Registers the waker of an operation in flight; gives the one that was there before.
    pub(crate) fn register(&mut self, slot: u32, waker: &Waker) -> Option<Waker> {
        match &mut self.entry(slot)?.waker {
            Some(old) if old.will_wake(waker) => None,
            place => place.replace(waker.clone()),
        }
    }

    /// The future of an operation, which sends `bytes`, was dropped. Gives what is to be dropped outside of the lock.
    pub(crate) fn ignore(
        &mut self,
        slot: u32,
        bytes: Option<Bytes>,
    ) -> Option<(Finished, Option<Waker>, Option<Bytes>)> {
        let entry = self.entry(slot)?;
        let (finished, waker) = (std::mem::take(&mut entry.finished), entry.waker.take());
        if entry.left == 0 {
            self.release(slot);
            return Some((finished, waker, bytes));
        }
        (entry.ignored, entry.bytes) = (true, bytes);
        Some((finished, waker, None))
    }

    pub(crate) fn sends_in_flight(&self) -> u32 {
        self.sends
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.sends + self.receives()
    }

    /// What happened so far.
    pub(crate) fn counters(&self) -> ConnectionCounters {
        let completed = self.succeeded - 1 - self.turns[0];
        let received = self.received - 1 - self.turns[1];
        ConnectionCounters {
            posted: completed + self.failed + self.abandoned + u64::from(self.sends),
            completed,
            failed: self.failed,
            receives_posted: received + self.receives_failed + u64::from(self.receive_depth - self.missing),
            received,
            keep_alives: self.keep_alives,
        }
    }
}
