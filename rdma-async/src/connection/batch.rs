//! Several operations with one doorbell and one signalled completion.

use std::{
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rdma_core::{Buffer, Payload, PostErrorKind, RemoteSlice, WorkRequest};

use super::{
    Connection,
    link::{Link, write_nowhere},
    transport::Connected,
};
use crate::{
    error::{Ended, OperationError},
    lane::{Finished, Lane, State},
    line::Ticket,
    operate::{Owner, leave, stands_behind, wake},
    queue::yield_to_runtime,
    waiter::Waiter,
};

/// Sends and writes that are posted together, in order: one chain of work requests, one doorbell, and a completion for the last one
/// alone. Made by [`Connection::batch`].
///
/// The send queue may lack the room for all of them; then those that fit are posted, and the others as room comes.
#[derive(Debug)]
#[must_use = "a batch does nothing until it is posted"]
pub struct Batch<'c, T: Connected> {
    connection: &'c Connection<T>,
    requests: Vec<WorkRequest<'static, T>>,
    /// Of the first message that is: its length.
    too_long: Option<usize>,
}

impl<'c, T: Connected> Batch<'c, T> {
    pub(super) fn new(connection: &'c Connection<T>) -> Self {
        Batch { connection, requests: Vec::new(), too_long: None }
    }

    /// Adds a [`send`](Connection::send).
    #[inline]
    pub fn send(self, buffer: Buffer) -> Self {
        self.message(buffer, WorkRequest::send)
    }

    /// Adds a [`send_with_imm`](Connection::send_with_imm).
    pub fn send_with_imm(self, buffer: Buffer, imm: u32) -> Self {
        self.message(buffer, |buffer| WorkRequest::send_with_imm(buffer, imm))
    }

    /// Adds a [`write`](Connection::write).
    #[inline]
    pub fn write(self, buffer: Buffer, remote: RemoteSlice) -> Self {
        self.add(WorkRequest::write(buffer, remote))
    }

    /// Adds a [`write_with_imm`](Connection::write_with_imm).
    pub fn write_with_imm(self, buffer: Buffer, remote: RemoteSlice, imm: u32) -> Self {
        self.add(WorkRequest::write_with_imm(buffer, remote, imm))
    }

    #[inline]
    fn message(mut self, buffer: Buffer, request: impl FnOnce(Buffer) -> WorkRequest<'static, T>) -> Self {
        if buffer.len() > self.connection.peer.message_size {
            self.too_long.get_or_insert(buffer.len());
        }
        self.add(request(buffer))
    }

    /// Only the last one is signalled.
    #[inline]
    fn add(mut self, request: WorkRequest<'static, T>) -> Self {
        match self.requests.last_mut() {
            Some(last) => last.set_unsignaled(),
            // It is a batch: what grows by doubling moves most requests twice.
            None => self.requests.reserve(16),
        }
        self.requests.push(request);
        self
    }

    /// Posts all of them and waits for the end of the last one; gives the buffers back, in order.
    ///
    /// # Errors
    ///
    /// The first [`OperationError`]. With [`TooLong`](OperationError::TooLong) nothing was posted; otherwise those before the one
    /// that failed may have been carried out, and those behind it were not.
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have had all, some or none of them carried out.
    pub fn post(self) -> impl Future<Output = (Result<(), OperationError>, Vec<Buffer>)> + Send + use<'c, T> {
        let limit = self.connection.peer.message_size;
        Post {
            link: &self.connection.link,
            waiter: Waiter::new(&self.connection.link.lane.queue.shared),
            is_new: true,
            requests: self.requests,
            refusal: self.too_long.map(|length| OperationError::TooLong { length, limit }),
            slot: None,
            ticket: 0,
        }
    }
}

/// What a batch ends with.
type Outcome = (Result<(), OperationError>, Vec<Buffer>);

/// The future of a batch. All its work requests carry the number of one entry of the lane, which is done when the last of them is.
struct Post<'c, T: Connected> {
    link: &'c Link<T>,
    /// Not polled yet.
    is_new: bool,
    /// Those that are not yet posted.
    requests: Vec<WorkRequest<'static, T>>,
    /// Why no more are.
    refusal: Option<OperationError>,
    slot: Option<u32>,
    /// In the line for places in the send queue.
    ticket: Ticket,
    waiter: Waiter<'c>,
}

