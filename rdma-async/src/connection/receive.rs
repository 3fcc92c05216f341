//! The receives of a connection: kept posted, handed out in order.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    pin::Pin,
    sync::{PoisonError, atomic::Ordering::Relaxed},
    task::{Context, Poll, Waker},
};

use rdma_core::{
    Buffer, Error, PostErrorKind, QueuePair, Success,
    inflight::{Finished, Operation},
    qp::state::Init,
};

use super::{check, link::Link, transport::Connected};
use crate::{
    error::{Ended, OperationError},
    message::Message,
    pool::BufferPool,
    queue::Waiter,
};

/// Receives in the order of posting, which is the order in which messages arrive: a connected transport completes its
/// receive queue in order (IBTA vol. 1, 10.8.3.3).
///
/// The future that waits does so on the first one, and takes it out only when it completed: a dropped future leaves everything as
/// it was.
#[derive(Debug)]
pub(super) struct Receives {
    /// `None` only while the first one is being taken.
    posted: VecDeque<Option<Operation>>,
    /// The futures that wait, in the order of asking; the first one waits for the first receive, the others for their turn.
    line: VecDeque<Place>,
    tickets: u64,
}

#[derive(Debug)]
struct Place {
    ticket: u64,
    waker: Waker,
}

/// What a future in line found.
enum Found {
    Message(Message),
    /// A receive that failed, or one that is no message.
    Finished(Finished),
    /// It is its turn, and no receive is posted: every buffer is elsewhere, or the connection ended.
    Nothing,
}

impl Receives {
    /// As many receives as the queue takes and the pool has buffers.
    pub(super) fn new<T: Connected>(pair: &QueuePair<T, Init>, pool: &BufferPool) -> Result<Self, Error> {
        let depth = pair.capacity().max_recv as usize;
        let mut posted = VecDeque::with_capacity(depth);
        while posted.len() < depth {
            let Some(buffer) = pool.try_acquire() else { break };
            match pair.start_recv(buffer) {
                Ok(operation) => posted.push_back(Some(operation.detach())),
                Err(error) if error.kind == PostErrorKind::QueueFull => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Receives { posted, line: VecDeque::with_capacity(1), tickets: 0 })
    }

    /// Posts receives as long as the pool has buffers and the queue room.
    #[inline]
    fn refill<T: Connected>(&mut self, link: &Link<T>) {
        while self.posted.len() < link.receive_depth {
            let Some(buffer) = link.pool.try_acquire() else { break };
            match link.start_recv(buffer) {
                Ok(operation) => self.posted.push_back(Some(operation)),
                // The slot of a receive that completed a moment ago, a credit of a shared completion queue, or a connection that
                // ended: what keeps a receive from being posted shows when none is left.
                Err(_) => break,
            }
        }
    }

    /// Whether the future with `ticket` comes first; one without does when nobody waits.
    #[inline]
    fn is_turn(&self, ticket: Option<u64>) -> bool {
        self.line.front().map(|place| place.ticket) == ticket
    }

    /// Looks for the first message; with a context stands in line, and registers the waker where it will be called.
    #[inline]
    fn look(&mut self, ticket: &mut Option<u64>, cx: Option<&mut Context<'_>>) -> Poll<Found> {
        if let Some(cx) = cx {
            return self.wait(ticket, cx);
        }
        if !self.is_turn(*ticket) {
            return Poll::Pending;
        }
        match self.posted.front() {
            Some(first) if first.as_ref().is_some_and(Operation::is_finished) => self.take_first(),
            Some(_) => Poll::Pending,
            None => Poll::Ready(Found::Nothing),
        }
    }

    /// Stands in line, and if it is the first there, waits for the first receive.
    fn wait(&mut self, ticket: &mut Option<u64>, cx: &mut Context<'_>) -> Poll<Found> {
        self.stand(ticket, cx);
        if !self.is_turn(*ticket) {
            return Poll::Pending;
        }
        let Some(first) = self.posted.front_mut() else { return Poll::Ready(Found::Nothing) };
        if let Poll::Ready(finished) = check(first, Some(cx)) {
            self.posted.pop_front();
            return Poll::Ready(Found::Finished(finished));
        }
        Poll::Pending
    }

    /// Takes the first receive, which completed.
    #[inline]
    fn take_first(&mut self) -> Poll<Found> {
        let Some(Some(operation)) = self.posted.pop_front() else { return Poll::Pending };
        let details =
            |success: Success<'_>| (success.imm(), success.is_write_with_imm().then(|| success.len()));
        match operation.try_buffer(details) {
            Ok((mut buffer, (imm, written))) => {
                if written.is_some() {
                    buffer.truncate(0);
                }
                Poll::Ready(Found::Message(Message { buffer, imm, written }))
            }
            Err(operation) => match operation.try_finish() {
                Ok(finished) => Poll::Ready(Found::Finished(finished)),
                Err(operation) => {
                    self.posted.push_front(Some(operation));
                    Poll::Pending
                }
            },
        }
    }

    /// Stands in line, or stays there, with the context's waker.
    fn stand(&mut self, ticket: &mut Option<u64>, cx: &Context<'_>) {
        let place = ticket.and_then(|ticket| self.line.iter_mut().find(|place| place.ticket == ticket));
        if let Some(place) = place {
            place.waker.clone_from(cx.waker());
            return;
        }
        self.tickets += 1;
        *ticket = Some(self.tickets);
        self.line.push_back(Place { ticket: self.tickets, waker: cx.waker().clone() });
    }

    /// Leaves the line; gives the waker of the future whose turn it is now.
    fn leave(&mut self, ticket: u64) -> Option<Waker> {
        if !self.is_turn(Some(ticket)) {
            self.line.retain(|place| place.ticket != ticket);
            return None;
        }
        self.line.pop_front();
        self.line.front().map(|place| place.waker.clone())
    }
}

/// A wait for a buffer of the pool, or for the end of the connection.
type Starved<'c> = Pin<Box<dyn Future<Output = Result<Buffer, Ended>> + Send + 'c>>;

/// The future of [`Connection::recv`](super::Connection::recv).
#[must_use = "futures do nothing unless polled"]
pub struct Recv<'c, T: Connected> {
    link: &'c Link<T>,
    /// Its place in line, once it waits.
    ticket: Option<u64>,
    waiter: Waiter<'c>,
    /// A buffer to receive into, when none was left. It allocates, because it waits for somebody to drop a message.
    starved: Option<Starved<'c>>,
}

