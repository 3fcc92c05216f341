//! The futures of sends, writes and reads.
//!
//! They are written by hand: nearly always an operation of one buffer is posted at the first poll and completes at that or the
//! next, and a future of nested `async fn`s would cost more instructions than all the rest by being moved about.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rdma_core::{
    Payload, PostErrorKind, WorkRequest,
    inflight::{Finished, Operation},
};

use super::{Connection, check, link::Link, transport::Connected};
use crate::{
    error::OperationError,
    queue::Waiter,
    source::{Source, prepare},
};

/// An operation's result, and its memory.
type Outcome<S> = (Result<(), OperationError>, S);

/// Makes the work request once the memory is known.
pub(super) trait Request<T: Connected>:
    FnOnce(Payload<'static>) -> WorkRequest<'static, T> + Send + Unpin
{
}

impl<T: Connected, F: FnOnce(Payload<'static>) -> WorkRequest<'static, T> + Send + Unpin> Request<T> for F {}

/// An operation: not yet posted, posted, or waiting for what it needs to be posted.
#[must_use = "futures do nothing unless polled"]
pub(super) struct Operate<'c, T: Connected, S: Source, F> {
    connection: &'c Connection<T>,
    /// The longest source that may be sent.
    limit: usize,
    /// Until the first poll.
    start: Option<(S, F)>,
    operation: Option<Operation>,
    kept: Option<S::Kept>,
    waiter: Waiter<'c>,
    /// The completion queue cannot be read: the operation ends when the watcher destroys the pair.
    unreadable: bool,
    /// An operation that has to wait for memory or for its turn. It allocates, because it waits anyway, and because all the
    /// others would pay for the room it needs.
    slow: Option<Pin<Box<dyn Future<Output = Outcome<S>> + Send + 'c>>>,
}

impl<'c, T: Connected, S: Source, F: Request<T> + 'c> Operate<'c, T, S, F> {
    #[inline]
    pub(super) fn new(connection: &'c Connection<T>, limit: usize, source: S, request: F) -> Self {
        Operate {
            connection,
            limit,
            start: Some((source, request)),
            operation: None,
            kept: None,
            waiter: Waiter::new(&connection.link.queue.shared),
            unreadable: false,
            slow: None,
        }
    }

    /// The first poll. `None` when the operation was posted, or has to wait for that.
    #[inline]
    fn start(&mut self, source: S, request: F) -> Option<Outcome<S>> {
        let connection = self.connection;
        let link = &*connection.link;
        let length = source.len();
        if length > self.limit {
            return Some((Err(OperationError::TooLong { length, limit: self.limit }), source));
        }
        // Whoever stands in line comes first.
        if link.is_line() {
            self.slow = Some(Box::pin(connection.wait_and_operate(source, request)));
            return None;
        }
        let (payload, kept) = match source.split(&link.pool) {
            Ok(split) => split,
            Err(source) => {
                self.slow = Some(Box::pin(connection.wait_and_operate(source, request)));
                return None;
            }
        };
        match link.start_send(request(payload)) {
            Ok(operation) => {
                self.operation = Some(operation);
                self.kept = Some(kept);
                None
            }
            Err((OperationError::Post(PostErrorKind::QueueFull), request)) => {
                self.slow = Some(Box::pin(connection.stand_in_line(request, kept)));
                None
            }
            Err((error, request)) => Some(refused(error, request, kept)),
        }
    }

    #[inline]
    fn finish(&mut self, finished: Finished) -> Poll<Outcome<S>> {
        match self.kept.take() {
            Some(kept) => Poll::Ready(outcome(&self.connection.link, finished, kept)),
            None => Poll::Pending,
        }
    }

    /// A look at what was posted a moment ago, or what woke this future.
    #[inline]
    fn look(&mut self) -> Option<S> {
        if !self.operation.as_ref()?.is_finished() {
            return None;
        }
        match S::quickly(self.kept.take()?, self.operation.take()?) {
            Ok(source) => {
                self.connection.link.count_success();
                Some(source)
            }
            Err((kept, operation)) => {
                (self.kept, self.operation) = (Some(kept), Some(operation));
                None
            }
        }
    }

    /// Not there at the first look.
    #[inline(never)]
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Outcome<S>> {
        if let Some(slow) = &mut self.slow {
            return slow.as_mut().poll(cx);
        }
        if !self.unreadable {
            let operation = &mut self.operation;
            match self.waiter.poll(cx, |cx| check(operation, cx)) {
                Poll::Ready(Ok(finished)) => return self.finish(finished),
                Poll::Ready(Err(error)) => {
                    self.connection.link.fail_queue(&error);
                    self.unreadable = true;
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        match Operation::poll_finished(&mut self.operation, cx) {
            Poll::Ready(finished) => self.finish(finished),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<'c, T: Connected, S: Source, F: Request<T> + 'c> Future for Operate<'c, T, S, F> {
    type Output = Outcome<S>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome<S>> {
        let this = &mut *self;
        if let Some((source, request)) = this.start.take() {
            if let Some(outcome) = this.start(source, request) {
                return Poll::Ready(outcome);
            }
            // What was posted may be done already. A queue that cannot be read shows again in `wait`.
            if this.operation.is_some() {
                let _ = this.connection.link.queue.shared.cq.dispatch();
            }
        }
        if let Some(source) = this.look() {
            return Poll::Ready((Ok(()), source));
        }
        this.wait(cx)
    }
}

/// How a finished operation ended.
fn outcome<T: Connected, S: Source>(link: &Link<T>, finished: Finished, kept: S::Kept) -> Outcome<S> {
    let result = if finished.completion().is_success() {
        link.count_success();
        Ok(())
    } else {
        link.count_failure(&finished);
        finished.result().map(drop).map_err(|error| link.fail(error))
    };
    (result, S::rejoin(kept, finished.into_buffers()))
}

#[cold]
fn refused<T: Connected, S: Source>(
    error: OperationError,
    request: WorkRequest<'static, T>,
    kept: S::Kept,
) -> Outcome<S> {
    (Err(error), S::rejoin(kept, request.into_payload().into_buffers()))
}

impl<T: Connected> Connection<T> {
    /// Waits for memory to copy to, if it must be, and for a place in the send queue.
    async fn wait_and_operate<S: Source, F: Request<T>>(&self, source: S, request: F) -> Outcome<S> {
        let (payload, kept) = match prepare(source, &self.link.pool, self.domain.protection_domain()).await {
            Ok(prepared) => prepared,
            Err((error, source)) => return (Err(OperationError::Verb(Arc::new(error))), source),
        };
        match self.link.post(request(payload)).await {
            Ok(operation) => outcome(&self.link, self.link.finish(operation).await, kept),
            Err((error, request)) => refused(error, request, kept),
        }
    }

    /// Waits for a place in the send queue.
    async fn stand_in_line<S: Source>(&self, request: WorkRequest<'static, T>, kept: S::Kept) -> Outcome<S> {
        match self.link.stand_in_line(request).await {
            Ok(operation) => outcome(&self.link, self.link.finish(operation).await, kept),
            Err((error, request)) => refused(error, request, kept),
        }
    }
}
