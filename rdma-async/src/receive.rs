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
    /// After a first poll that found nothing.
    /// Dropped by hand, which costs a look.
    wait: ManuallyDrop<Option<Wait<'c>>>,
}

struct Wait<'c> {
    ticket: Ticket,
    waiter: Waiter<'c>,
    /// It allocates, because it waits for somebody to drop a message.
    starved: Option<Starved<'c>>,
}

impl<'c, O: Receiver> Receive<'c, O> {
    #[inline]
    pub(crate) fn new(owner: &'c O) -> Self {
        Receive { owner, wait: ManuallyDrop::new(None) }
    }

    /// See [`Future::poll`].
    #[inline]
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Mail<O>, OperationError>> {
        if self.wait.is_none() {
            let lane = self.owner.lane();
            let mut state = lane.lock();
            if let Some(mail) = take(lane, &mut state, 0) {
                drop(state);
                return Poll::Ready(Ok(mail));
            }
            return self.begin(state, cx);
        }
        self.wait(cx)
    }

    /// The first poll found nothing.
    #[inline(never)]
    fn begin(
        &mut self,
        mut state: MutexGuard<'c, State<O::Transport>>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Mail<O>, OperationError>> {
        let lane = self.owner.lane();
        let waiter = Waiter::new(&lane.queue.shared);
        let wait = self.wait.insert(Wait { ticket: 0, waiter, starved: None });
        if wait.waiter.joins() {
            if state.receive_error.is_none() && state.expects() {
                let old = state.receivers.stand(&mut wait.ticket, cx);
                drop(state);
                drop(old);
                if wait.waiter.has_joined() {
                    return Poll::Pending;
                }
            } else {
                drop(state);
            }
        } else if wait.waiter.sleeps_at_once() {
            lane.read(&mut state, NONE);
            if let Some(mail) = take(lane, &mut state, 0) {
                lane.after(state);
                return Poll::Ready(Ok(mail));
            }
            if state.receive_error.is_none() && state.expects() {
                let old = state.receivers.stand(&mut wait.ticket, cx);
                lane.after(state);
                drop(old);
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

    #[inline(never)]
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Result<Mail<O>, OperationError>> {
        let (owner, lane) = (self.owner, self.owner.lane());
        let Some(wait) = &mut *self.wait else { return Poll::Pending };
        if wait.starved.is_none() {
            let mut state = lane.lock();
            if let Some(mail) = take(lane, &mut state, wait.ticket) {
                leave(state, &mut wait.ticket);
                wait.waiter.found();
                return Poll::Ready(Ok(mail));
            }
        }
        let result = std::task::ready!(wait.poll(owner, cx));
        wait.leave(lane);
        Poll::Ready(result)
    }
}

impl<'c> Wait<'c> {
    fn poll<O: Receiver>(
        &mut self,
        owner: &'c O,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Mail<O>, OperationError>> {
        let mut starved = self.starved.is_some();
        loop {
            if starved {
                std::task::ready!(self.poll_starved(owner, cx))?;
            }
            let ticket = &mut self.ticket;
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
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), OperationError>> {
        let lane = owner.lane();
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
            let old = lane.lock().receivers.stand(&mut self.ticket, cx);
            drop(old);
            return Poll::Pending;
        };
        self.starved = None;
        let posted = lane.lock().post_recv(lane, buffer?);
        Poll::Ready(posted.map_err(|(error, _buffer)| error))
    }

    /// Leaves the line, if it stands there.
    fn leave<T: Carries>(&mut self, lane: &Lane<T>) {
        if self.ticket != 0 {
            leave(lane.lock(), &mut self.ticket);
        }
    }
}

impl<O: Receiver> Drop for Receive<'_, O> {
    #[inline]
    fn drop(&mut self) {
        if self.wait.is_some() {
            give_up(self.owner.lane(), self.wait.take());
        }
    }
}

/// The future is dropped.
#[inline(never)]
fn give_up<T: Carries>(lane: &Lane<T>, wait: Option<Wait<'_>>) {
    if let Some(mut wait) = wait {
        wait.leave(lane);
    }
}

/// Takes what arrived, if it is the turn of the future with `ticket`, and posts the next receive before it is looked at: the peer may be
/// waiting for that.
#[inline(always)]
fn take<T: Carries>(lane: &Lane<T>, state: &mut State<T>, ticket: Ticket) -> Option<T::Mail> {
    if !state.receivers.is_turn(ticket) {
        return None;
    }
    let mail = state.take_arrived()?;
    state.refill(lane);
    Some(mail)
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
