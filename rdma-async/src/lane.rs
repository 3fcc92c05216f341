//! One queue pair as futures see it: who waits for what was posted, and what arrived.

use std::{collections::VecDeque, sync::Arc, task::Waker};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use rdma_core::{
    Buffer, Completion, CompletionError, PostErrorKind, QueuePair, RecvRequest, WorkCompletion,
    qp::{state::Rts, transport::Transport},
};

use crate::{
    counters::{ConnectionCounters, Errors},
    error::{Ended, OperationError},
    line::Line,
    pool::BufferPool,
    queue::CompletionQueue,
    reader::{Deliver, Key, Later},
};

/// The number of a work request, below the lane's key, that is a receive.
const RECEIVE: u32 = Key::MAX_SLOT;

/// No entry.
const NONE: u32 = u32::MAX;

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
pub(crate) struct Lane<T: Transport> {
    pub(crate) queue: CompletionQueue,
    pub(crate) pool: BufferPool,
    key: Key,
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T: Transport> {
    state: Mutex<State<T>>,
}

/// What is under a lane's lock.
#[derive(Debug)]
pub(crate) struct State<T: Transport> {
    /// `None` before it is connected, and after it was destroyed.
    pub(crate) qp: Option<QueuePair<T, Rts>>,
    /// Why nothing is posted any more.
    pub(crate) ended: Option<Ended>,
    entries: Vec<Entry>,
    /// The first free entry.
    free: u32,
    /// Sends, writes, reads and atomics in flight.
    sends: u32,
    /// Receives posted that have not completed.
    receives: u32,
    receive_depth: u32,
    /// Messages that nobody has asked for yet, in order: a receive queue completes in the order of posting, which is the order in
    /// which messages arrive (IBTA vol. 1, 10.8.3.3).
    arrived: VecDeque<Arrival>,
    /// The first receive that failed: nothing arrives any more.
    pub(crate) receive_error: Option<CompletionError>,
    /// Futures that wait for a message.
    pub(crate) receivers: Line,
    /// Futures that wait for a place in the send queue.
    pub(crate) senders: Line,
    pub(crate) counters: ConnectionCounters,
    pub(crate) errors: Errors,
}

/// A message, or a datagram: its buffer, and what the completion says.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) buffer: Buffer,
    pub(crate) completion: WorkCompletion,
}

/// An operation, or a batch of them: from before its post until its future took the result.
#[derive(Debug)]
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

    fn add(&mut self, buffers: impl Iterator<Item = Buffer>) {
        for buffer in buffers {
            match &mut self.first {
                first @ None => *first = Some(buffer),
                Some(_) => self.rest.push(buffer),
            }
        }
    }
}

impl<T: Transport> Lane<T> {
    /// A lane without a queue pair, to whose key completions of `queue` are handed from now on.
    pub(crate) fn new(
        queue: &CompletionQueue,
        pool: BufferPool,
        send_depth: u32,
        receive_depth: u32,
    ) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                qp: None,
                ended: None,
                entries: Vec::with_capacity(send_depth as usize),
                free: NONE,
                sends: 0,
                receives: 0,
                receive_depth,
                arrived: VecDeque::with_capacity(receive_depth as usize),
                receive_error: None,
                receivers: Line::default(),
                senders: Line::default(),
                counters: ConnectionCounters::default(),
                errors: Errors::default(),
            }),
        });
        let key = queue.shared.add_lane(Arc::clone(&shared) as Arc<dyn Deliver>);
        Lane { queue: queue.clone(), pool, key, shared }
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
        self.key.id(RECEIVE)
    }

    /// The queue pair, to be destroyed outside of the lock.
    pub(crate) fn take_qp(&self) -> Option<QueuePair<T, Rts>> {
        self.lock().qp.take()
    }
}

impl<T: Transport> Drop for Lane<T> {
    fn drop(&mut self) {
        drop(self.take_qp());
        // What was in flight is read once more, so that its buffers come home. A queue that cannot be read keeps them until it goes.
        let _ = self.queue.shared.dispatch();
        self.queue.shared.remove_lane(self.key);
    }
}

impl<T: Transport> Deliver for Shared<T> {
    fn deliver(&self, slot: u32, completion: &mut Completion<'_>, later: &mut Later) {
        self.state.lock().deliver(slot, completion, later);
    }
}

impl<T: Transport> State<T> {
    /// Takes a completion of this lane.
    #[inline(always)]
    pub(crate) fn deliver(&mut self, slot: u32, completion: &mut Completion<'_>, later: &mut Later) {
        if slot != RECEIVE {
            return self.complete(slot, completion, later);
        }
        self.receives = self.receives.wrapping_sub(1);
        if !completion.completion().is_success() {
            return self.receive_failed(completion, later);
        }
        if let Some(buffer) = completion.take_buffer() {
            self.arrived.push_back(Arrival { buffer, completion: *completion.completion() });
        }
        if !self.receivers.is_empty() {
            later.wake(self.receivers.first());
        }
    }

    #[cold]
    fn receive_failed(&mut self, completion: &mut Completion<'_>, later: &mut Later) {
        if let (None, Err(error)) = (&self.receive_error, completion.result()) {
            if !error.is_flush() {
                self.errors.count(error.status());
            }
            self.receive_error = Some(error);
        }
        later.discard(completion);
        later.wake(self.receivers.all());
    }