impl<'c, T: Connected> Recv<'c, T> {
    #[inline]
    pub(super) fn new(link: &'c Link<T>) -> Self {
        Recv { link, ticket: None, waiter: Waiter::new(&link.queue.shared), starved: None }
    }

    /// Waits for a buffer, and posts it.
    #[cold]
    fn poll_starved(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), OperationError>> {
        let link = self.link;
        let starved = self.starved.get_or_insert_with(|| {
            Box::pin(async move {
                tokio::select! {
                    biased;
                    ended = link.ended() => Err(ended),
                    buffer = link.pool.acquire() => Ok(buffer),
                }
            })
        });
        let Poll::Ready(buffer) = starved.as_mut().poll(cx) else {
            // Others come after this one, though it has not met a receive to wait for.
            self.lock().stand(&mut self.ticket, cx);
            return Poll::Pending;
        };
        self.starved = None;
        let operation = self.link.start_recv(buffer?)?;
        self.lock().posted.push_back(Some(operation));
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn lock(&self) -> std::sync::MutexGuard<'c, Receives> {
        self.link.receives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves the line, if it stood there.
    #[inline]
    fn leave(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.leave_line(ticket);
        }
    }

    #[inline(never)]
    fn leave_line(&self, ticket: u64) {
        let next = self.lock().leave(ticket);
        if let Some(waker) = next {
            waker.wake();
        }
    }
}

impl<T: Connected> Future for Recv<'_, T> {
    type Output = Result<Message, OperationError>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut starved = this.starved.is_some();
        loop {
            if starved && let Err(error) = std::task::ready!(this.poll_starved(cx)) {
                this.leave();
                return Poll::Ready(Err(error));
            }
            let (link, ticket) = (this.link, &mut this.ticket);
            // The lock is not held while completions are dispatched, which runs wakers.
            let mut next = None;
            let found = this.waiter.poll(cx, |cx| {
                let mut receives = link.receives.lock().unwrap_or_else(PoisonError::into_inner);
                let found = receives.look(ticket, cx);
                if let Poll::Ready(Found::Message(_) | Found::Finished(_)) = found {
                    // The next receive is posted before this message is looked at: the peer may be waiting for it.
                    receives.refill(link);
                    next = ticket.take().and_then(|ticket| receives.leave(ticket));
                }
                found
            });
            if let Some(waker) = next {
                waker.wake();
            }
            let result = match std::task::ready!(found) {
                Ok(Found::Message(message)) => {
                    link.counters.received.fetch_add(1, Relaxed);
                    Ok(message)
                }
                Ok(Found::Finished(finished)) => message(link, finished),
                Ok(Found::Nothing) => {
                    starved = true;
                    continue;
                }
                Err(error) => Err(link.fail_queue(&error)),
            };
            this.leave();
            return Poll::Ready(result);
        }
    }
}

impl<T: Connected> Drop for Recv<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.leave();
    }
}

impl<T: Connected> fmt::Debug for Recv<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recv").finish_non_exhaustive()
    }
}

#[inline(never)]
fn message<T: Connected>(link: &Link<T>, finished: Finished) -> Result<Message, OperationError> {
    let (imm, written) = match finished.result() {
        Ok(success) => (success.imm(), success.is_write_with_imm().then(|| success.len())),
        Err(error) => {
            link.count_failure(&finished);
            return Err(link.fail(error));
        }
    };
    let Some(mut buffer) = finished.into_buffer() else {
        // Receives are posted with a buffer each, so a completion without one is not ours.
        return Err(OperationError::Ended(Ended::Closed));
    };
    if written.is_some() {
        buffer.truncate(0);
    }
    link.counters.received.fetch_add(1, Relaxed);
    Ok(Message { buffer, imm, written })
}
