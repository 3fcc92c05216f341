//! The futures of receives.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use parking_lot::MutexGuard;
use rdma_core::{Buffer, qp::transport::Transport};

use crate::{
    error::OperationError,
    lane::{Arrival, State},
    line::Ticket,
    operate::Owner,
    queue::Waiter,
};

/// The owner of receives.
pub(crate) trait Receiver: Owner {
    /// Waits until nothing arrives any more; gives why.
    fn ended(&self) -> impl Future<Output = OperationError> + Send;
}

/// What a future in line found.
enum Found {
    Arrival(Arrival),
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
    waiter: Waiter<'c>,
    /// It allocates, because it waits for somebody to drop a message.
    starved: Option<Starved<'c>>,
}

impl<'c, O: Receiver> Receive<'c, O> {
    #[inline]
    pub(crate) fn new(owner: &'c O) -> Self {
        Receive { owner, ticket: 0, waiter: Waiter::new(&owner.lane().queue.shared), starved: None }
    }

    /// Waits for a buffer, and posts it.
    #[cold]
    fn poll_starved(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), OperationError>> {
        let (owner, lane) = (self.owner, self.owner.lane());
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

    #[inline(never)]
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrival, OperationError>> {
        let mut starved = self.starved.is_some();
        loop {
            if starved {
                std::task::ready!(self.poll_starved(cx))?;
            }
            let (owner, ticket) = (self.owner, &mut self.ticket);
            let found = self.waiter.poll(cx, |cx| look(owner, ticket, cx));
            match std::task::ready!(found) {
                Ok(Found::Arrival(arrival)) => return Poll::Ready(Ok(arrival)),
                Ok(Found::Error(error)) => return Poll::Ready(Err(error)),
                Ok(Found::Nothing) => starved = true,
                Err(error) => return Poll::Ready(Err(self.owner.unreadable(&error))),
            }
        }
    }

    /// See [`Future::poll`].
    #[inline]
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrival, OperationError>> {
        if let Some(arrival) = take(self.owner, &mut self.ticket) {
            return Poll::Ready(Ok(arrival));
        }
        let result = std::task::ready!(self.wait(cx));
        self.leave();
        Poll::Ready(result)
    }

    /// Leaves the line, if it stands there.
    #[inline]
    fn leave(&mut self) {
        if self.ticket != 0 {
            leave(self.owner.lane().lock(), &mut self.ticket);
        }
    }
}

impl<O: Receiver> Drop for Receive<'_, O> {
    #[inline]
    fn drop(&mut self) {
        self.leave();
    }
}

/// Takes what arrived, if it is the turn of the future with `ticket`, and posts the next receive before it is looked at: the peer may be
/// waiting for that.
#[inline(always)]
fn take<O: Receiver>(owner: &O, ticket: &mut Ticket) -> Option<Arrival> {
    let lane = owner.lane();
    let mut state = lane.lock();
    if !state.receivers.is_turn(*ticket) {
        return None;
    }
    let arrival = state.take_arrived()?;
    let left = state.refill(lane);
    state.counters.received += 1;
    if *ticket == 0 {
        drop(state);
    } else {
        leave(state, ticket);
    }
    if left.is_some() {
        drop(left);
    }
    Some(arrival)
}

/// Leaves the line, and wakes the next one if there is something for it.
#[inline(never)]
fn leave<T: Transport>(mut state: MutexGuard<'_, State<T>>, ticket: &mut Ticket) {
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
fn look<O: Receiver>(owner: &O, ticket: &mut Ticket, cx: Option<&mut Context<'_>>) -> Poll<Found> {
    loop {
        if let Some(arrival) = take(owner, ticket) {
            return Poll::Ready(Found::Arrival(arrival));
        }
        let mut state = owner.lane().lock();
        if state.receivers.is_turn(*ticket) {
            if state.has_arrived() {
                // A moment ago.
                continue;
            }
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
        return Poll::Pending;
    }
}