    #[inline(never)]
    fn complete(&mut self, slot: u32, completion: &mut Completion<'_>, later: &mut Later) {
        // A number that nobody has: a provider cannot make one up, for what it says names a work request in flight.
        let Some(entry) = self.entries.get_mut(slot as usize).filter(|entry| entry.left > 0) else {
            return later.discard(completion);
        };
        self.sends = self.sends.wrapping_sub(1);
        entry.left -= 1;
        if entry.ignored {
            later.discard(completion);
            if entry.left == 0 {
                later.discard_bytes(entry.bytes.take());
                self.release(slot);
            }
            return;
        }
        match completion.result() {
            Ok(_) => self.counters.completed += 1,
            Err(error) => {
                self.counters.failed += 1;
                self.errors.count(error.status());
                entry.finished.failure.get_or_insert(error);
            }
        }
        entry.finished.add(completion.take_buffers());
        if entry.left == 0 {
            later.wake(entry.waker.take());
        }
    }

    /// Whether nothing may be posted any more; why not.
    #[cold]
    pub(crate) fn gone(&self) -> OperationError {
        self.ended.clone().unwrap_or(Ended::Closed).into()
    }

    /// The wakers of all who stand in line, to be called.
    pub(crate) fn all_in_line(&mut self) -> Vec<Waker> {
        self.senders.all().chain(self.receivers.all()).collect()
    }

    // ---- operations ----

    /// An entry for an operation that is about to be posted.
    #[inline(always)]
    pub(crate) fn allocate(&mut self) -> Option<u32> {
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
        let slot = u32::try_from(self.entries.len()).ok().filter(|&slot| slot < RECEIVE)?;
        self.entries.push(Entry {
            left: 0,
            next: NONE,
            ignored: false,
            bytes: None,
            waker: None,
            finished: Finished::default(),
        });
        Some(slot)
    }

    /// Gives an entry back, which holds nothing.
    #[inline(always)]
    pub(crate) fn release(&mut self, slot: u32) {
        if let Some(entry) = self.entries.get_mut(slot as usize) {
            entry.ignored = false;
            entry.next = self.free;
            self.free = slot;
        }
    }

    /// `count` work requests of the entry were posted.
    #[inline(always)]
    pub(crate) fn posted(&mut self, slot: u32, count: u32) {
        self.sends += count;
        self.counters.posted += u64::from(count);
        if let Some(entry) = self.entries.get_mut(slot as usize) {
            entry.left += count;
        }
    }

    /// The operation of this entry, of one buffer, succeeded: the entry is free again.
    #[inline(always)]
    pub(crate) fn succeeded(&mut self, slot: u32) {
        self.sends -= 1;
        self.counters.completed += 1;
        if let Some(entry) = self.entries.get_mut(slot as usize) {
            entry.left = 0;
            entry.next = self.free;
            self.free = slot;
        }
    }

    /// The result, if all completions came; then the entry is free again.
    pub(crate) fn finished(&mut self, slot: u32) -> Option<Finished> {
        let entry = self.entries.get_mut(slot as usize).filter(|entry| entry.left == 0)?;
        let finished = std::mem::take(&mut entry.finished);
        self.release(slot);
        Some(finished)
    }

    /// Registers the waker of an operation in flight; gives the one that was there before.
    pub(crate) fn register(&mut self, slot: u32, waker: &Waker) -> Option<Waker> {
        match &mut self.entries.get_mut(slot as usize)?.waker {
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
        let entry = self.entries.get_mut(slot as usize)?;
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
        self.sends + self.receives
    }

    // ---- receives ----

    /// The next message, if nobody asked before.
    #[inline(always)]
    pub(crate) fn take_arrived(&mut self) -> Option<Arrival> {
        self.arrived.pop_front()
    }

    pub(crate) fn has_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// Whether a message can still arrive without a buffer being posted.
    pub(crate) fn expects(&self) -> bool {
        self.receives > 0
    }

    /// A receive was posted before there was a connection.
    pub(crate) fn receive_posted(&mut self) {
        self.receives += 1;
        self.counters.receives_posted += 1;
    }

    /// Posts receives as long as the pool has buffers and the queue room. Gives a buffer that was not taken: what keeps a receive from
    /// being posted (the slot of one that completed a moment ago, a credit of a shared completion queue, the connection's end) shows
    /// when none is left.
    #[inline(always)]
    pub(crate) fn refill(&mut self, lane: &Lane<T>) -> Option<Buffer> {
        let room = self.receive_depth as usize;
        while self.receives as usize + self.arrived.len() < room {
            let buffer = lane.pool.try_acquire()?;
            if let Err((_, buffer)) = self.post_recv(lane, buffer) {
                return buffer;
            }
        }
        None
    }

    /// Posts a receive.
    #[inline(always)]
    pub(crate) fn post_recv(
        &mut self,
        lane: &Lane<T>,
        buffer: Buffer,
    ) -> Result<(), (OperationError, Option<Buffer>)> {
        let Some(qp) = self.qp.as_ref().filter(|_| self.ended.is_none()) else {
            return Err((self.gone(), Some(buffer)));
        };
        match qp.post_recv(RecvRequest::new(buffer).id(lane.receive_id())) {
            Ok(()) => {
                self.receives += 1;
                self.counters.receives_posted += 1;
                Ok(())
            }
            Err(error) => Err(refused(error.kind, error.request)),
        }
    }
}

#[cold]
fn refused(kind: PostErrorKind, request: RecvRequest) -> (OperationError, Option<Buffer>) {
    (kind.into(), request.into_payload().into_buffers().next())
}
