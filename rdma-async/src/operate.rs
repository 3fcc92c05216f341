//! The futures of sends, writes, reads and atomics.
//!
//! They are written by hand: nearly always an operation of one buffer is posted at the first poll and completes at that or the
//! next, and a future of nested `async fn`s would cost more instructions than all the rest by being moved about.

use std::{
    future::Future,
    mem::{self, ManuallyDrop},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use parking_lot::MutexGuard;
use rdma_core::{
    Buffer, CompletionError, Error, Payload, PostError, PostErrorKind, ProtectionDomain, WorkRequest,
};

use crate::{
    error::{Ended, OperationError},
    lane::{Carries, Finished, Lane, NONE, State},
    line::Ticket,
    queue::yield_to_runtime,
    source::sealed::Source,
    waiter::Waiter,
};

/// Whose lane it is, and what failures mean there.
pub(crate) trait Owner: Send + Sync {
    type Transport: Carries;

    fn lane(&self) -> &Lane<Self::Transport>;

    /// An operation failed; gives the error for who waited for it.
    fn failed(&self, error: CompletionError) -> OperationError;

    /// The completion queue cannot be read: what is in flight must end without it.
    fn unreadable(&self, error: &Error) -> OperationError;
}

/// An operation's result, and its memory.
pub(crate) type Outcome<S> = (Result<(), OperationError>, S);

/// Makes the work request once the memory is known.
pub(crate) trait Request<T: Carries>:
    FnOnce(Payload<'static>) -> WorkRequest<'static, T> + Send + Unpin
{
}

impl<T: Carries, F: FnOnce(Payload<'static>) -> WorkRequest<'static, T> + Send + Unpin> Request<T> for F {}

/// An operation: not yet posted, posted, or waiting for what it needs to be posted.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Operate<'c, O: Owner, S: Source, F> {
    owner: &'c O,
    /// The longest source that may be sent.
    limit: usize,
    /// Until the first poll.
    start: Option<(S, F)>,
    /// After a first poll that it was not done with. Dropped by hand: most futures have none, and see that at a glance.
    wait: ManuallyDrop<Option<Wait<'c, O::Transport, S>>>,
}

struct Wait<'c, T: Carries, S: Source> {
    stage: Stage<'c, T, S>,
    waiter: Waiter<'c>,
    /// How it ended; here, because a result that is returned by those who wait would be moved about by all others, too.
    outcome: Option<Outcome<S>>,
}

enum Stage<'c, T: Carries, S: Source> {
    Done,
    Failed(Outcome<S>),
    Posted {
        slot: u32,
        kept: S::Kept,
    },
    /// Stands in line for a place in the send queue.
    Line {
        request: WorkRequest<'static, T>,
        kept: S::Kept,
        ticket: Ticket,
    },
    /// Waits for memory. It allocates, because it waits anyway, and because all others would pay for the room it needs.
    Memory(Pin<Box<dyn Future<Output = Outcome<S>> + Send + 'c>>),
}

impl<'c, O: Owner, S: Source + 'c, F: Request<O::Transport> + 'c> Operate<'c, O, S, F> {
    #[inline]
    pub(crate) fn new(owner: &'c O, limit: usize, source: S, request: F) -> Self {
        Operate { owner, limit, start: Some((source, request)), wait: ManuallyDrop::new(None) }
    }

    /// The first poll: posts, and looks whether what was posted is done already. `None` when it is not, or failed: see `wait`.
    #[inline(always)]
    fn start(&mut self, source: S, request: F, cx: &mut Context<'_>) -> Option<S> {
        let owner = self.owner;
        let lane = owner.lane();
        if source.len() > self.limit {
            return self.too_long(source);
        }
        let (payload, kept) = match source.split(&lane.pool) {
            Ok(split) => split,
            Err(source) => return self.wait_for_memory(source, request),
        };
        let mut state = lane.lock();
        // Whoever stands in line comes first.
        let slot = if state.senders.is_empty() && state.ended.is_none() { state.next_entry() } else { None };
        let (Some(slot), Some(qp)) = (slot, &state.qp) else {
            if let Some(slot) = slot {
                state.release(slot);
            }
            drop(state);
            return self.wait_for(Stage::Line { request: request(payload), kept, ticket: 0 });
        };
        if let Err(error) = qp.post_send(request(payload).id(lane.key().id(slot))) {
            state.release(slot);
            drop(state);
            return self.not_posted(error, kept);
        }
        if lane.queue.shared.duty.is_polled() || state.is_enough() {
            return self.rely(state, slot, kept, cx);
        }
        if !S::IS_BUFFER {
            state.posted(slot, 1);
        }
        let buffer = lane.read(&mut state, if S::IS_BUFFER { slot } else { NONE });
        lane.after(state);
        match buffer {
            Some(buffer) => Some(S::of_buffer(&kept, buffer)),
            None => self.wait_for(Stage::Posted { slot, kept }),
        }
    }

    /// What was posted is waited for, because somebody else looks for it, or others are to run first: leaves the waker. `None`, for it is not
    /// done.
    #[inline(never)]
    fn rely(
        &mut self,
        mut state: MutexGuard<'c, State<O::Transport>>,
        slot: u32,
        kept: S::Kept,
        cx: &mut Context<'_>,
    ) -> Option<S> {
        state.posted(slot, 1);
        let queue = &self.owner.lane().queue.shared;
        let (waiter, gives_way) = match Waiter::relying(queue) {
            Some(waiter) => (waiter, false),
            None if state.is_enough() => {
                state.give_turn();
                (Waiter::giving_way(queue), true)
            }
            None => (Waiter::new(queue), false),
        };
        let old = state.register(slot, cx.waker());
        drop(state);
        drop(old);
        if gives_way {
            yield_to_runtime(cx);
        }
        self.wait =
            ManuallyDrop::new(Some(Wait { stage: Stage::Posted { slot, kept }, waiter, outcome: None }));
        None
    }

    /// To be waited for. `None`, for it is not done.
    #[inline(never)]
    fn wait_for(&mut self, stage: Stage<'c, O::Transport, S>) -> Option<S> {
        let waiter = Waiter::new(&self.owner.lane().queue.shared);
        // There was none before.
        self.wait = ManuallyDrop::new(Some(Wait { stage, waiter, outcome: None }));
        None
    }

    #[cold]
    fn too_long(&mut self, source: S) -> Option<S> {
        let error = OperationError::TooLong { length: source.len(), limit: self.limit };
        self.wait_for(Stage::Failed((Err(error), source)))
    }

    #[cold]
    fn wait_for_memory(&mut self, source: S, request: F) -> Option<S> {
        let future = copy_and_operate(self.owner, source, request);
        self.wait_for(Stage::Memory(Box::pin(future)))
    }

    #[cold]
    fn not_posted(
        &mut self,
        error: PostError<WorkRequest<'static, O::Transport>>,
        kept: S::Kept,
    ) -> Option<S> {
        let PostError { kind, request } = error;
        self.wait_for(match kind {
            PostErrorKind::QueueFull => Stage::Line { request, kept, ticket: 0 },
            kind => Stage::Failed(refused(kind.into(), request, kept)),
        })
    }

    /// What was posted, of one buffer, if it succeeded meanwhile: nearly all that is left to later polls.
    #[inline(never)]
    fn done(&mut self) -> Option<S> {
        let Wait { stage: Stage::Posted { slot, kept }, waiter, .. } = self.wait.as_mut()? else {
            return None;
        };
        if !S::IS_BUFFER {
            return None;
        }
        let buffer = self.owner.lane().lock().take_success(*slot)?;
        waiter.found();
        let source = S::of_buffer(kept, buffer);
        // What is left need not be dropped.
        self.wait = ManuallyDrop::new(None);
        Some(source)
    }

    /// Not done at the first look.
    #[inline(never)]
    fn wait(&mut self, cx: &mut Context<'_>) {
        if let (Poll::Ready(outcome), Some(wait)) = (self.look_on(cx), &mut *self.wait) {
            wait.outcome = Some(outcome);
        }
    }

    #[inline]
    fn look_on(&mut self, cx: &mut Context<'_>) -> Poll<Outcome<S>> {
        let owner = self.owner;
        // Polled again after it was done.
        let Some(Wait { stage, waiter, .. }) = &mut *self.wait else { return Poll::Pending };
        if let Stage::Memory(future) = stage {
            return future.as_mut().poll(cx);
        }
        if let Stage::Line { ticket, .. } = stage
            && stands_behind(owner.lane(), ticket, cx)
        {
            return Poll::Pending;
        }
        match waiter.poll(cx, |cx| stage.check(owner, cx)) {
            Poll::Ready(Ok(outcome)) => Poll::Ready(outcome),
            Poll::Ready(Err(error)) => {
                owner.unreadable(&error);
                // What that flushed is read here; otherwise it ends when the queue pair is destroyed.
                let queue = &owner.lane().queue.shared;
                queue.read_out();
                let outcome = stage.check(owner, Some(cx));
                if outcome.is_pending() {
                    queue.look_again(cx);
                }
                outcome
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<'c, O: Owner, S: Source + 'c, F: Request<O::Transport> + 'c> Future for Operate<'c, O, S, F> {
    type Output = Outcome<S>;

    /// Inlined: nearly all calls are first ones.
    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome<S>> {
        let this = &mut *self;
        let done = match this.start.take() {
            Some((source, request)) => this.start(source, request, cx),
            None => this.done(),
        };
        if let Some(source) = done {
            return Poll::Ready((Ok(()), source));
        }
        if this.wait.as_mut().is_some_and(|wait| wait.waiter.rests()) {
            return Poll::Pending;
        }
        this.wait(cx);
        match this.wait.as_mut().and_then(|wait| wait.outcome.take()) {
            Some(outcome) => Poll::Ready(outcome),
            None => Poll::Pending,
        }
    }
}

impl<T: Carries, S: Source> Stage<'_, T, S> {
    /// Looks whether it is done; with a context leaves the waker where it will be called.
    fn check<O: Owner<Transport = T>>(
        &mut self,
        owner: &O,
        cx: Option<&mut Context<'_>>,
    ) -> Poll<Outcome<S>> {
        let lane = owner.lane();
        let mut tried = false;
        loop {
            match self {
                Stage::Posted { slot, .. } => {
                    let mut state = lane.lock();
                    let Some(finished) = state.finished(*slot) else {
                        let old = cx.map(|cx| state.register(*slot, cx.waker()));
                        drop(state);
                        drop(old);
                        return Poll::Pending;
                    };
                    drop(state);
                    let Stage::Posted { kept, .. } = mem::replace(self, Stage::Done) else { unreachable!() };
                    return Poll::Ready(outcome(owner, finished, kept));
                }
                Stage::Line { ticket, .. } => {
                    let mut state = lane.lock();
                    let is_turn = state.senders.is_turn(*ticket);
                    if state.ended.is_some() || is_turn {
                        drop(state);
                        if let Some(outcome) = self.post(lane) {
                            return Poll::Ready(outcome);
                        }
                        if !matches!(self, Stage::Line { .. }) {
                            continue;
                        }
                        state = lane.lock();
                        if state.ended.is_some() {
                            continue;
                        }
                    }
                    let (Stage::Line { ticket, .. }, Some(cx)) = (&mut *self, &cx) else {
                        return Poll::Pending;
                    };
                    let old = state.senders.stand(ticket, cx);
                    let is_turn = state.senders.is_turn(*ticket);
                    let queue = state.qp.as_ref().map(|qp| Arc::clone(qp.send_queue()));
                    drop(state);
                    drop(old);
                    let Some(queue) = queue.filter(|_| is_turn) else { return Poll::Pending };
                    if lane.queue.shared.poll_room(&queue, cx.waker()).is_pending() {
                        return Poll::Pending;
                    }
                    // There is room, and yet no place: others get their turn before the next attempt.
                    if mem::replace(&mut tried, true) {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                }
                Stage::Failed(_) => match mem::replace(self, Stage::Done) {
                    Stage::Failed(outcome) => return Poll::Ready(outcome),
                    _ => unreachable!("just seen"),
                },
                Stage::Done | Stage::Memory(_) => return Poll::Pending,
            }
        }
    }

    /// Posts what stands first in line. Stays there if there is no place.
    fn post(&mut self, lane: &Lane<T>) -> Option<Outcome<S>> {
        let Stage::Line { request, kept, mut ticket } = mem::replace(self, Stage::Done) else { return None };
        let mut state = lane.lock();
        let posted = post(&mut state, lane, request);
        if let Err((OperationError::Post(PostErrorKind::QueueFull), request)) = posted {
            *self = Stage::Line { request, kept, ticket };
            return None;
        }
        let wakers = leave(&mut state, &mut ticket);
        drop(state);
        wake(wakers);
        match posted {
            Ok(slot) => {
                *self = Stage::Posted { slot, kept };
                None
            }
            Err((error, request)) => Some(refused(error, request, kept)),
        }
    }
}

impl<O: Owner, S: Source, F> Drop for Operate<'_, O, S, F> {
    #[inline]
    fn drop(&mut self) {
        if self.wait.is_some() {
            give_up(self.owner.lane(), self.wait.take());
        }
    }
}

/// The future of an operation is dropped: what it posted is carried out, and nobody waits for it.
#[inline(never)]
fn give_up<T: Carries, S: Source>(lane: &Lane<T>, wait: Option<Wait<'_, T, S>>) {
    let Some(Wait { stage, waiter: _waiter, outcome: _outcome }) = wait else { return };
    match stage {
        Stage::Posted { slot, kept } => {
            let held = lane.lock().ignore(slot, S::bytes_of(kept));
            drop(held);
        }
        Stage::Line { mut ticket, .. } => {
            let wakers = leave(&mut lane.lock(), &mut ticket);
            wake(wakers);
        }
        Stage::Done | Stage::Failed(_) | Stage::Memory(_) => {}
    }
}

/// Whether others come first: then it stands behind them, and the one before it wakes it.
pub(crate) fn stands_behind<T: Carries>(lane: &Lane<T>, ticket: &mut Ticket, cx: &Context<'_>) -> bool {
    let mut state = lane.lock();
    if state.ended.is_some() || state.senders.is_turn(*ticket) {
        return false;
    }
    let old = state.senders.stand(ticket, cx);
    drop(state);
    drop(old);
    true
}

/// Leaves the line of senders. Gives the waker left there, and that of the next one, to be called.
pub(crate) fn leave<T: Carries>(state: &mut State<T>, ticket: &mut Ticket) -> (Option<Waker>, Option<Waker>) {
    if *ticket == 0 {
        return (None, None);
    }
    (state.senders.leave(ticket), state.senders.first())
}

/// Calls the second waker; the first one only has to be dropped outside of the lock.
pub(crate) fn wake((_, next): (Option<Waker>, Option<Waker>)) {
    if let Some(next) = next {
        next.wake();
    }
}

/// A work request that was not posted: why, and the request.
type Refused<T> = (OperationError, WorkRequest<'static, T>);

/// Posts a work request if the send queue has a place for it now; gives its entry.
#[expect(clippy::result_large_err, reason = "the error gives the request back")]
fn post<T: Carries>(
    state: &mut State<T>,
    lane: &Lane<T>,
    request: WorkRequest<'static, T>,
) -> Result<u32, Refused<T>> {
    if state.ended.is_some() || state.qp.is_none() {
        return Err((state.gone(), request));
    }
    let Some(slot) = state.allocate() else { return Err((PostErrorKind::QueueFull.into(), request)) };
    let Some(qp) = &state.qp else { return Err((state.gone(), request)) };
    match qp.post_send(request.id(lane.key().id(slot))) {
        Ok(()) => {
            state.posted(slot, 1);
            Ok(slot)
        }
        Err(error) => {
            state.release(slot);
            Err((error.kind.into(), error.request))
        }
    }
}

/// How a finished operation ended.
fn outcome<O: Owner, S: Source>(owner: &O, mut finished: Finished, kept: S::Kept) -> Outcome<S> {
    let result = match finished.failure.take() {
        None => Ok(()),
        Some(error) => Err(owner.failed(error)),
    };
    (result, S::rejoin(kept, finished.into_buffers()))
}

#[cold]
fn refused<T: Carries, S: Source>(
    error: OperationError,
    request: WorkRequest<'static, T>,
    kept: S::Kept,
) -> Outcome<S> {
    (Err(error), S::rejoin(kept, request.into_payload().into_buffers()))
}

/// Waits for memory to copy to, then carries out the operation.
async fn copy_and_operate<O: Owner, S: Source, F: Request<O::Transport>>(
    owner: &O,
    source: S,
    request: F,
) -> Outcome<S> {
    let lane = owner.lane();
    let mut copy = if source.len() <= lane.pool.buffer_size() {
        match acquire(lane).await {
            Ok(buffer) => buffer,
            Err(ended) => return (Err(ended.into()), source),
        }
    } else {
        match memory_of_its_own(lane.pool.domain(), source.len()) {
            Ok(buffer) => buffer,
            Err(error) => return (Err(OperationError::Verb(Arc::new(error))), source),
        }
    };
    copy.set_len(source.len());
    copy.copy_from_slice(source.bytes());
    let (result, _copy) = Operate::new(owner, usize::MAX, copy, request).await;
    (result, source)
}

/// The next idle buffer of the pool, unless the lane ends first: who keeps the others may wait for that.
pub(crate) async fn acquire<T: Carries>(lane: &Lane<T>) -> Result<Buffer, Ended> {
    if let Some(buffer) = lane.pool.try_acquire() {
        return Ok(buffer);
    }
    tokio::select! {
        biased;
        reason = lane.until_ended() => Err(reason),
        buffer = lane.pool.acquire() => Ok(buffer),
    }
}

/// Registered for one operation, which is too long for the pool.
fn memory_of_its_own(domain: &ProtectionDomain, length: usize) -> Result<Buffer, Error> {
    Ok(domain.allocate(length)?.into_buffer())
}
