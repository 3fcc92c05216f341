//! What the handle of a connection and its watcher share: the queue pair, and why it ended.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{
        Arc, OnceLock, PoisonError, RwLock,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rdma_core::{
    Buffer, CompletionError, Opcode, Payload, PostErrorKind, QueuePair, WorkRequest,
    inflight::{Finished, Operation, WorkQueue},
    qp::state::Rts,
};
use tokio::sync::{Mutex, Notify};

use super::{receive::Receives, transport::Connected};
use crate::{
    counters::{ConnectionCounters, Errors},
    error::{Ended, OperationError},
    pool::BufferPool,
    queue::{CompletionQueue, Waiter},
    trace,
};

#[derive(Debug)]
pub(super) struct Link<T: Connected> {
    /// Gone when the pair had to be destroyed under operations that did not end otherwise.
    qp: RwLock<Option<QueuePair<T, Rts>>>,
    pub(super) qp_num: u32,
    send_queue: Arc<WorkQueue>,
    recv_queue: Arc<WorkQueue>,
    pub(super) queue: CompletionQueue,
    pub(super) pool: BufferPool,
    pub(super) receives: std::sync::Mutex<Receives>,
    pub(super) receive_depth: usize,
    /// Those who wait for a place in the send queue stand in line here, so that a place that becomes free wakes one.
    line: Mutex<()>,
    in_line: AtomicUsize,
    ended: OnceLock<Ended>,
    /// Notified when `ended` is set.
    end: Notify,
    pub(super) counters: Counters,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    posted: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    receives_posted: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) keep_alives: AtomicU64,
    pub(super) errors: Errors,
}

