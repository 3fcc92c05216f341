//! The futures of receives.

use std::{
    future::Future,
    mem::ManuallyDrop,
    pin::Pin,
    task::{Context, Poll},
};

use parking_lot::MutexGuard;
use rdma_core::Buffer;

use crate::{
    error::OperationError,
    lane::{Carries, Lane, NONE, State},
    line::Ticket,
    operate::Owner,
    queue::yield_to_runtime,
    waiter::Waiter,
};

/// The owner of receives.
pub(crate) trait Receiver: Owner {
    /// Waits until nothing arrives any more; gives why.
    fn ended(&self) -> impl Future<Output = OperationError> + Send;
}

/// What arrives at a receiver.
type Mail<O> = <<O as Owner>::Transport as Carries>::Mail;

/// What a future in line found.
enum Found<Mail> {
    Mail(Mail),
    /// Nothing arrives any more.
    Error(OperationError),
    /// It is its turn, and no receive is posted: every buffer is elsewhere.
    Nothing,
}

/// A wait for a buffer of the pool, or for the end.
type Starved<'c> = Pin<Box<dyn Future<Output = Result<Buffer, OperationError>> + Send + 'c>>;

/// Waits for the next message. It is taken when the future is ready: one that is dropped before takes none.
pub(crate) struct Receive<'c, O: Receiver> {
    owner: &'c O,
    ticket: Ticket,
    /// After a poll that found nothing. Dropped by hand: most futures have none, and see that at a glance.
    wait: ManuallyDrop<Option<Wait<'c, Mail<O>>>>,
}

struct Wait<'c, Mail> {
    waiter: Waiter<'c>,
    /// It allocates, because it waits for somebody to drop a message.
    starved: Option<Starved<'c>>,
    /// What it found in the end; here, because a result that is returned by those who wait would be moved about by all others, too.
    found: Option<Result<Mail, OperationError>>,
}

impl<'c, O: Receiver> Receive<'c, O> {
    #[inline(always)]
    pub(crate) fn new(owner: &'c O) -> Self {
        Receive { owner, ticket: 0, wait: ManuallyDrop::new(None) }
    }

    /// See [`Future::poll`]. Inlined: most calls find a message, and are spared moving it about.
    #[inline(always)]
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Mail<O>, OperationError>> {
        let lane = self.owner.lane();
        let mut state = lane.lock();
        if state.is_enough_received() && self.wait.is_none() && state.has_arrived() {
            self.give_way(state, cx);
            return Poll::Pending;
        }
        match take(lane, &mut state, self.ticket) {
            Some(mail) => {
                if self.wait.is_some() {
                    self.end(state);
                }
                Poll::Ready(Ok(mail))
            }
            None => {
                self.look_on(state, cx);
                match self.wait.as_mut().and_then(|wait| wait.found.take()) {
                    Some(result) => Poll::Ready(result),
                    None => Poll::Pending,
                }
            }
        }
    }

    /// Not found at the first look.
    #[inline(never)]
    fn look_on(&mut self, state: MutexGuard<'c, State<O::Transport>>, cx: &mut Context<'_>) {
        if self.wait.is_none() {
            if state.receive_error.is_none()
                && state.expects()
                && let Some(waiter) = Waiter::asleep(&self.owner.lane().queue.shared)
            {
                return self.stand(waiter, state, cx);
            }
            self.begin(state, cx);
        } else {
            drop(state);
            self.go_on(cx);
        }
    }

    /// Stands in line.
    #[inline(always)]
    fn stand(
        &mut self,
        waiter: Waiter<'c>,
        mut state: MutexGuard<'c, State<O::Transport>>,
        cx: &mut Context<'_>,
    ) {
        // There is nothing to drop before.
        self.wait = ManuallyDrop::new(Some(Wait { waiter, starved: None, found: None }));
        self.ticket = state.receivers.stand_last(cx);
    }