impl<T: Connected> Future for Post<'_, T> {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let Post { link, is_new, requests, refusal, slot, ticket, waiter } = &mut *self;
        // One lock for a whole batch.
        let gives_way = mem::take(is_new) && link.lane.lock().is_enough_of_batches();
        if refusal.is_none() && !requests.is_empty() && stands_behind(&link.lane, ticket, cx) {
            return Poll::Pending;
        }
        if gives_way {
            let outcome = check(link, requests, refusal, slot, ticket, Some(cx));
            if outcome.is_pending() {
                yield_to_runtime(cx);
            }
            return outcome;
        }
        match waiter.poll(cx, |cx| check(link, requests, refusal, slot, ticket, cx)) {
            Poll::Ready(Ok(outcome)) => Poll::Ready(outcome),
            Poll::Ready(Err(error)) => {
                link.unreadable(&error);
                // What that flushed is read here; otherwise it ends when the watcher destroys the queue pair.
                let queue = &link.lane.queue.shared;
                queue.read_out();
                let outcome = check(link, requests, refusal, slot, ticket, Some(cx));
                if outcome.is_pending() {
                    queue.look_again(cx);
                }
                outcome
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Posts what can be; ready when nothing is in flight and nothing is left to post. With a context leaves the waker where it will be
/// called.
fn check<T: Connected>(
    link: &Link<T>,
    requests: &mut Vec<WorkRequest<'static, T>>,
    refusal: &mut Option<OperationError>,
    slot: &mut Option<u32>,
    ticket: &mut Ticket,
    cx: Option<&mut Context<'_>>,
) -> Poll<Outcome> {
    let lane = &link.lane;
    let mut state = lane.lock();
    if refusal.is_none() && !requests.is_empty() && (state.ended.is_some() || state.senders.is_turn(*ticket))
    {
        let mut end_of_run = Ok(());
        if let Err(error) = post(&mut state, lane, requests, slot, &mut end_of_run)
            && !matches!(error, OperationError::Post(PostErrorKind::QueueFull))
        {
            *refusal = Some(error);
        }
        if let Err(kind) = end_of_run {
            // What is in flight ends with the queue pair.
            drop(state);
            lane.end(Ended::Device { reason: kind.to_string() });
            state = lane.lock();
        }
        if refusal.is_some() || requests.is_empty() {
            let wakers = leave(&mut state, ticket);
            drop(state);
            wake(wakers);
            state = lane.lock();
        }
    }
    if refusal.is_some() || requests.is_empty() {
        let finished = match slot {
            None => Finished::default(),
            Some(number) => {
                let Some(finished) = state.finished(*number) else {
                    let old = cx.map(|cx| state.register(*number, cx.waker()));
                    drop(state);
                    drop(old);
                    return Poll::Pending;
                };
                *slot = None;
                finished
            }
        };
        drop(state);
        return Poll::Ready(outcome(link, finished, refusal.take(), mem::take(requests)));
    }
    let Some(cx) = cx else { return Poll::Pending };
    let old = state.senders.stand(ticket, cx);
    let is_turn = state.senders.is_turn(*ticket);
    let queue = state.qp.as_ref().map(|qp| Arc::clone(qp.send_queue()));
    drop(state);
    drop(old);
    if let Some(queue) = queue.filter(|_| is_turn)
        && lane.queue.shared.poll_room(&queue, cx.waker()).is_ready()
    {
        // Others get their turn before the next attempt.
        cx.waker().wake_by_ref();
    }
    Poll::Pending
}

/// Posts the first of `requests` with one doorbell, as many as the send queue has places for; those that are left were not posted. When
/// the device takes nothing any more, `end_of_run` says why: then some of those that were posted have no completion to come.
fn post<T: Connected>(
    state: &mut State<T>,
    lane: &Lane<T>,
    requests: &mut Vec<WorkRequest<'static, T>>,
    slot: &mut Option<u32>,
    end_of_run: &mut Result<(), PostErrorKind>,
) -> Result<(), OperationError> {
    if state.ended.is_some() || state.qp.is_none() {
        return Err(state.gone());
    }
    let number = match *slot {
        Some(number) => number,
        None => {
            let number = state.allocate().ok_or(PostErrorKind::QueueFull)?;
            let id = lane.key().id(number);
            requests.iter_mut().for_each(|request| request.set_id(id));
            state.expect(number, requests.len());
            *slot.insert(number)
        }
    };
    let Some(qp) = &state.qp else { return Err(state.gone()) };
    let before = requests.len();
    let result = qp.post_batch(requests);
    let mut posted = u32::try_from(before - requests.len()).unwrap_or(u32::MAX);
    match &result {
        // Those before the one that the device refused complete with the next that is signalled.
        Err(PostErrorKind::Verb { .. }) if posted > 0 => {
            match qp.post_send(write_nowhere(Payload::empty()).id(lane.key().id(number))) {
                Ok(()) => posted += 1,
                Err(error) => *end_of_run = Err(error.kind),
            }
        }
        Err(unclear @ PostErrorKind::Unclear { .. }) => *end_of_run = Err(unclear.clone()),
        _ => {}
    }
    state.posted(number, posted);
    result.map(drop).map_err(OperationError::from)
}

fn outcome<T: Connected>(
    link: &Link<T>,
    mut finished: Finished,
    refusal: Option<OperationError>,
    left: Vec<WorkRequest<'static, T>>,
) -> Outcome {
    let result = match (finished.failure.take(), refusal) {
        (Some(error), _) => Err(link.failed(error)),
        (None, Some(error)) => Err(error),
        (None, None) => Ok(()),
    };
    let mut buffers = finished.into_vec();
    buffers.extend(left.into_iter().flat_map(|request| request.into_payload().into_buffers()));
    (result, buffers)
}

impl<T: Connected> Drop for Post<'_, T> {
    fn drop(&mut self) {
        let mut state = self.link.lane.lock();
        let held = self.slot.and_then(|slot| state.ignore(slot, None));
        let wakers = leave(&mut state, &mut self.ticket);
        drop(state);
        drop(held);
        wake(wakers);
    }
}