/// A work request that was not posted or did not end well: why, and what it held.
type Refused<T> = (OperationError, WorkRequest<'static, T>);

impl<T: Connected> Link<T> {
    pub(super) fn new(
        qp: QueuePair<T, Rts>,
        queue: CompletionQueue,
        pool: BufferPool,
        receives: Receives,
    ) -> Self {
        let receive_depth = qp.capacity().max_recv as usize;
        Link {
            qp_num: qp.num(),
            send_queue: Arc::clone(qp.send_queue()),
            recv_queue: Arc::clone(qp.recv_queue()),
            qp: RwLock::new(Some(qp)),
            queue,
            pool,
            receives: std::sync::Mutex::new(receives),
            receive_depth,
            line: Mutex::new(()),
            in_line: AtomicUsize::new(0),
            ended: OnceLock::new(),
            end: Notify::new(),
            counters: Counters::default(),
        }
    }

    /// Why the connection ended, if it did.
    pub(super) fn why_ended(&self) -> Option<&Ended> {
        self.ended.get()
    }

    /// Waits until the connection ended.
    pub(super) async fn ended(&self) -> Ended {
        loop {
            let mut end = std::pin::pin!(self.end.notified());
            end.as_mut().enable();
            if let Some(reason) = self.ended.get() {
                return reason.clone();
            }
            end.await;
        }
    }

    /// Ends the connection: what is in flight is flushed, what is posted later refused. The first reason counts.
    pub(super) fn end(&self, reason: Ended) {
        if self.ended.set(reason).is_err() {
            return;
        }
        if let Some(reason) = self.ended.get() {
            trace::connection_ended(self.qp_num, reason);
        }
        if let Some(qp) = &*self.qp.read().unwrap_or_else(PoisonError::into_inner)
            && let Err(error) = qp.abort()
        {
            // The watcher destroys the pair when operations do not end.
            trace::abort_failed(self.qp_num, &error);
        }
        self.end.notify_waiters();
    }

    /// Ends the connection because of a failed completion; gives the error for who waited for it.
    pub(super) fn fail(&self, error: CompletionError) -> OperationError {
        if error.is_flush()
            && let Some(reason) = self.ended.get()
        {
            return reason.clone().into();
        }
        self.end(Ended::Failed(error.clone()));
        error.into()
    }

    /// Ends the connection because its completion queue cannot be read.
    pub(super) fn fail_queue(&self, error: &rdma_core::Error) -> OperationError {
        let reason = Ended::Queue { reason: error.to_string() };
        self.end(reason.clone());
        reason.into()
    }

    /// Posts a receive.
    #[inline]
    pub(super) fn start_recv(&self, buffer: Buffer) -> Result<Operation, OperationError> {
        match &*self.qp.read().unwrap_or_else(PoisonError::into_inner) {
            None => Err(self.gone()),
            Some(_) if self.ended.get().is_some() => Err(self.gone()),
            Some(qp) => {
                let operation = qp.start_recv(buffer).map_err(|error| error.kind)?.detach();
                self.counters.receives_posted.fetch_add(1, Relaxed);
                Ok(operation)
            }
        }
    }

    /// Posts a work request, if the send queue has a place for it now.
    #[expect(clippy::result_large_err, reason = "the error gives the request back")]
    #[inline]
    pub(super) fn start_send(&self, request: WorkRequest<'static, T>) -> Result<Operation, Refused<T>> {
        match &*self.qp.read().unwrap_or_else(PoisonError::into_inner) {
            None => Err((self.gone(), request)),
            Some(_) if self.ended.get().is_some() => Err((self.gone(), request)),
            Some(qp) => match qp.start_send(request) {
                Ok(operation) => {
                    self.counters.posted.fetch_add(1, Relaxed);
                    Ok(operation.detach())
                }
                Err(error) => Err((error.kind.into(), error.request)),
            },
        }
    }

    /// Posts the first of `requests` with one doorbell, as many as the send queue has places for now; those that are left were not
    /// posted.
    pub(super) fn start_batch(
        &self,
        requests: &mut Vec<WorkRequest<'static, T>>,
        operations: &mut VecDeque<Option<Operation>>,
    ) -> Result<(), OperationError> {
        match &*self.qp.read().unwrap_or_else(PoisonError::into_inner) {
            None => Err(self.gone()),
            Some(_) if self.ended.get().is_some() => Err(self.gone()),
            Some(qp) => {
                let mut posted = Vec::with_capacity(requests.len());
                let result = qp.start_batch(requests, &mut posted);
                self.counters.posted.fetch_add(posted.len() as u64, Relaxed);
                operations.extend(posted.into_iter().map(|operation| Some(operation.detach())));
                result.map(drop).map_err(OperationError::from)
            }
        }
    }

    /// Ready when the send queue has a place, or may have.
    pub(super) fn poll_place(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.send_queue.poll_ready(cx)
    }

    #[cold]
    fn gone(&self) -> OperationError {
        self.ended.get().cloned().unwrap_or(Ended::Closed).into()
    }

    /// Posts `request` as soon as the send queue has a place for it.
    pub(super) async fn post(&self, request: WorkRequest<'static, T>) -> Result<Operation, Refused<T>> {
        // Whoever stands in line comes first.
        if self.is_line() {
            return self.stand_in_line(request).await;
        }
        match self.start_send(request) {
            Err((OperationError::Post(PostErrorKind::QueueFull), request)) => {
                self.stand_in_line(request).await
            }
            posted => posted,
        }
    }

    /// Whether futures wait for a place in the send queue.
    #[inline]
    pub(super) fn is_line(&self) -> bool {
        self.in_line.load(Relaxed) > 0
    }

    /// Posts `request` when the send queue has a place for it, after those that waited before.
    pub(super) async fn stand_in_line(
        &self,
        request: WorkRequest<'static, T>,
    ) -> Result<Operation, Refused<T>> {
        let _place = Place::new(&self.in_line);
        let _first = self.line.lock().await;
        let mut request = Some(request);
        let mut waiter = Waiter::new(&self.queue.shared);
        let posted = poll_fn(|cx| waiter.poll(cx, |cx| self.try_post(&mut request, cx))).await;
        match posted {
            Ok(posted) => posted,
            Err(error) => {
                Err((self.fail_queue(&error), request.unwrap_or_else(|| WorkRequest::send(Payload::empty()))))
            }
        }
    }

    fn try_post(
        &self,
        request: &mut Option<WorkRequest<'static, T>>,
        mut cx: Option<&mut Context<'_>>,
    ) -> Poll<Result<Operation, Refused<T>>> {
        while let Some(work) = request.take() {
            match self.start_send(work) {
                Err((OperationError::Post(PostErrorKind::QueueFull), work)) => *request = Some(work),
                posted => return Poll::Ready(posted),
            }
            let Some(cx) = &mut cx else { break };
            if self.send_queue.poll_ready(cx).is_pending() {
                break;
            }
        }
        Poll::Pending
    }

    /// Waits for a posted operation.
    pub(super) async fn finish(&self, operation: Operation) -> Finished {
        let mut operation = Some(operation);
        let mut waiter = Waiter::new(&self.queue.shared);
        let finished = poll_fn(|cx| waiter.poll(cx, |cx| check(&mut operation, cx))).await;
        match finished {
            Ok(finished) => finished,
            Err(error) => {
                self.fail_queue(&error);
                // Nobody reads the completion queue any more. The watcher destroys the pair, and with it the operation ends.
                poll_fn(|cx| Operation::poll_finished(&mut operation, cx)).await
            }
        }
    }

    /// Counts an operation that ended well.
    #[inline]
    pub(super) fn count_success(&self) {
        self.counters.completed.fetch_add(1, Relaxed);
    }

    /// Counts an operation or a receive that ended with an error.
    #[cold]
    pub(super) fn count_failure(&self, finished: &Finished) {
        let completion = finished.completion();
        if completion.opcode() != Opcode::Recv {
            self.counters.failed.fetch_add(1, Relaxed);
        }
        self.counters.errors.count(completion.status());
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.send_queue.in_flight() + self.recv_queue.in_flight()
    }

    pub(super) fn sends_in_flight(&self) -> u32 {
        self.send_queue.in_flight()
    }

    /// Reads completions until everything in flight was flushed; after `limit` destroys the pair, which ends the rest.
    /// The connection has ended.
    pub(super) async fn settle(&self, limit: Duration) {
        let start = Instant::now();
        while self.in_flight() > 0 && start.elapsed() < limit {
            match self.queue.shared.cq.dispatch() {
                Ok(0) => tokio::time::sleep(Duration::from_millis(1)).await,
                Ok(_) => tokio::task::yield_now().await,
                Err(_) => break,
            }
        }
        let qp = self.qp.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(qp);
    }

    pub(super) fn counters(&self) -> ConnectionCounters {
        let Counters { posted, completed, failed, receives_posted, received, keep_alives, errors: _ } =
            &self.counters;
        ConnectionCounters {
            posted: posted.load(Relaxed),
            completed: completed.load(Relaxed),
            failed: failed.load(Relaxed),
            receives_posted: receives_posted.load(Relaxed),
            received: received.load(Relaxed),
            keep_alives: keep_alives.load(Relaxed),
        }
    }
}

/// Whether an operation finished; with a context registers the waker if not.
#[inline]
pub(crate) fn check(operation: &mut Option<Operation>, cx: Option<&mut Context<'_>>) -> Poll<Finished> {
    if let Some(cx) = cx {
        return Operation::poll_finished(operation, cx);
    }
    match operation.take().map(Operation::try_finish) {
        Some(Ok(finished)) => Poll::Ready(finished),
        Some(Err(unfinished)) => {
            *operation = Some(unfinished);
            Poll::Pending
        }
        None => Poll::Pending,
    }
}

/// Counts someone in line, also when the future is dropped.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, SeqCst);
        Place(count)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}