    /// There may be a message, but others are to run first.
    #[cold]
    #[inline(never)]
    fn give_way(&mut self, mut state: MutexGuard<'c, State<O::Transport>>, cx: &mut Context<'_>) {
        state.give_turn_received();
        self.stand(Waiter::giving_way(&self.owner.lane().queue.shared), state, cx);
        yield_to_runtime(cx);
    }

    /// It has a message, because it came first, and waits no longer.
    #[inline(never)]
    fn end(&mut self, mut state: MutexGuard<'_, State<O::Transport>>) {
        if state.receivers.leave_empty(&mut self.ticket) {
            drop(state);
        } else {
            leave(state, &mut self.ticket);
        }
        if let Some(wait) = &mut *self.wait {
            wait.waiter.found();
            wait.starved = None;
        }
        // What is left need not be dropped.
        self.wait = ManuallyDrop::new(None);
    }

    /// The first poll found nothing.
    #[inline(never)]
    fn begin(&mut self, state: MutexGuard<'c, State<O::Transport>>, cx: &mut Context<'_>) {
        if state.receive_error.is_none()
            && state.expects()
            && let Some(waiter) = Waiter::relying(&self.owner.lane().queue.shared)
        {
            self.stand(waiter, state, cx);
            if self.wait.as_mut().is_some_and(|wait| wait.waiter.rests()) {
                return;
            }
            return self.go_on(cx);
        }
        let result = self.try_begin(state, cx);
        self.set(result);
    }

    /// A later poll found nothing.
    #[inline(never)]
    fn go_on(&mut self, cx: &mut Context<'_>) {
        let result = self.wait(cx);
        self.set(result);
    }

    fn set(&mut self, result: Poll<Result<Mail<O>, OperationError>>) {
        if let (Poll::Ready(result), Some(wait)) = (result, &mut *self.wait) {
            wait.found = Some(result);
        }
    }

    fn try_begin(
        &mut self,
        mut state: MutexGuard<'c, State<O::Transport>>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Mail<O>, OperationError>> {
        let lane = self.owner.lane();
        let waiter = Waiter::new(&lane.queue.shared);
        let wait = self.wait.insert(Wait { waiter, starved: None, found: None });
        if wait.waiter.sleeps_at_once() {
            lane.read(&mut state, NONE);
            if let Some(mail) = take(lane, &mut state, 0) {
                lane.after(state);
                return Poll::Ready(Ok(mail));
            }
            if state.receive_error.is_none() && state.expects() {
                self.ticket = state.receivers.stand_last(cx);
                lane.after(state);
                if let Ok(true) = wait.waiter.sleep() {
                    return Poll::Pending;
                }
            } else {
                lane.after(state);
            }
        } else {
            drop(state);
        }
        self.wait(cx)
    }

    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Result<Mail<O>, OperationError>> {
        let (owner, lane) = (self.owner, self.owner.lane());
        let Some(wait) = &mut *self.wait else { return Poll::Pending };
        let result = std::task::ready!(wait.poll(owner, &mut self.ticket, cx));
        if self.ticket != 0 {
            leave(lane.lock(), &mut self.ticket);
        }
        Poll::Ready(result)
    }
}

impl<'c, M> Wait<'c, M> {
    fn poll<O: Receiver>(
        &mut self,
        owner: &'c O,
        ticket: &mut Ticket,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Mail<O>, OperationError>> {
        let mut starved = self.starved.is_some();
        loop {
            if starved {
                std::task::ready!(self.poll_starved(owner, ticket, cx))?;
            }
            let found = self.waiter.poll(cx, |cx| look(owner, ticket, cx));
            match std::task::ready!(found) {
                Ok(Found::Mail(mail)) => return Poll::Ready(Ok(mail)),
                Ok(Found::Error(error)) => return Poll::Ready(Err(error)),
                Ok(Found::Nothing) => starved = true,
                Err(error) => return Poll::Ready(Err(owner.unreadable(&error))),
            }
        }
    }

    /// Waits for a buffer, and posts it.
    #[cold]
    fn poll_starved<O: Receiver>(
        &mut self,
        owner: &'c O,
        ticket: &mut Ticket,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), OperationError>> {
        let lane = owner.lane();
        let mut state = lane.lock();
        if state.receive_error.is_some() {
            drop(state);
            self.starved = None;
            return Poll::Ready(Ok(()));
        }
        if let Some(buffer) = state.take_refused() {
            let posted = state.post_recv(lane, buffer);
            let posted = posted.map_err(|(error, buffer)| {
                state.keep_refused(buffer);
                error
            });
            return Poll::Ready(posted);
        }
        drop(state);
        let starved = self.starved.get_or_insert_with(|| {
            Box::pin(async move {
                tokio::select! {
                    biased;
                    error = owner.ended() => Err(error),
                    buffer = lane.pool.acquire() => Ok(buffer),
                }
            })
        });
        let Poll::Ready(buffer) = starved.as_mut().poll(cx) else {
            // Others come after this one, though it has not met a receive to wait for.
            let old = lane.lock().receivers.stand(ticket, cx);
            drop(old);
            return Poll::Pending;
        };
        self.starved = None;
        let buffer = buffer?;
        let mut state = lane.lock();
        if !state.is_missing() {
            // Others that starved had more luck; the buffer goes back once the lock is gone.
            drop(state);
            return Poll::Ready(Ok(()));
        }
        let posted = state.post_recv(lane, buffer);
        drop(state);
        Poll::Ready(posted.map_err(|(error, _buffer)| error))
    }
}

impl<O: Receiver> Drop for Receive<'_, O> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.wait.is_some() {
            give_up(self.owner.lane(), self.ticket, self.wait.take());
        }
    }
}

/// The future is dropped.
#[inline(never)]
fn give_up<T: Carries>(lane: &Lane<T>, mut ticket: Ticket, wait: Option<Wait<'_, T::Mail>>) {
    if ticket != 0 {
        leave(lane.lock(), &mut ticket);
    }
    drop(wait);
}

/// Takes what arrived, if it is the turn of the future with `ticket`.
#[inline(always)]
fn take<T: Carries>(lane: &Lane<T>, state: &mut State<T>, ticket: Ticket) -> Option<T::Mail> {
    if !state.receivers.is_turn(ticket) {
        return None;
    }
    state.take_arrived(lane)
}

/// Leaves the line, if it stands there, and wakes the next one if there is something for it.
fn leave<T: Carries>(mut state: MutexGuard<'_, State<T>>, ticket: &mut Ticket) {
    if *ticket == 0 {
        return;
    }
    let old = state.receivers.leave(ticket);
    let is_awaited = !state.has_arrived() && state.receive_error.is_none() && state.expects();
    let next = if is_awaited { None } else { state.receivers.first() };
    drop(state);
    drop(old);
    if let Some(next) = next {
        next.wake();
    }
}

/// Looks for a message; with a context stands in line.
fn look<O: Receiver>(owner: &O, ticket: &mut Ticket, cx: Option<&mut Context<'_>>) -> Poll<Found<Mail<O>>> {
    let lane = owner.lane();
    let mut state = lane.lock();
    if let Some(mail) = take(lane, &mut state, *ticket) {
        leave(state, ticket);
        return Poll::Ready(Found::Mail(mail));
    }
    if state.receivers.is_turn(*ticket) {
        if let Some(error) = state.receive_error.clone() {
            drop(state);
            return Poll::Ready(Found::Error(owner.failed(error)));
        }
        if !state.expects() {
            return Poll::Ready(Found::Nothing);
        }
    }
    let old = cx.map(|cx| state.receivers.stand(ticket, cx));
    drop(state);
    drop(old);
    Poll::Pending
}
